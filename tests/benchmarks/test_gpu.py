"""The benchmark of the GPU without a GPU: what it would measure, values first, and nothing costs the rest."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from tests.inference.kernels.conftest import triton_is_missing

if triton_is_missing():
    pytest.skip("no triton of 3.6 or newer is installed", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("there is a GPU: run benchmarks/gpu.py", allow_module_level=True)

from benchmarks import gpu, gpu_linear, gpu_models
from benchmarks.gpu_cases import Case, dense, error
from benchmarks.gpu_record import Record

LIMITS = {"memory_gbs": 4000.0, "matmul_tflops": 800.0}


def test_the_goals_come_first_and_everything_is_there() -> None:
    cells = list(gpu_linear.cells())
    first = {(cell.shape, cell.tokens, cell.densities) for cell in cells[:4]}
    assert first == {(shape, tokens, (0.1,)) for shape in ((4096, 4096), (11008, 4096)) for tokens in (4096, 1)}
    assert len({cell.name for cell in cells}) == len(cells)
    whole = {(c.shape, c.tokens, d) for c in cells if c.dtype == "bfloat16" for d in c.densities}
    assert len(whole) == 12 * 5 * 4
    assert {shape for shape, _, _ in whole} == {shape for shapes in gpu_linear.SHAPES.values() for shape in shapes}


def test_a_cell_has_a_row_for_every_engine_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_linear, "_ROUNDS", 2)
    cell = gpu_linear.Cell((64, 64), 1, (0.5,), "float16", ((16, 16), (32, 1), (24, 1)))
    rows, skipped = gpu_linear.measure(cell, LIMITS)
    assert [(row["engine"], row["block_shape"]) for row in rows] == [
        ("dense", None),
        ("gpu", [16, 16]),
        ("gpu", [32, 1]),
    ]
    assert all(row["max_error"] < 2e-3 and row["ms"] > 0 for row in rows)
    assert {row.get("auto") for row in rows} == {None, "dense"}
    assert skipped["24x1"] == "does not divide the weight" and "CUDA" in skipped["2:4"]


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_linear, "dense", lambda weight: dense(weight) + 1)
    cell = gpu_linear.Cell((64, 64), 1, (0.5,), "float16", ((16, 16),))
    rows, skipped = gpu_linear.measure(cell, LIMITS)
    assert [row["engine"] for row in rows] == ["dense"] and "wrong values" in skipped["gpu 16x16 0.5"]


def test_the_error_is_a_share_and_sees_what_is_not_finite() -> None:
    x, weight = torch.randn(3, 64), torch.randn(32, 64)
    right = x.double() @ weight.double().t()
    assert error(right, x, weight) == 0.0
    assert error(right + 0.1 * right.abs().max(), x, weight) == pytest.approx(0.1)
    assert error(right.masked_fill(right == right[0, 0], torch.nan), x, weight) == float("inf")


def test_random_weights_keep_their_share() -> None:
    weight = Case((512, 512), (8, 1), 0.25, "float32").weight("cpu")
    assert abs(weight.density - 0.25) < 0.02
    assert float((dense(weight) != 0).float().mean()) == pytest.approx(weight.density)


def test_jobs_are_told_apart() -> None:
    names = [job.name for job in gpu_models.jobs()]
    assert len(set(names)) == len(names) and names[0] == "decode 1x1024 64x64 density 0.1"


def test_the_file_names_what_was_not_run(tmp_path: Path) -> None:
    record = Record(tmp_path / "a" / "gpu_linear.json", "linear", LIMITS)
    record.add("one", [{"engine": "dense"}], {"2:4": "no such chip"}, 1.0)
    record.skip("two", "the time was up")
    record.finish()
    told = json.loads((tmp_path / "a" / "gpu_linear.json").read_text())
    assert told["not_run"]["two"] == "the time was up" and "torchao" in told["not_run"]
    assert told["cells"] == {"one": {"seconds": 1.0, "skipped": {"2:4": "no such chip"}}}
    assert {"command", "commit", "hardware", "versions", "ceilings", "rows"} <= set(told)


def test_a_part_that_hangs_is_stopped(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    start = time.monotonic()
    assert gpu.run("timeit", "-n1", "-r1", "__import__('time').sleep(60)", seconds=1.0) == 124
    assert time.monotonic() - start < 30 and "stopped after 1 s" in capfd.readouterr().out

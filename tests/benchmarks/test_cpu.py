"""Tiny runs of cpu.py; where packages are missing, the file says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import cpu, encoders, engines, linears
from hf_sparse.inference.kernels import backend_status
from hf_sparse.inference.measuring.bench import MismatchError

LINEAR = "linear --shape 64x32 --tokens 1 8 --block 8x1 8x2 --density 0.5 --threads 1 --seconds 0 --rounds 1".split()
ENCODER = "encoder --model tiny --size 1x16 2x8 --density 0.5 0.1 --threads 1 --seconds 0 --rounds 1".split()
TORCH_ALONE = ["--without", "onnxruntime", "openvino"]
SETTINGS = {"blocks": [(8, 1)], "densities": [0.5], "seconds": 0.0, "rounds": 1, "clock": "wall"}
HEAD = {"command", "commit", "hardware", "versions", "kernels", "sources", "settings", "cells", "rows"}


@pytest.fixture(autouse=True)
def _leave_the_process_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "pin", lambda threads: list(range(threads)))
    monkeypatch.setattr(cpu, "logging", SimpleNamespace(set_verbosity_error=list, disable_progress_bar=list))


def _run(arguments: list[str], out: Path) -> dict[str, Any]:
    cpu.main([*arguments, "--out", str(out)])
    return json.loads(out.read_text())


def test_linear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = _run([*LINEAR, *TORCH_ALONE], tmp_path / "out.json")
    assert set(result) == HEAD
    assert result["command"].startswith("python benchmarks/cpu.py linear --shape 64x32")
    assert str(tmp_path) not in json.dumps(result)
    mine = {"auto", "cpu"} if backend_status()["cpu"][0] else {"auto"}
    for dtype in linears.DTYPES:
        rows = [row for row in result["rows"] if row["dtype"] == dtype and row["tokens"] == 8]
        assert mine | {"eager"} <= {row["engine"] for row in rows} <= mine | {"eager", "onednn"}
        assert [row["block_shape"] for row in rows if row["engine"] == "auto"] == [[8, 1], [8, 2]]
    for row in result["rows"]:
        assert row["ms"] > 0 and row["runs"] >= 1 and row["max_error"] >= 0 and row["threads"] == 1
        assert row["spread"][0] <= row["ms"] <= row["spread"][1]
        assert (row["density"] == 1.0) == (row["engine"] in engines.DENSE)
        assert row["engine"] != "cpu" or row["backend"] == "cpu"
    skipped = next(iter(result["cells"].values()))["skipped"]
    assert skipped["openvino float32"] == "left out on the command line"
    assert skipped["compile float32"] == "takes minutes to compile; measured with --compile"
    printed = capsys.readouterr().out
    assert "[4/4, 0 s left] bfloat16 64x32 tokens 8 threads 1: " in printed and " 0.5 " in printed


def test_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = _run([*ENCODER, "--scope", "encoder", "model"], tmp_path / "out.json")
    assert list(result["cells"]) == [
        f"tiny {scope} {size} threads 1" for scope in ("encoder", "model") for size in ("1x16", "2x8")
    ]
    # Nothing is left out in silence.
    skipped = result["cells"]["tiny model 2x8 threads 1"]["skipped"]
    assert skipped["onnxruntime float32"] == skipped["openvino bfloat16"] == "onnx is not installed"
    rows = [row for row in result["rows"] if (row["scope"], row["batch"], row["length"]) == ("encoder", 2, 8)]
    found = {(row["engine"], row["dtype"], row["density"]) for row in rows}
    both = [(dtype, density) for dtype in ("float32", "bfloat16") for density in (0.5, 0.1)]
    assert found == {
        *(("eager", dtype, 1.0) for dtype in ("float32", "bfloat16")),
        *((engine, *kind) for engine in ("hf_sparse", "hf_sparse_layers") for kind in both),
    }
    shapes = {(row["dtype"], tuple(row["block_shape"])) for row in rows if row["block_shape"]}
    assert shapes == {("float32", (8, 1)), ("bfloat16", (8, 2))}
    assert all(row["backend"].startswith("not fused") for row in rows if row["engine"] == "hf_sparse_layers")
    errors = [row["max_error"] for row in rows if row["dtype"] == "float32"]
    assert all(error < 1e-4 for error in errors)


@pytest.mark.parametrize("part", [LINEAR, ENCODER], ids=["linear", "encoder"])
def test_the_other_engines(part: list[str], tmp_path: Path) -> None:
    for package in ("onnx", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    result = _run(part, tmp_path / "out.json")
    found = {(row["engine"], row["dtype"]) for row in result["rows"]}
    assert {("onnxruntime", "float32"), ("openvino", "float32")} <= found
    for cell in result["cells"].values():
        assert not any("wrong values" in reason for reason in cell["skipped"].values())


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, out, measured = [*LINEAR, *TORCH_ALONE, "--dtype", "float32"], tmp_path / "out.json", []

    def measure(shape: tuple[int, int], tokens: int, *_: Any) -> tuple[list[dict[str, Any]], dict[str, str]]:
        measured.append(tokens)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return [{"engine": "eager", "ms": 1.0, "tokens": tokens}], {}

    monkeypatch.setattr(linears, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        _run(arguments, out)
    assert [row["tokens"] for row in json.loads(out.read_text())["rows"]] == [1]
    assert [row["tokens"] for row in _run(arguments, out)["rows"]] == [1, 8]
    assert measured == [1, 8, 8]
    _run(arguments, out)
    assert measured == [1, 8, 8]
    assert [row["tokens"] for row in _run([*arguments, "--fresh"], out)["rows"]] == [1, 8]
    assert measured == [1, 8, 8, 1, 8]


def test_what_was_measured_otherwise_is_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "measure", lambda *_: ([{"engine": "eager", "ms": 1.0}], {}))
    out = tmp_path / "out.json"
    _run(LINEAR, out)
    before = out.read_text()
    with pytest.raises(ValueError, match=r"measured with other settings: --fresh begins anew"):
        _run([*LINEAR, "--rounds", "2"], out)
    monkeypatch.setattr("benchmarks.record.digest", lambda: "other")
    with pytest.raises(ValueError, match=r"measured with other sources"):
        _run(LINEAR, out)
    assert out.read_text() == before


def test_no_speed_of_a_layer_without_right_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "time_in_turns", _must_not_be_called)
    monkeypatch.setattr(linears, "_sparse", lambda pruned, mask, block, backend, x: lambda: pruned(x) * 1.01)
    with pytest.raises(MismatchError, match=r"(cpu|auto) float32 8x1 0\.5: .*no speed is told"):
        linears.measure((64, 32), 4, "float32", 1, SETTINGS, {"onnxruntime": "no", "openvino": "no", "compile": "no"})


def test_no_speed_of_a_model_without_right_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "time_in_turns", _must_not_be_called)
    monkeypatch.setattr(encoders, "_switched", lambda whole, x, fused: whole(x) * 1.1)
    with pytest.raises(MismatchError, match=r"hf_sparse float32 0\.5: .*no speed is told"):
        _run([*ENCODER, *TORCH_ALONE], tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def _must_not_be_called(*_: Any, **__: Any) -> None:
    raise AssertionError("something wrong was timed")


def test_a_wrong_engine_of_another_maker_has_no_row_but_a_reason() -> None:
    right = {("eager", "float32"): torch.ones(2), ("onednn", "float32"): torch.ones(2)}
    found: dict[engines.Key, engines.Engine] = {
        ("eager", "float32"): lambda: torch.ones(2),
        ("onednn", "float32"): lambda: torch.full((2,), 1.01),
    }
    skipped: dict[str, str] = {}
    assert engines.check(found, right, skipped) == {("eager", "float32"): 0.0}
    assert list(found) == [("eager", "float32")]
    assert skipped["onednn float32"].startswith("wrong values: the largest error is 0.01")


def test_the_fused_encoder_is_switched_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    whole: Any = lambda x: seen.append(encoders.os.environ[encoders.ENV_ENCODER])  # noqa: E731
    for fused in ("off", "auto", "auto"):
        encoders._switched(whole, torch.zeros(1), fused)
    assert seen == ["off", "auto", "auto"]


def test_every_number_of_threads_has_its_own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(
        cpu.subprocess,
        "run",
        lambda command, check: started.append(command) or SimpleNamespace(returncode=len(started) - 1),
    )
    out = tmp_path / "out.json"
    out.write_text("{}")
    with pytest.raises(SystemExit, match="stopped with 2 threads; the same command goes on"):
        cpu.main(["encoder", "--threads", "1", "2", "--fresh", "--out", str(out)])
    assert not out.exists()
    threads = [cpu.parse(command[2:]).threads for command in started]
    assert threads == [[1], [2]]
    assert not any("--fresh" in command for command in started)
    assert {cpu.parse(command[2:]).command for command in started} == {
        "python benchmarks/cpu.py encoder --threads 1 2 --out OUT"
    }


def test_the_command_runs_as_a_script() -> None:
    command = [sys.executable, cpu.__file__, "linear", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "--tokens" in done.stdout


def test_presets() -> None:
    assert cpu.parse(["linear", "--quick"]).out.name == "cpu_linear_quick.json"
    full = cpu.parse(["encoder", "--full"])
    assert len(full.size) == 8 and full.threads == [1, 2] and full.out.name == "cpu_encoder.json"
    with pytest.raises(SystemExit):
        cpu.parse(["encoder", "--clock", "process"])
    with pytest.raises(SystemExit):
        cpu.parse(["linear", "--block", "8"])

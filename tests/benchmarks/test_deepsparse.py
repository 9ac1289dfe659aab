from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import against_deepsparse
from hf_sparse.inference.measuring.bench import MismatchError

LIMITS = {"seconds": 0.0, "rounds": 1, "clock": "wall"}
# What the modules of another environment give, as far as the script there asks.
FAKE = """
import sys, types, numpy

class Engine:
    cpu_avx_type = "avx512"
    def __init__(self, onnx, batch_size, num_cores):
        self.num_cores = num_cores
    def run(self, inputs):
        return [inputs[0] * FACTOR]

class Session:
    def __init__(self, onnx, options, providers):
        assert options.intra_op_num_threads == 2
    def run(self, names, given):
        return [given["x"]]

class SessionOptions:
    def add_session_config_entry(self, name, value):
        pass

sys.modules["deepsparse"] = types.SimpleNamespace(Engine=Engine, __version__="1.8.0")
sys.modules["onnxruntime"] = types.SimpleNamespace(
    InferenceSession=Session, SessionOptions=SessionOptions, __version__="1.0"
)
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python that has fakes of both packages."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAKE.replace("FACTOR", "1.0"))
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/site exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return program


def test_the_other_process_times_both_engines_and_gives_its_values(python: Path, tmp_path: Path) -> None:
    x = torch.randn(1, 4, 8)
    said = against_deepsparse.run_child(python, tmp_path / "model.onnx", x, 2, LIMITS)
    assert set(said["timings"]) == {"onnxruntime", "deepsparse"}
    assert said["timings"]["deepsparse"]["runs"] >= 1
    assert said["versions"] == {"deepsparse": "1.8.0", "onnxruntime": "1.0"}
    assert torch.equal(torch.from_numpy(against_deepsparse.numpy.load(tmp_path / "model.values.npy")), x)


def test_what_keeps_deepsparse_from_running_is_told(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho needs AVX2 >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(RuntimeError, match="DeepSparse did not run .*needs AVX2"):
        against_deepsparse.run_child(program, tmp_path / "model.onnx", torch.zeros(1), 1, LIMITS)


def test_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")

    def answer(factor: float) -> None:
        def run_child(python: Path, onnx: Path, x: torch.Tensor, threads: int, limits: dict) -> dict:
            import onnxruntime

            values = onnxruntime.InferenceSession(str(onnx)).run(None, {"x": x.numpy()})[0]
            against_deepsparse.numpy.save(onnx.with_suffix(".values.npy"), values * factor)
            timing = {"ms": 1.0, "spread": [1.0, 1.0], "runs": 1}
            return {"timings": {"onnxruntime": timing, "deepsparse": timing}, "versions": {"deepsparse": "1.8.0"}}

        monkeypatch.setattr(against_deepsparse, "run_child", run_child)

    answer(1.0)
    settings = {**LIMITS, "densities": [0.5]}
    cells = against_deepsparse.cells(["tiny"], [(1, 16)], 1, settings, tmp_path, Path("python"))
    assert [cell.name for cell in cells] == [
        "tiny 1x1 density 0.5 1x16 threads 1", "tiny 8x1 density 0.5 1x16 threads 1"
    ]  # fmt: skip
    rows, skipped = cells[1].measure()
    assert [(row["engine"], row["beside"]) for row in rows] == [
        (engine, beside)
        for beside, other in (("hf_sparse", "hf_sparse"), ("deepsparse", "deepsparse"))
        for engine in ("onnxruntime", other)
    ]
    assert not skipped and json.dumps(rows)
    answer(1.1)
    with pytest.raises(MismatchError, match="no speed is told"):
        cells[1].measure()


def test_the_ratio_is_of_times_over_the_onnxruntime_beside_them() -> None:
    times = {
        ("onnxruntime", "hf_sparse"): 10.0,
        ("hf_sparse", "hf_sparse"): 2.0,
        ("onnxruntime", "deepsparse"): 20.0,
        ("deepsparse", "deepsparse"): 12.0,
    }
    rows = [{"engine": engine, "beside": beside, "ms": ms} for (engine, beside), ms in times.items()]
    assert against_deepsparse.ratio(rows) == pytest.approx(3.0)

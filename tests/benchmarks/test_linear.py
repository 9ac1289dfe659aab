from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import linear
from hf_sparse.inference.bench import MismatchError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
KEYS = {"engine", "backend", "device", "dtype", "out_features", "in_features", "tokens", "block_shape", "density"}
KEYS |= {"threads", "clock", "ms", "spread", "runs", "max_error"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smoke(dtype: str, tmp_path: Path) -> None:
    out = linear.main(["--smoke", "--dtype", dtype, "--seconds", "0.01", "--out", str(tmp_path / "out.json")])
    result = json.loads(out.read_text())
    assert {"command", "commit", "hardware", "versions", "rows"} <= set(result)
    assert result["command"].startswith("python benchmarks/linear.py --smoke")
    assert all(set(row) == KEYS for row in result["rows"])
    engines = {row["engine"] for row in result["rows"]}
    assert {"nn.Linear", "auto", "torch"} <= engines
    assert len(result["rows"]) == len(engines) * 4
    assert all(row["ms"] > 0 and row["runs"] >= 5 for row in result["rows"])


def test_the_clock_of_the_process_is_for_one_thread(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        linear.main(["--clock", "process", "--threads", "2"])
    assert "use it with --threads 1" in capsys.readouterr().err


def test_no_speed_without_right_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "onednn", lambda dense, tokens: lambda x: dense(x) * 1.01)
    with pytest.raises(MismatchError, match="no speed is told"):
        linear.measure((64, 32), (8, 1), 0.2, 4, torch.float32, 0.0)


@pytest.mark.parametrize("file", sorted(RESULTS.glob("linear_cpu_*.json")), ids=lambda file: file.stem)
def test_committed_results_are_whole(file: Path) -> None:
    result = json.loads(file.read_text())
    assert result["versions"]["torch"]
    assert result["hardware"]["cpu"]
    assert len(result["rows"]) >= 4 * len(list(linear.cells(smoke=False)))

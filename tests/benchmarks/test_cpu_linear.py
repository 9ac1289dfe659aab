from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import cpu_linear
from hf_sparse.inference.bench import MismatchError
from hf_sparse.inference.kernels.cpu import status

pytestmark = pytest.mark.skipif(not status()[0], reason=status()[1])


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = cpu_linear.main(["--smoke", "--seconds", "0.01", "--out", str(tmp_path / "out.json")])
    result = json.loads(out.read_text())
    assert {"command", "kernels", "commit", "hardware", "versions", "rows"} <= set(result)
    engines = [row["engine"] for row in result["rows"]]
    assert engines.count("cpu") == 2 * 2 * 2 * 3 and engines.count("eager") == 8
    assert {tuple(row["block_shape"]) for row in result["rows"] if row["engine"] == "cpu"} == {
        (8, 1),
        (32, 32),
        (1, 8),
    }
    for row in result["rows"]:
        assert row["ms"] > 0 and row["runs"] >= 7 and row["spread"][0] <= row["ms"] <= row["spread"][1]
    printed = capsys.readouterr().out
    assert "bfloat16  0.1     1x8" in printed and "M=20" in printed


def test_no_speed_without_right_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "to_dense", lambda values, index: torch.zeros(index.layer.dense_shape))
    with pytest.raises(MismatchError, match="no speed is told"):
        cpu_linear.measure((64, 32), 4, torch.float32, [((8, 1), 0.5)], 0.0)


def test_the_summary_is_a_geometric_mean() -> None:
    row = {"engine": "cpu", "dtype": "float32", "nominal": 0.1, "block_shape": [8, 1], "tokens": 4}
    text = cpu_linear.summary([{**row, "speedup": 2.0}, {**row, "speedup": 8.0}, {"engine": "eager"}])
    assert text.endswith("4.00x")

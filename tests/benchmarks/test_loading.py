from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import loading
from benchmarks.models import load
from hf_sparse.inference.measuring.bench import MismatchError


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = loading.main(["--smoke", "--rounds", "3", "--out", str(tmp_path / "out.json")])
    result = json.loads(out.read_text())
    assert {"command", "clock", "commit", "hardware", "versions", "rows"} <= set(result)
    cells = [(row["what"], row["engine"]) for row in result["rows"]]
    assert cells == [(what, who) for what in ("load", "load_and_call") for who in ("dense", "hf_sparse")]
    for row in result["rows"]:
        assert row["spread"][0] <= row["ms"] <= row["spread"][1] and row["runs"] == 3
        assert row["fresh_ms"] > 0 and row["memory_mib"] > 0
    dense, packed = result["rows"][:2]
    assert packed["ratio"] == pytest.approx(packed["ms"] / dense["ms"], abs=1e-2)
    assert packed["bytes"] < dense["bytes"] and packed["block_shape"] == [8, 1]
    assert "load and first call" in capsys.readouterr().out


def test_no_time_without_right_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = loading.save_models(load("tiny"), tmp_path, [(8, 1)], [0.5])
    packed = list(facts)[1]
    inputs = loading.token_inputs([1], [4], 100)[0]
    assert loading.check(packed, inputs) < 1e-4
    dense = loading.load_dense

    def wrong(kind: object, folder: Path) -> object:
        model = dense(kind, folder)
        torch.nn.init.ones_(model.classifier.weight)
        return model

    monkeypatch.setattr(loading, "load_dense", wrong)
    with pytest.raises(MismatchError, match="no speed is told"):
        loading.check(packed, inputs)


def test_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, now = iter([100.0, 1.0, 2.0, 3.0]), [0.0]

    def call() -> None:
        now[0] += next(taken)

    monkeypatch.setitem(loading.CLOCKS, "test", lambda: now[0])
    assert loading.time_loads({"a": call}, rounds=3, clock="test") == {"a": (2000.0, [1500.0, 2500.0])}

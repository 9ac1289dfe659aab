"""The demo from end to end, small; and that its table tells the truth about numbers that lose."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.demo.results import notes, table_rows
from examples.demo.settings import SMOKE, Settings

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("demo")
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "COLUMNS": "160"}
    command = [sys.executable, "-m", "examples.demo", "--smoke", "--folder", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout, json.loads((folder / "results.json").read_text())


def test_smoke_writes_models_card_and_results(smoke: tuple[Path, str, dict[str, Any]]) -> None:
    folder, _, results = smoke
    assert (
        json.loads((folder / "model" / "config.json").read_text())["quantization_config"]["quant_method"]
        == "hf_sparse"
    )
    assert "quantization_config" not in json.loads((folder / "dense" / "config.json").read_text())
    card = (folder / "model" / "README.md").read_text()
    assert "docstring" in card and "make demo" in card and str(folder) not in card
    assert (folder / "model" / "tokenizer.json").is_file()
    assert results["command"] == "make demo ARGS=--smoke" and results["versions"]["torch"]
    assert results["settings"] == SMOKE.to_dict() and Settings.from_dict(results["settings"]) == SMOKE
    accuracy = results["accuracy"][-1]
    assert accuracy["sparsity"] == 0.8 and accuracy["block_shape"] == [8, 1] and accuracy["steps"] > 0
    assert {"task", "method", "seed", "score", "dense_score", "floor_score", "train_loss", "dev_loss"} <= set(accuracy)


def test_smoke_measures_what_a_fresh_process_loads(smoke: tuple[Path, str, dict[str, Any]]) -> None:
    folder, _, results = smoke
    assert 0.0 <= results["checks"]["logits_max_error"] < 1e-5
    assert results["checks"]["logits_rows"] == results["corpus"]["rows"]["test"] == 60
    assert results["measured_accuracy"]["pruned"] == pytest.approx(results["accuracy"][-1]["score"])
    assert results["measured_accuracy"]["dense"] == pytest.approx(results["accuracy"][-1]["dense_score"])
    for name in ("dense", "model"):
        size = (folder / name / "model.safetensors").stat().st_size
        assert results["bytes"]["pruned" if name == "model" else "dense"] == size
    assert [(row["engine"], row["batch"]) for row in results["speed"]] == [
        ("dense", 1), ("hf_sparse", 1), ("dense", 8), ("hf_sparse", 8),
    ]  # fmt: skip
    assert results["speed"][1]["density"] == pytest.approx(0.2, abs=0.01)


def test_smoke_prints_the_table_and_commands_that_work(smoke: tuple[Path, str, dict[str, Any]]) -> None:
    folder, printed, results = smoke
    for row in results["table"]:
        assert row["what"] in printed and row["ratio"] in printed
    commands = [line.strip() for line in printed.splitlines() if line.startswith("  ") and str(folder) in line]
    assert len(commands) == 3
    for command in commands:
        done = subprocess.run(shlex.split(command), cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, (command, done.stderr[-2000:])
        assert done.stdout.strip()


def measured(**changes: Any) -> dict[str, Any]:
    speed = [{"engine": name, "batch": 1, "length": 9, "ms": ms, "spread": [ms - 1, ms + 1]}
             for name, ms in (("dense", 10.0), ("hf_sparse", 20.0))]  # fmt: skip
    tried = {"sparsity": 0.8, "score": 0.7, "dense_score": 0.8, "floor_score": 0.5, "seed": 0, "block_shape": [8, 1]}
    return {
        "measured_accuracy": {"dense": 0.8, "pruned": 0.7},
        "bytes": {"dense": 4_000_000, "pruned": 1_000_000},
        "layer_bytes": {"dense": 3_000_000, "pruned": 500_000},
        "load": [{**row, "what": "load"} for row in speed],
        "speed": speed,
        "accuracy": [tried],
        "corpus": {"rows": {"test": 1200}, "versions": {"a": "1", "b": "1"}},
        "settings": Settings().to_dict(),
        "hardware": {"cpu": "a CPU", "threads": 2},
        "dense_engine": "torch",
        **changes,
    }


def test_rows_that_lose_say_so() -> None:
    rows = {row["what"]: row for row in table_rows(measured())}
    assert rows["latency, batch 1 x 9 tokens"] == {
        "what": "latency, batch 1 x 9 tokens", "dense": "10.0 ms (9.0-11.0)", "pruned": "20.0 ms (19.0-21.0)",
        "ratio": "2.00x slower",
    }  # fmt: skip
    assert rows["weights file"]["ratio"] == "4.00x smaller"
    assert rows["accuracy, 1,200 test sentences"]["ratio"] == "0.875"


def test_notes_own_up_to_a_fall_that_is_too_deep() -> None:
    said = " ".join(notes(measured()))
    assert "fell by 10.0%, more than the 2% allowed; there was no time left to try less" in said
    assert "Standard error of an accuracy: 1.2%; one seed (0)" in said
    assert "trained for 1 epoch, the pruned one for 2 epochs more" in said


def test_notes_say_why_less_was_pruned() -> None:
    first = measured()["accuracy"][0]
    said = " ".join(notes(measured(accuracy=[first, {**first, "sparsity": 0.7, "score": 0.79}])))
    assert "At 80% the accuracy fell to 70.0%, more than the 2% allowed, so less was pruned" in said
    assert "no time left" not in said and said.startswith("70% of the encoder's 8x1 blocks")

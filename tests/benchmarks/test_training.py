"""The benchmark of training steps: turns are taken in order, runs are checked before they count."""

from __future__ import annotations

import argparse
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks import passes
from benchmarks.layouts.training import passes_table, training_table
from benchmarks.training import (
    AT_ONCE,
    TINY,
    USUAL,
    VARIANTS,
    Turns,
    check,
    chosen,
    groups,
    make_trainer,
    measure,
    peak_memory,
)

ARGS = argparse.Namespace(device="cpu", smoke=True, only=None, **USUAL["smoke"])
BY_NAME = {variant.name: variant for variant in VARIANTS}


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    torch.manual_seed(0)
    student, teacher = (BertForSequenceClassification(BertConfig(**TINY)) for _ in range(2))
    return student, teacher


def test_turns_are_taken_one_at_a_time_in_an_order_that_moves_on() -> None:
    turns, seen, running = Turns(["a", "b", "c"], 3, torch.device("cpu")), [], []

    def take(name: str) -> None:
        while turns.wait(name):
            running.append(name)
            seen.append(name)
            assert len(running) == 1
            running.remove(name)
            turns.end(name, 1.0)

    threads = [threading.Thread(target=take, args=(name,)) for name in "cab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == list("abcbcacab")
    assert turns.taken == {name: [1e3] * 3 for name in "abc"}


def test_variants_are_timed_beside_their_baseline(models: Any) -> None:
    names = ["trainer + teacher", "logits, masks, penalty"]
    rows = measure([BY_NAME[name] for name in names], *models, ARGS)
    assert [row["name"] for row in rows] == names
    assert "ratio" not in rows[0]
    assert rows[1]["baseline"] == names[0] and rows[1]["ratio"] > 0
    assert rows[1]["ratio_spread"][0] <= rows[1]["ratio"] <= rows[1]["ratio_spread"][1]
    assert all(row["spread"][0] <= row["ms"] <= row["spread"][1] for row in rows)


def test_every_variant_has_a_baseline_without_hf_sparse() -> None:
    for variant in VARIANTS:
        if variant.settings is not None:
            assert BY_NAME[str(variant.baseline)].settings is None
    timed = [variant.name for group in groups(ARGS) for variant in group]
    assert sorted(timed) == sorted(BY_NAME)
    by_group = groups(argparse.Namespace(device="cpu", smoke=False, only=None))
    assert {variant.name for group in by_group for variant in group} == set(BY_NAME)
    for plain, *beside in by_group:
        assert 1 <= len(beside) <= AT_ONCE and {variant.baseline for variant in beside} == {plain.name}


def test_some_are_chosen_with_their_baselines() -> None:
    assert [variant.name for variant in chosen(["masks alone"])] == ["trainer", "masks alone"]
    with pytest.raises(ValueError, match="--only 'nothing': the trainers are"):
        chosen(["nothing"])
    pairs = groups(argparse.Namespace(device="cpu", smoke=False, only=["everything"]))
    assert [[v.name for v in pair] for pair in pairs] == [["trainer + teacher, hidden states", "everything"]]


def test_a_run_that_does_not_do_what_it_says_is_refused(models: Any) -> None:
    variant = BY_NAME["logits, masks, penalty"]
    trainer = make_trainer(variant, *models, ARGS)
    assert check(variant, trainer) == "loss_kd is None with a weight of 0.5"
    with torch.no_grad():
        trainer.model.classifier.weight.fill_(float("nan"))
    assert check(variant, trainer) == "weights are not finite"


def test_memory_counts_masks_and_coefficients(models: Any) -> None:
    found = peak_memory(BY_NAME["logits, masks, penalty"], *models, ARGS)
    blocks = 2 * (4 * 32 * 32 + 2 * 32 * 64) // 8
    assert found["blocks"] == blocks and found["coef_bytes"] == 4 * blocks
    assert found["mask_bytes"] == blocks // 8
    assert found["peak_bytes"] > 0


def test_the_table_keeps_ratios_above_the_goal() -> None:
    row = {"name": "logits", "ms": 1200.4, "spread": [1.0, 2.0], "baseline": "trainer + teacher", "ratio": 1.2345,
           "ratio_spread": [1.1, 1.3], "adds_ms": 230.2, "peak_bytes": 2_500_000_000, "blocks": 8,
           "mask_bytes": 1_300_000, "coef_bytes": 0}  # fmt: skip
    result = {
        "rows": [{"name": "trainer + teacher", "ms": 970.0, "spread": [1.0, 2.0]}, row], "command": "COMMAND",
        "settings": {"model": "BERT-base", "batch": 8, "length": 64, "precision": "float32", "block_shape": [8, 1],
                     "steps": 16},
        "hardware": {"cpu": "A CPU", "gpus": []}, "versions": {"torch": "2", "transformers": "5"},
    }  # fmt: skip
    lines = training_table(result).splitlines()
    assert lines[2] == "| trainer + teacher | 970 |  |  |  |  |  |  |"
    assert lines[3] == (
        "| logits | 1200 | trainer + teacher | 1.234 (1.100 to 1.300) | +230 ms | 2.50 GB | 1.3 MB |  |"
    )
    assert "A CPU" in lines[-1] and "`COMMAND`" in lines[-1]


def test_passes_are_compared_and_timed_both_ways(tmp_path: Path) -> None:
    if not passes.prune.fits(torch.ones(1, 1)):
        pytest.skip("the native kernels are not built here")
    passes.main(["--smoke", "--seconds", "0", "--threads", "1", "--out", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    found = [(row["task"], row["engine"]) for row in result["rows"]]
    tasks = ("masks", "penalty's gradient, masks", "proximal step, masks")
    assert found == [(task, engine) for task in tasks for engine in ("native", "torch")]
    assert all(row["ms"] > 0 and row["max_error"] <= passes.LIMIT for row in result["rows"])
    lines = passes_table(result).splitlines()
    assert lines[0] == "| pass | blocks | native, 1 thread | torch, 1 thread | ratio, 1 thread |"
    assert [line.split(" | ")[0] for line in lines[2:5]] == [f"| {task}" for task in tasks]


def test_passes_that_differ_have_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes.prune, "shrink_", lambda *args, **kwargs: torch.zeros(()))
    with pytest.raises(RuntimeError, match="proximal step, masks in blocks of .* weights differ by"):
        passes.difference([(16, 8)], (8, 1), "proximal step, masks")

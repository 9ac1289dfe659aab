"""Rows regrouped into bands: the same function, more of the score in the blocks kept."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification

from benchmarks import accuracy, regrouping
from benchmarks.grid.bands import group_rows
from benchmarks.grid.cell import Sources, train_cell
from benchmarks.grid.regrouping import draw_batches, find_orders, kept_scores, measure_scores, movables, regroup
from benchmarks.layouts.regrouping import regrouping_table

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from tiny_task import make_rows, write_model  # noqa: E402

NAMES = {"bad": "negative", "good": "positive"}


def make_model(heads: int = 2, layers: int = 2) -> BertForSequenceClassification:
    """A tiny model whose biases and norms are not the same for all channels."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": heads}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes))
    return shake(model).double().eval()


def shake(model: BertForSequenceClassification) -> BertForSequenceClassification:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    chance = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (count, 8, 10), generator=chance)
    mask = (torch.arange(10) < torch.randint(4, 11, (count, 8, 1), generator=chance)).long()
    labels = torch.randint(2, (count, 8), generator=chance)
    return [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids, mask, labels, strict=True)]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_regrouped_model_computes_the_same_from_other_rows(heads: int) -> None:
    model, batches = make_model(heads), make_batches()
    before = copy.deepcopy(model)
    scores = measure_scores(model, batches)
    orders = regroup(model, scores)
    for batch in batches:
        torch.testing.assert_close(model(**batch).logits, before(**batch).logits, rtol=1e-9, atol=1e-9)
    weights = {name: model.get_submodule(name).weight for name in orders}
    old = {name: before.get_submodule(name).weight for name in orders}
    assert len(orders) == 8
    for name, order in orders.items():
        assert order.sort().values.equal(torch.arange(len(order))) and not order.equal(order.sort().values)
        assert weights[name].equal(old[name][order])
    for rows, _, parts in movables(model):
        for name in rows:
            assert orders[name].equal(orders[rows[0]])
            # Channels stay in their head, and heads in their place.
            inside = orders[name].view(parts, -1) // (len(orders[name]) // parts)
            assert inside.equal(torch.arange(parts)[:, None].expand_as(inside))
    # Measured on the regrouped model, scores are those that the orders promise.
    kept = kept_scores(scores, 8, 0.9, orders)
    assert kept_scores(measure_scores(model, batches), 8, 0.9) == pytest.approx(kept, rel=1e-6)


def test_scores_are_squared_weights_times_mean_squared_gradients() -> None:
    model, batches = make_model().train(), make_batches(2)
    scores = measure_scores(model, batches)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert len(scores) == 12
    name, expected = "bert.encoder.layer.1.output.dense", 0.0
    weight = model.get_submodule(name).weight
    for batch in batches:
        expected += torch.autograd.grad(model.eval()(**batch).loss, weight)[0].square() / 2
    torch.testing.assert_close(scores[name], weight.detach().square() * expected)


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_regrouped_blocks_keep_more_and_single_weights_the_most(sparsity: float) -> None:
    model = make_model()
    scores = measure_scores(model, make_batches())
    kept = [
        kept_scores(scores, height, sparsity, orders)["all"]
        for height, orders in ((8, None), (8, find_orders(model, scores, 8, sparsity)), (1, None))
    ]
    assert kept[0] < kept[1] < kept[2] < 1.0


def test_bands_that_do_not_fit_into_heads_leave_them_as_they_are() -> None:
    model = make_model()  # of two heads of 16 channels
    orders = find_orders(model, measure_scores(model, make_batches()), 32)
    moved = {name for name, order in orders.items() if not order.equal(torch.arange(len(order)))}
    assert moved == {f"bert.encoder.layer.{i}.intermediate.dense" for i in (0, 1)}


def test_without_any_score_rows_stay() -> None:
    model = make_model()
    scores = {name: torch.zeros_like(score) for name, score in measure_scores(model, make_batches(1)).items()}
    assert all(order.equal(torch.arange(len(order))) for order in find_orders(model, scores).values())


def planted(bands: int, columns: int, height: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that need the columns of their group, a tenth of all, and little else; and which group is whose."""
    chance = torch.Generator().manual_seed(2)
    needed = (torch.rand(bands, columns, generator=chance) < 0.1).float()
    groups = torch.arange(bands).repeat_interleave(height)[torch.randperm(bands * height, generator=chance)]
    noise = torch.rand(bands * height, columns, generator=chance)
    return needed[groups] * (0.5 + noise) + 0.02 * noise, groups


@pytest.mark.parametrize(("bands", "height"), [(2, 8), (4, 8), (24, 8), (25, 4)])
def test_planted_groups_are_found_again(bands: int, height: int) -> None:
    profiles, groups = planted(bands, 128, height)

    def kept(order: torch.Tensor) -> float:
        held = profiles[order].unflatten(0, (-1, height)).sum(1).flatten()
        return float(held.topk(len(held) // 10).values.sum() / held.sum())

    lies, best = kept(torch.arange(len(groups))), kept(groups.argsort(stable=True))
    found = kept(group_rows(profiles / (0.25 * height), height))
    assert lies < 0.8 * best and found > lies + 0.95 * (best - lies)


def test_batches_are_the_same_each_time_and_leave_the_random_numbers_alone() -> None:
    rows = [{"n": i} for i in range(10)]

    def collate(some: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        return {"n": torch.tensor([row["n"] for row in some])}

    state = torch.get_rng_state()
    first, again = ([b["n"].tolist() for b in draw_batches(rows, collate, 3, 3)] for _ in range(2))
    assert first == again and [len(batch) for batch in first] == [3, 3, 3]
    assert len({n for batch in first for n in batch}) == 9
    assert torch.get_rng_state().equal(state)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("regrouping")
    for seed, (split, count) in enumerate((("train", 256), ("validation", 64))):
        made = [{"sentence": row["sentence"], "label": NAMES[row["label"]]} for row in make_rows(count, seed)]
        (folder / "data/sst2").mkdir(parents=True, exist_ok=True)
        Dataset.from_list(made).to_parquet(folder / f"data/sst2/{split}.parquet")
    found = Sources(model=str(write_model(folder / "model")), data=folder / "data", work=folder / "work")
    folder = write_model(found.dense("sst2"), with_head=True)
    shake(BertForSequenceClassification.from_pretrained(folder)).save_pretrained(folder)
    return found


def test_a_regrouped_cell_starts_as_the_dense_model_and_prunes_other_blocks(sources: Sources) -> None:
    grid = accuracy.load_grid(accuracy.GRID.with_name("accuracy_trainer.yaml"))
    grid["training"] = {**grid["training"], "logging_steps": 1, "bf16": False}
    grid |= {"tasks": {"sst2": {"max_length": 16, "epochs": 1, "train_rows": 256}}, "train_probe_rows": 32}
    entry = {"task": "sst2", "method": ["default", "default, regrouped"], "block": "8x1", "sparsity": 0.5, "seed": 1}
    plain, other = (train_cell(cell, grid, sources) for cell in accuracy.expand({**grid, "cells": [entry]}))
    assert "regroup" not in plain["settings"] and other["settings"]["regroup"] is True
    assert plain["sparsity_reached"] == other["sparsity_reached"] == 0.5
    for key in ("loss", "loss_task", "loss_kd", "loss_hidden"):
        # The same rows in the same order: nothing is pruned in the first step, and the teacher is the same, too.
        assert other["train"][0][key] == pytest.approx(plain["train"][0][key], abs=1e-4)
    # Far from what guessing costs, so that this says something.
    assert plain["train"][0]["loss_task"] > 0.8
    assert other["train"][-1]["loss"] != pytest.approx(plain["train"][-1]["loss"], rel=1e-3)


def test_the_command_measures_both_orders_of_both_heights(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = yaml.safe_load(accuracy.GRID.read_text(encoding="utf-8"))
    grid["tasks"]["sst2"]["train_rows"] = 96
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    monkeypatch.setattr(regrouping, "GRID", tmp_path / "grid.yaml")
    monkeypatch.setattr(regrouping, "TASKS", ("sst2",))
    out = tmp_path / "out.json"
    given = {"--model": sources.model, "--data": sources.data, "--dense": sources.work / "dense", "--out": out}
    regrouping.main([str(part) for pair in given.items() for part in pair])
    found = json.loads(out.read_text())
    assert {"command", "commit", "hardware", "versions"} <= set(found) and str(tmp_path) not in out.read_text()
    assert len(found["rows"]) == 4 * 5
    for row in found["rows"]:
        assert len(row["kept"]) == 7 and all(0.0 <= share <= 1.0 for share in row["kept"].values())


def test_orders_are_searched_by_other_scores_than_they_are_measured_by() -> None:
    model = make_model()
    searched, fresh = (measure_scores(model, make_batches(count)) for count in (1, 3))
    rows = {(row["height"], row["regrouped"]): row for row in regrouping.measure(model, searched, fresh, 0.9)}
    orders = find_orders(model, searched, 8, 0.9)
    found = rows[8, True]
    assert found["kept"]["all"] == pytest.approx(kept_scores(fresh, 8, 0.9, orders)["all"], abs=1e-4)
    assert found["kept_searched"] == pytest.approx(kept_scores(searched, 8, 0.9, orders)["all"], abs=1e-4)
    assert found["kept"]["all"] != pytest.approx(found["kept_searched"], abs=1e-3)
    assert found["kept"]["all"] < kept_scores(fresh, 8, 0.9, find_orders(model, fresh, 8, 0.9))["all"] - 1e-3


def test_bands_that_do_not_divide_the_linears_are_refused(sources: Sources) -> None:
    with pytest.raises(ValueError, match=r"height=12 does not divide the \d+ rows of bert\.encoder"):
        regroup(make_model(), measure_scores(make_model(), make_batches()), 12)
    grid = accuracy.load_grid(accuracy.GRID.with_name("accuracy_trainer.yaml"))
    entry = {"task": "sst2", "method": "default, regrouped", "block": "4x4", "sparsity": 0.5, "seed": 1}
    with pytest.raises(ValueError, match=r"regroup makes bands of rows for blocks of h x 1, not for 4 x 4"):
        train_cell(next(accuracy.expand({**grid, "cells": [entry]})), grid, sources)


def test_the_table_has_all_linears_at_each_sparsity_and_kinds_at_90() -> None:
    shapes = [(1, False, 0.9), (8, False, 0.7), (8, True, 0.8), (32, False, 0.6), (32, True, 0.75)]
    rows: list[dict[str, Any]] = [
        {"task": "qnli", "sparsity": s, "height": h, "regrouped": r, "kept": {"all": k, "output.dense": k - 0.1}}
        for s in (0.8, 0.9) for h, r, k in shapes
    ]  # fmt: skip
    lines = regrouping_table({"rows": rows}).splitlines()
    assert lines[0] == "| task, sparsity | linears | 1 x 1 | 8 x 1 | 8 x 1, regrouped | 32 x 1 | 32 x 1, regrouped |"
    assert lines[2] == "| QNLI, 80% | all | 90.0% | 70.0% | 80.0% | 60.0% | 75.0% |"
    assert lines[4] == "| QNLI, 90% | output.dense | 80.0% | 60.0% | 70.0% | 50.0% | 65.0% |"
    assert len(lines) == 5

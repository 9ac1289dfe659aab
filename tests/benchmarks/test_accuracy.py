"""The accuracy grid: its cells, what one of them measures, and that a stopped grid goes on where it was."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from benchmarks import accuracy
from benchmarks.grid.cell import Sources, floor_score, load_rows, scores, train_cell
from benchmarks.grid.energy import kept_energy

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from tiny_task import make_rows, write_model  # noqa: E402

GRID: dict[str, Any] = yaml.safe_load(accuracy.GRID.read_text(encoding="utf-8"))
NAMES = {"bad": "negative", "good": "positive"}


def small_grid(**changes: Any) -> dict[str, Any]:
    """The real grid's settings on a task that is learned in seconds."""
    training = {**GRID["training"], "logging_steps": 4, "bf16": False}
    tasks = {"sst2": {"max_length": 16, "epochs": 4, "train_rows": 200}}
    return {**GRID, "training": training, "tasks": tasks, "train_probe_rows": 50, **changes}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("accuracy")
    for seed, (split, count) in enumerate((("train", 256), ("validation", 96))):
        made = [{"sentence": row["sentence"], "label": NAMES[row["label"]]} for row in make_rows(count, seed)]
        (folder / "data/sst2").mkdir(parents=True, exist_ok=True)
        Dataset.from_list(made).to_parquet(folder / f"data/sst2/{split}.parquet")
    return Sources(model=str(write_model(folder / "model")), data=folder / "data", work=folder / "work")


def cell_of(method: str, sparsity: float, block: str = "8x1", seed: int = 1) -> dict[str, Any]:
    entry = {"task": "sst2", "method": method, "block": block, "sparsity": sparsity, "seed": seed}
    return next(accuracy.expand({**small_grid(), "cells": [entry]}))


@pytest.fixture(scope="module")
def dense(sources: Sources) -> dict[str, Any]:
    grid = small_grid()
    grid["methods"] = {**grid["methods"], "dense": {**grid["methods"]["dense"], "epochs": 30, "learning_rate": 3e-3}}
    return train_cell(cell_of("dense", 0.0), grid, sources)


@pytest.mark.parametrize("file", ["accuracy.yaml", "accuracy_trainer.yaml"])
def test_every_cell_of_the_committed_grids_is_a_valid_config(file: str) -> None:
    from hf_sparse import SparseDistillConfig

    grid = accuracy.load_grid(accuracy.GRID.with_name(file))
    cells = list(accuracy.expand(grid))
    assert cells and len({cell["name"] for cell in cells}) == len(cells)
    for cell in cells:
        known = ("start", "epochs", "movement", "model_config", "regroup")
        method = {k: v for k, v in grid["methods"][cell["method"]].items() if k not in known}
        height, width = cell["block"]
        shape = {"sparsity": cell["sparsity"], "block_height": height, "block_width": width}
        SparseDistillConfig(**{**grid["training"], **shape, **method}, output_dir="out", use_cpu=True)


def test_what_is_called_default_is_the_default() -> None:
    from hf_sparse import SparseDistillConfig

    grid = accuracy.load_grid(accuracy.GRID.with_name("accuracy_trainer.yaml"))
    named = SparseDistillConfig(**grid["methods"]["default"], output_dir="out", use_cpu=True)
    plain = SparseDistillConfig(output_dir="out", use_cpu=True)
    assert named.budget_scope == plain.budget_scope
    assert named.hidden_weight == plain.wanted_hidden_weight
    assert {**named.agreed_facts, "hidden_weight": None} == plain.agreed_facts
    # What the grid sets for all cells is no setting of the method, but for this: half as many updates.
    own = set(grid["training"]) & {"mask_updates", *named.agreed_facts}
    assert own == {"mask_updates", "hidden_weight"} and grid["training"]["mask_updates"] == plain.mask_updates // 2


def test_lists_are_multiplied_out_and_a_cell_stands_once() -> None:
    entry = {"task": "sst2", "method": ["agp", "agp+kd"], "block": ["8x1", "1x1"], "sparsity": 0.8, "seed": [1, 2]}
    cells = list(accuracy.expand({**GRID, "cells": [entry, {**entry, "method": "agp"}]}))
    assert len(cells) == 8
    assert cells[0] == {"task": "sst2", "method": "agp", "block": [8, 1], "sparsity": 0.8, "seed": 1,
                        "name": "sst2.agp.8x1.0.8.1", "stack": None}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [
    ({"method": "magic"}, "'magic' is none of the methods"),
    ({"task": "cola"}, "'cola' is none of the tasks"),
    ({"shape": "8x1"}, "has 'shape', which is none of"),
])  # fmt: skip
def test_a_cell_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    entry = {"task": "sst2", "method": "agp", "block": "8x1", "sparsity": 0.8, "seed": 1, **change}
    with pytest.raises(ValueError, match=message):
        list(accuracy.expand({**GRID, "cells": [entry]}))


def test_a_dense_cell_learns_and_leaves_its_model(sources: Sources, dense: dict[str, Any]) -> None:
    assert dense["train_rows"] == 200 and dense["dev_rows"] == 96 and dense["sparsity_reached"] == 0.0
    assert scores(dense)["last"] > 0.9
    assert (sources.dense("sst2") / "config.json").is_file()


def test_a_pruned_cell_starts_from_the_dense_model_and_records_its_course(
    sources: Sources, dense: dict[str, Any]
) -> None:
    found = train_cell(cell_of("recipe", 0.5), small_grid(evaluations=4), sources)
    assert found["sparsity_reached"] == 0.5 and found["steps"] == 28
    assert [at["step"] for at in found["dev"]] == [7, 14, 21, 28]
    assert [at["final_sparsity"] for at in found["dev"]] == [False, False, True, True]
    assert {"loss_task", "loss_kd", "loss_hidden", "sparsity"} <= set(found["train"][0])
    # From scratch the loss of the first steps would be that of guessing, 0.69.
    assert found["train"][0]["loss_task"] < 0.3
    summary = scores(found)
    assert summary["last"] == found["dev"][-1]["dev_accuracy"]
    assert summary["gap"] == pytest.approx(found["dev"][-1]["train_accuracy"] - summary["last"])


def test_movement_sums_weights_times_gradients_over_blocks() -> None:
    from types import SimpleNamespace

    import torch

    from benchmarks.grid.movement import MovementPruner
    from hf_sparse import SparseDistillConfig

    block = torch.nn.Sequential(torch.nn.Linear(2, 4, bias=False))
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([block, torch.nn.Sequential(torch.nn.Linear(2, 4))])})
    config = SparseDistillConfig(output_dir="out", block_height=2, block_width=1, sparsity=0.5, use_cpu=True)
    pruner = MovementPruner(model, config)
    weight, expected = block[0].weight, torch.zeros(2, 2)
    for step in (1.0, 2.0):
        for module in pruner.masks.targets.values():
            module.weight.grad = step * torch.arange(8.0).reshape(4, 2)
        expected -= (weight.detach() * weight.grad).reshape(2, 2, 2).sum(1)
        pruner.finish_backward(SimpleNamespace(penalty_weight=0.0))
    torch.testing.assert_close(pruner.moved["layers.0.0"], expected)
    with pytest.raises(ValueError, match="loss scaler"):
        pruner.finish_backward(SimpleNamespace(penalty_weight=0.0), torch.ones(()))


def test_a_cell_by_movement_ends_at_its_sparsity_with_other_blocks(sources: Sources, dense: dict[str, Any]) -> None:
    grid = small_grid()
    grid["methods"] = accuracy.load_grid(accuracy.GRID.with_name("accuracy_trainer.yaml"))["methods"]
    entry = {"task": "sst2", "method": ["movement", "recipe, no hidden states"], "block": "8x1", "sparsity": 0.5,
             "seed": 1}  # fmt: skip
    found = [train_cell(cell, grid, sources) for cell in accuracy.expand({**grid, "cells": [entry]})]
    assert [cell["sparsity_reached"] for cell in found] == [0.5, 0.5]
    losses = [[logs["loss"] for logs in cell["train"]] for cell in found]
    assert losses[0] != losses[1]


def test_a_method_may_change_the_model_and_the_cell_says_so(sources: Sources, dense: dict[str, Any]) -> None:
    grid = small_grid()
    usual = grid["methods"]["recipe"]
    grid["methods"]["dropout"] = {**usual, "model_config": {"hidden_dropout_prob": 0.5}}
    entry = {"task": "sst2", "method": ["recipe", "dropout"], "block": "8x1", "sparsity": 0.5, "seed": 1}
    usual, other = (train_cell(cell, grid, sources) for cell in accuracy.expand({**grid, "cells": [entry]}))
    assert "model_config" not in usual["settings"]
    assert other["settings"]["model_config"] == {"hidden_dropout_prob": 0.5}
    assert usual["train"][0]["loss"] != other["train"][0]["loss"]


def test_the_best_score_counts_only_at_full_sparsity() -> None:
    at = {"train_accuracy": 0.9, "dev_loss": 0.5, "train_loss": 0.4}
    dev = [{**at, "dev_accuracy": a, "final_sparsity": f} for a, f in ((0.9, False), (0.7, True), (0.6, True))]
    assert scores({"dev": dev}) == pytest.approx(
        {"last": 0.6, "best": 0.7, "train_last": 0.9, "gap": 0.3, "dev_loss": 0.5, "train_loss": 0.4}
    )


def test_the_floor_sees_words_but_no_order(sources: Sources) -> None:
    # One word gives the label away, and a mean of embeddings holds it.
    found = floor_score("sst2", small_grid()["tasks"]["sst2"], sources)
    assert found["accuracy"] > found["commonest"] + 0.15


def test_rows_are_limited_for_training_only(sources: Sources) -> None:
    from transformers import AutoTokenizer

    found = load_rows(
        "sst2", {"max_length": 6, "train_rows": 10}, sources, AutoTokenizer.from_pretrained(sources.model)
    )
    assert (len(found["train"]), len(found["dev"])) == (10, 96)
    assert found["truncated"] > 0.5 and max(map(len, found["dev"]["input_ids"])) == 6
    # The same task under another name.
    settings = {"data": "sst2", "max_length": 6, "train_rows": 20}
    more = load_rows("sst2-20", settings, sources, AutoTokenizer.from_pretrained(sources.model))
    assert (len(more["train"]), len(more["dev"])) == (20, 96)
    assert more["train"]["input_ids"][:10] == found["train"]["input_ids"][:]


def test_a_grid_goes_on_where_it_was_and_keeps_what_failed(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"task": "sst2", "method": "agp", "block": "8x1", "sparsity": [0.5, 0.6, 0.7], "seed": 1}
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({**small_grid(), "cells": [entry]}))
    there = Sources(model=sources.model, data=sources.data, work=tmp_path / "work")
    accuracy.write_json(there.work / "floors/sst2.json", {"accuracy": 0.5})
    accuracy.write_json(there.work / "cells/sst2.agp.8x1.0.5.1.json", {"name": "done before"})
    ran: list[str] = []

    class Done:
        returncode = 1

    def run(command: list[str], stdout: Any, **_: Any) -> Done:
        ran.append(command[command.index("--cell") + 1])
        stdout.write("ValueError: too little memory\n")
        stdout.flush()
        return Done()

    monkeypatch.setattr(accuracy.subprocess, "run", run)
    accuracy.run_grid(file, there)
    assert ran == ["sst2.agp.8x1.0.6.1", "sst2.agp.8x1.0.7.1"]
    found = accuracy.collect(there.work, file)
    assert [cell["name"] for cell in found["cells"]] == ["done before", *ran]
    assert found["cells"][1]["failed"] == "exit status 1: ValueError: too little memory"
    assert found["not_run"] == [] and found["floors"] == {"sst2": {"accuracy": 0.5}}


def test_dense_models_are_trained_before_what_starts_from_them(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, base = tmp_path / "grid.yaml", tmp_path / "base.yaml"
    entry = {"task": "sst2", "method": ["agp", "dense"], "block": "8x1", "sparsity": 0.5, "seed": [1, 2]}
    base.write_text(yaml.safe_dump({**small_grid(), "cells": []}))
    file.write_text(yaml.safe_dump({"base": "base.yaml", "training": {"learning_rate": 0.25}, "cells": [entry]}))
    there = Sources(model=sources.model, data=sources.data, work=tmp_path / "work")
    accuracy.write_json(there.work / "floors/sst2.json", {"accuracy": 0.5})
    running: list[str] = []

    def run(cell: dict[str, Any], *_: Any) -> None:
        running.append(cell["name"])
        assert cell["method"] == "dense" or len([name for name in running if ".dense." in name]) == 2
        time.sleep(0.05)

    monkeypatch.setattr(accuracy, "_run_in_process", run)
    accuracy.run_grid(file, there, workers=3)
    assert len(running) == len(set(running)) == 4
    read = accuracy.load_grid(file)
    assert read["training"] == {**small_grid()["training"], "learning_rate": 0.25}
    assert read["tasks"] == small_grid()["tasks"] and read["cells"] == [entry]


def test_a_cell_file_tells_where_it_came_from(sources: Sources, dense: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    entry = {"task": "sst2", "method": "agp", "block": "8x1", "sparsity": 0.5, "seed": 3}
    file.write_text(yaml.safe_dump({**small_grid(), "cells": [entry]}))
    accuracy.run_one("sst2.agp.8x1.0.5.3", file, sources, "the command")
    found = json.loads((sources.work / "cells/sst2.agp.8x1.0.5.3.json").read_text())
    assert {"command", "commit", "versions", "hardware", "seed", "wall_seconds", "cpu_seconds", "train", "dev", "last",
            "best", "gap", "settings"} <= set(found)  # fmt: skip
    assert found["settings"]["seed"] == 3 and found["command"] == "the command"


def test_more_energy_survives_where_inputs_count(sources: Sources, dense: dict[str, Any]) -> None:
    found = kept_energy("sst2", small_grid()["tasks"]["sst2"], sources)
    assert len(found) == 6
    for row in found.values():
        # What is kept is chosen by energy, so no other choice of as many blocks keeps more.
        assert 0.2 <= row["magnitude"] <= row["activation"] < 1.0
        assert row["input_rms_low"] <= row["input_rms_high"]

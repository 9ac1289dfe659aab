"""Benchmarks of cropping, int8 values and task runs: they work, and tell what they measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import cropping, int8_values, tasks
from benchmarks.layouts import tasks as task_tables
from hf_sparse import BlockSparseLinear
from hf_sparse.inference.exits.structure import croppable_layers
from tests.examples.conftest import EXAMPLES


def test_cropping_measures_both_variants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cropping.main(["--smoke", "--out", str(tmp_path / "cropping.json")])
    results = json.loads((tmp_path / "cropping.json").read_text())
    pairs = {(row["engine"], row["variant"]) for row in results["rows"]}
    assert {("eager", "zeros"), ("eager", "cropped")} <= pairs
    assert all(row["ms"] > 0 and row["max_error"] < 1e-4 for row in results["rows"])
    table = task_tables.cropping_table(results)
    assert table.count("| smoke | 50% | 100% | eager |") == 1 and "x |" in table


def test_what_is_cropped_is_dead() -> None:
    model = cropping.pruned_model("smoke", 0.5, 0.5)
    layer = croppable_layers(model)[0]
    assert int((layer.get("intermediate.dense").weight == 0).all(1).sum()) == 32
    assert int((layer.get("attention.self.value").weight == 0).all(1).sum()) == 16


def test_int8_rounds_every_row_by_its_own_scale() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 6) * torch.arange(1, 9)[:, None]
    mask = torch.rand(4, 6) < 0.6
    layer = BlockSparseLinear.from_dense(weight, mask, (2, 1))
    kept = layer.dense_weight()
    with torch.no_grad():
        layer.weight.copy_(int8_values.round_int8(layer))
    scale = kept.abs().amax(1, keepdim=True) / 127
    assert ((layer.dense_weight() - kept).abs() <= scale / 2 + 1e-6).all()
    steps = layer.dense_weight() / scale.clamp(min=1e-9)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert (layer.dense_weight() != kept).any()


RESULTS = {
    "all_results.json": {
        "eval_f1": 40.0, "dense_f1": 50.0, "train_loss": 1.5, "eval_loss": 2.0, "dense_loss": 1.75,
        "train_runtime": 60.0, "eval_exact_match": 30.0, "dense_exact_match": 35.0,
    },
    "trainer_state.json": {"global_step": 150},
    "hf_sparse_card.json": {
        "block_shape": [8, 1], "sparsity_reached": 0.5, "seed": 0, "file_bytes": 10_000_000,
        "dense_file_bytes": 20_000_000, "cost": {"hardware": "a machine"}, "versions": {"torch": "2.13.0"},
    },
}  # fmt: skip


def _as_perplexity(folder: Path) -> Path:
    results = {f"{side}_{metric}": 50.0 for side in ("eval", "dense") for metric in ("perplexity", "accuracy", "loss")}
    (folder / "all_results.json").write_text(json.dumps({**RESULTS["all_results.json"], **results}))
    return folder


def test_a_run_is_told_with_its_dense_baseline(tmp_path: Path) -> None:
    for name, content in RESULTS.items():
        (tmp_path / name).write_text(json.dumps(content))
    row = tasks.collect("qa50", tmp_path, floor=3.0)
    assert (row["score"], row["dense_score"], row["floor_score"], row["steps"]) == (40.0, 50.0, 3.0, 150)
    assert row["command"].startswith("python examples/run_qa.py") and row["command"].endswith("--output_dir WORK/qa50")
    table = task_tables.tasks_table({"command": "python benchmarks/tasks.py", "rows": [row]})
    told = (
        "| question answering, F1 | 50% | fisher, one budget | 3.0 | 50.0 | 40.0 | 1.750 | 2.000 | 20.00 -> 10.00 MB |"
    )
    assert told in table
    assert tasks.collect("clm80-layer", _as_perplexity(tmp_path), None)["method"] == "fisher, a budget for each layer"


@pytest.mark.parametrize("name", tasks.RUNS)
def test_every_command_is_one_that_its_script_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import run_clm
    import run_qa

    assert EXAMPLES.is_dir()
    script = {"qa": run_qa, "clm": run_clm}[tasks.task_of(name)]
    taken: list[object] = []
    monkeypatch.setattr(script, "run", lambda *parsed: taken.append(parsed))
    script.main([*tasks.RUNS[name].split()[1:], "--output_dir", "out"])
    assert len(taken) == 1

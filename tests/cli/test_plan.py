"""`hf-sparse plan`: the schedule as a plot, and what a model will weigh before anything is trained."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import hf_sparse
from hf_sparse import BlockMasks, SparseDistillConfig, compress, plan_step
from hf_sparse.core.estimate import estimate
from hf_sparse.hub.push import push_folder
from tests.hub.loopback_hub import WRITE_TOKEN, LoopbackHub
from tests.test_cli import Done, assert_refused
from tests.training.tiny import make_trainer, rows

Cli = Callable[..., Done]
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"sparsity": 0.75, "max_steps": 40, "graft_start": 0.5, "penalty_weight": 1e-4}))
    return file


def dense_folder(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**BERT, num_labels=3)).to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (4, 4), (1, 1)])
def test_the_size_is_that_of_the_model_once_it_is_pruned(
    cli: Cli, tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype, scope: str
) -> None:
    folder, file = dense_folder(tmp_path / "dense", dtype), tmp_path / "config.json"
    file.write_text(json.dumps({"sparsity_scope": scope, "max_steps": 1}))
    options = ("--block-height", shape[0], "--block-width", shape[1], "--sparsity", 0.8)
    expected = json.loads(cli("plan", file, "--model", folder, *options, "--json").out)["model"]
    model = BertForSequenceClassification.from_pretrained(folder, dtype=dtype)
    masks = BlockMasks.for_model(model, shape, scope)
    masks.choose(0.8)
    masks.apply_()
    compress(model, masks.state_dict()).save_pretrained(tmp_path / "small")
    found = json.loads(json.dumps(hf_sparse.report(tmp_path / "small").to_dict()))
    assert (expected["bytes"], expected["dense_bytes"]) == (found["bytes"], found["dense_bytes"])
    if scope == "layer":
        by_name = {layer["name"]: layer for layer in found["layers"]}
        assert {layer["name"]: layer for layer in expected["layers"]} == by_name
    if scope == "global":  # as nothing else was asked for
        assert json.loads(cli("plan", "--model", folder, *options, "--json").out) == {
            "steps": [],
            "scope": "global",
            "model": expected,
        }


def test_schedule_and_size_together(cli: Cli, config: Path, tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "dense")
    told = json.loads(cli("plan", config, "--model", folder, "--json").out)
    settings = SparseDistillConfig(output_dir=str(tmp_path), use_cpu=True, sparsity=0.75, graft_start=0.5,
                                   penalty_weight=1e-4)  # fmt: skip
    assert told["steps"] == [asdict(plan_step(settings, step, 40)) for step in range(40)]
    assert {layer["sparsity"] for layer in told["model"]["layers"]} == {0.75}
    table = cli("plan", config, "--model", folder).out
    assert "final sparsity 75.00%" in table
    assert f"whole model {told['model']['bytes']:,} of {told['model']['dense_bytes']:,} bytes" in table
    overridden = json.loads(cli("plan", config, "--model", folder, "--sparsity", 0.5, "--json").out)
    assert overridden["steps"][-1]["sparsity"] == 0.5
    assert {layer["sparsity"] for layer in overridden["model"]["layers"]} == {0.5}


def test_units_are_planned_as_they_are_trained(cli: Cli, tmp_path: Path) -> None:
    folder, file = dense_folder(tmp_path / "dense"), tmp_path / "hybrid.json"
    settings = {"preset": "hybrid", "block_height": 4, "block_width": 4, "sparsity": 0.5, "max_steps": 2}
    file.write_text(json.dumps(settings))
    told = json.loads(cli("plan", file, "--model", folder, "--json").out)["model"]
    model, data = BertForSequenceClassification.from_pretrained(folder), rows("classes", 8)
    trainer = make_trainer(model, tmp_path / "run", data, **settings)
    trainer.train()
    trainer.save_model(tmp_path / "small")
    found = json.loads(json.dumps(hf_sparse.report(tmp_path / "small").to_dict()))
    assert {layer["name"]: layer for layer in told["layers"]} == {layer["name"]: layer for layer in found["layers"]}
    assert {tuple(layer["block_shape"]) for layer in told["layers"]} == {(4, 4), (1, 16), (16, 1)}
    assert (told["bytes"], told["dense_bytes"]) == (found["bytes"], found["dense_bytes"])


def test_size_follows_targets_and_overrides(cli: Cli, config: Path, tmp_path: Path) -> None:
    settings = {"sparsity": 0.5, "max_steps": 3, "exclude_modules": ".*query",
                "block_overrides": json.dumps({".*key": [1, 8]})}  # fmt: skip
    config.write_text(json.dumps(settings))
    told = json.loads(cli("plan", config, "--model", dense_folder(tmp_path / "dense"), "--json").out)
    shapes = {layer["name"]: layer["block_shape"] for layer in told["model"]["layers"]}
    assert not [name for name in shapes if name.endswith("query")]
    assert {tuple(shape) for name, shape in shapes.items() if name.endswith("key")} == {(1, 8)}
    assert len({tuple(shape) for shape in shapes.values()}) == 2


def test_size_of_a_model_on_the_hub_without_its_weights(cli: Cli, hub: LoopbackHub, tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "dense")
    push_folder(folder, "tester/dense", token=WRITE_TOKEN)
    told = json.loads(cli("plan", "--model", "tester/dense", "--sparsity", 0.5, "--json").out)
    assert told == json.loads(cli("plan", "--model", folder, "--sparsity", 0.5, "--json").out)
    assert not [line for line in hub.requests if line.startswith("GET") and "safetensors" in line]


def test_a_layer_of_which_nothing_goes_is_stored_dense() -> None:
    layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(2))
    model = torch.nn.ModuleDict({"layer": layers})
    found = estimate(model, (8, 1), 0.0)
    assert found.bytes == found.dense_bytes == 2 * 4 * 72
    with pytest.raises(ValueError, match=r"sparsity=1.0 must be in \[0, 1\)"):
        estimate(model, (8, 1), 1.0)


def test_under_one_budget_the_sums_hold_and_no_layer_has_to_keep_a_block(cli: Cli, tmp_path: Path) -> None:
    folder, file = dense_folder(tmp_path / "dense"), tmp_path / "coarse.json"
    # Query and its kin have 4 blocks of 8 x 8, so that rounding leaves them none at 90 %.
    settings = {"block_height": 8, "block_width": 8, "sparsity": 0.9, "max_steps": 2, "layer_share": 0.0}
    file.write_text(json.dumps(settings))
    done = cli("plan", file, "--model", folder)
    assert done.out.endswith(
        "One budget for all layers: the sum holds, and training decides which layer keeps how much.\n"
    )
    told = json.loads(cli("plan", file, "--model", folder, "--json").out)["model"]
    assert min(layer["kept_blocks"] for layer in told["layers"]) == 0
    model = BertForSequenceClassification.from_pretrained(folder)
    trainer = make_trainer(model, tmp_path / "run", rows("classes", 8), **settings)
    trainer.train()
    kept = sum(int(mask.sum()) for mask in trainer.pruner.masks.masks.values())
    assert kept == sum(layer["kept_blocks"] for layer in told["layers"]) == 6
    del settings["layer_share"]
    for scope in ("auto", "layer"):
        file.write_text(json.dumps({**settings, "sparsity_scope": scope}))
        assert "would remove all of bert.encoder.layer.0" in cli("plan", file, "--model", folder).err
    file.write_text(json.dumps({**settings, "sparsity": 0.999, "layer_share": 0.0}))
    assert "would remove all blocks of the 12 target layers: lower it" in cli("plan", file, "--model", folder).err


def test_a_shared_budget_of_blocks_of_different_size(tmp_path: Path) -> None:
    layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)) for _ in range(3))
    model = torch.nn.ModuleDict({"layer": layers})
    shapes = {r".*\.0": (4, 8)}
    found = estimate(model, (1, 1), 0.8, shapes, scope="global")
    assert abs(sum(layer.kept_blocks * math.prod(layer.block_shape) for layer in found.layers) - 76.8) <= 16
    with pytest.raises(ValueError, match="would remove all of layer.0.0: it has 2 block"):
        estimate(model, (1, 1), 0.8, shapes, scope="global", layer_share=0.25)


@pytest.mark.parametrize(("name", "magic"), [("plan.png", b"\x89PNG"), ("plan.svg", b"<?xml")])
def test_plan_as_a_plot(cli: Cli, config: Path, tmp_path: Path, name: str, magic: bytes) -> None:
    done = cli("plan", config, "--plot", tmp_path / name, "--json")
    assert len(json.loads(done.out)) == 40
    assert done.err == f"{tmp_path / name} shows the schedule.\n"
    drawn = (tmp_path / name).read_bytes()
    assert drawn.startswith(magic)
    cli("plan", config, "--plot", tmp_path / f"again-{name}")
    if name.endswith(".png"):
        assert (tmp_path / f"again-{name}").read_bytes() == drawn


def test_plan_refuses(cli: Cli, config: Path, small: Path, tmp_path: Path) -> None:
    assert cli("plan").code == 2
    assert cli("plan", "--model", small, "--plot", "x.png").code == 2
    assert_refused(cli("plan", config, "--plot", tmp_path / "x.pdf"), "must end in .png or .svg")
    assert_refused(cli("plan", config, "--plot", tmp_path / "no" / "x.png"), "no is no folder")
    assert_refused(cli("plan", "--model", small), "small is compressed already")
    assert_refused(cli("plan", "--model", tmp_path / "nowhere"), "nowhere does not exist")
    dense = small.parent / "dense"
    one_block = ("--block-height", 16, "--block-width", 16)
    assert_refused(cli("plan", "--model", dense, *one_block), "would remove all of bert.encoder.layer.0")
    assert_refused(cli("plan", "--model", dense, "--sparsity", 1.5), "sparsity=1.5 must be")
    assert_refused(cli("plan", "--model", dense, "--block-height", 7), "does not divide the 16 output")


def test_a_folder_in_place_of_a_config_is_told_where_it_belongs(cli: Cli, tmp_path: Path) -> None:
    assert_refused(cli("plan", dense_folder(tmp_path / "dense")), "dense is a folder: .*; a model is named by --model")

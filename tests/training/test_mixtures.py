"""Mixtures of experts through the whole loop: pruned, distilled, stopped and resumed, saved, loaded, reported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_sparse import report
from hf_sparse.core.estimate import estimate
from hf_sparse.hub.masks import read_mask_maps
from hf_sparse.inference.compress import compressed_tensors
from tests.inference.models import assert_same as assert_close
from tests.inference.models import file_bytes
from tests.mixtures import EXPERTS, MIXTURES, expert_shapes, logits, mixture
from tests.training.tiny import Watch, assert_same, make_trainer, pruned_zero, rows, weights_of

RUN = {"sparsity": 0.75, "sparsity_scope": "layer", "sparsity_end": 0.6, "mask_updates": 3, "penalty_weight": 1e-3,
       "penalty_reweights": 2,
       "hidden_weight": 0.5, "graft_start": 0.5, "graft_end": 0.7, "max_steps": 6, "weight_decay": 0.1,
       "learning_rate": 1e-3, "logging_strategy": "steps", "logging_steps": 1}  # fmt: skip


def trainer_in(folder: Path, name: str, **changes: Any) -> Any:
    return make_trainer(mixture(name), folder, rows("lm", 16), **{**RUN, **changes})


@pytest.mark.parametrize("name", MIXTURES)
def test_the_whole_loop(name: str, tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run", name)
    zero = []
    trainer.add_callback(Watch(on_step_end=lambda state: zero.append(trainer.pruner.masks.is_applied())))
    promised = estimate(trainer.student, (4, 1), 0.75)
    trainer.train()
    assert all(zero) and pruned_zero(trainer)
    for full, (experts, rows_, cols) in expert_shapes(name).items():
        mask = trainer.pruner.masks.masks[full]
        assert mask.shape == (experts * rows_ // 4, cols)
        assert mask.logical_not().sum() == pytest.approx(0.75 * mask.numel(), abs=1)
    trainer.save_model(tmp_path / "final")
    model = trainer.student
    loaded, info = type(model).from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert set(compressed_tensors(loaded)[0]) == set(trainer.pruner.masks.targets)
    assert_close(logits(loaded), logits(model))
    told = report(tmp_path / "final")
    assert told.sparsity == pytest.approx(trainer.pruner.masks.sparsity)
    assert told.sparsity == pytest.approx(0.75, abs=0.01)
    assert told.bytes == pytest.approx(promised.bytes, abs=len(told.layers) * 4 * 4)
    assert told.bytes < 0.5 * told.dense_bytes
    header = int.from_bytes((tmp_path / "final" / "model.safetensors").read_bytes()[:8], "little") + 8
    assert file_bytes(tmp_path / "final") == told.bytes + header
    maps = {found.name: found for found in read_mask_maps(tmp_path / "final")}
    assert maps.keys() == trainer.pruner.masks.targets.keys()
    facts = json.loads((tmp_path / "final" / "hf_sparse_card.json").read_text())
    assert {layer["name"] for layer in facts["layers"]} >= set(expert_shapes(name))
    assert "mlp.experts" in (tmp_path / "final" / "README.md").read_text()


@pytest.mark.parametrize("importance", ["fisher", "magnitude"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_resumed_equals_straight_through(name: str, importance: str, tmp_path: Path) -> None:
    given = {"save_strategy": "steps", "save_steps": 1, "importance": importance, "optim": "adamw_torch"}
    straight = trainer_in(tmp_path / "a", name, **given)
    straight.train()
    for stop in (2, 4):
        torch.manual_seed(99)
        again = trainer_in(tmp_path / "b", name, **{**given, "save_strategy": "no"})
        again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
        assert_same(weights_of(straight.model), weights_of(again.model))
        assert_same(straight.pruner.masks.state_dict(), again.pruner.masks.state_dict())


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_resumed_with_an_optimizer_that_keeps_no_squares(tmp_path: Path, scope: str) -> None:
    given = {"save_strategy": "steps", "save_steps": 1, "optim": "sgd", "learning_rate": 0.1, "sparsity_scope": scope}
    straight = trainer_in(tmp_path / "a", "mixtral", **given)
    straight.train()
    again = trainer_in(tmp_path / "b", "mixtral", **{**given, "save_strategy": "no"})
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_same(weights_of(straight.model), weights_of(again.model))


def test_a_checkpoint_loads_by_itself(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, "mixtral", save_strategy="steps", save_steps=6)
    trainer.train()
    model = type(trainer.student).from_pretrained(tmp_path / "checkpoint-6")
    assert_same(weights_of(model), weights_of(trainer.student))
    told = {layer.name: layer.sparsity for layer in report(tmp_path / "checkpoint-6").layers}
    assert all(told[full] >= 0.74 for full in expert_shapes("mixtral"))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "a", "mixtral", save_strategy="steps", save_steps=2)
    trainer.train()
    folder = tmp_path / "a" / "checkpoint-2"
    # As `save_pretrained` writes it by itself: experts one by one, which `Trainer` would pass over with a warning.
    vars(trainer.student).pop("_weight_conversions", None)
    trainer.student.save_pretrained(folder)
    (folder / "checkpoint_complete.json").write_text('{"step": 2, "files": {}}')
    with pytest.raises(
        ValueError, match=r"the checkpoint lacks 6 weights of MixtralForCausalLM, model.layers.0.mlp.gate.weight first"
    ):
        trainer_in(tmp_path / "b", "mixtral").train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize("form", ["loss", "proximal"])
def test_both_forms_of_the_penalty_reach_experts(form: str, tmp_path: Path) -> None:
    norms = []
    for weight in (0.0, 0.1):
        trainer = trainer_in(tmp_path, "mixtral", sparsity=0.0, penalty_weight=weight, penalty_form=form,
                             penalty_reweights=0, optim="sgd", learning_rate=0.1)  # fmt: skip
        trainer.train()
        experts = [trainer.student.get_parameter(full).detach() for full in expert_shapes("mixtral")]
        norms.append(sum(weight.unflatten(1, (-1, 4)).norm(dim=2).sum().item() for weight in experts))
    assert norms[1] < 0.98 * norms[0]


def test_experts_left_out_stay_dense_and_of_version_1(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run", "mixtral", exclude_modules=r".*experts.*", block_height=8)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    config = json.loads((tmp_path / "final" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 1
    assert len(config["modules"]) == 8
    assert_close(logits(type(trainer.student).from_pretrained(tmp_path / "final")), logits(trainer.student))


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_compete_with_other_layers(name: str, tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run", name, sparsity_scope="auto")
    trainer.train()
    trainer.save_model(tmp_path / "final")
    masks = trainer.pruner.masks.masks
    total, kept = (sum(int(count(mask)) for mask in masks.values()) for count in (torch.numel, torch.sum))
    assert kept == total - int(0.75 * total + 0.5)
    for mask in masks.values():
        assert math.ceil(mask.numel() / 40) <= int(mask.sum()) <= mask.numel() * 37 // 40
    assert report(tmp_path / "final").sparsity == pytest.approx(0.75, abs=1 / total)
    assert_close(logits(type(trainer.student).from_pretrained(tmp_path / "final")), logits(trainer.student))


def test_blocks_of_their_own(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run", "mixtral", block_overrides='{".*experts.*": [-1, 1]}')
    trainer.train()
    parts, _ = EXPERTS["mixtral"]
    masks = trainer.pruner.masks.masks
    assert masks["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, parts["gate_up_proj"][2])
    trainer.save_model(tmp_path / "final")
    assert_close(logits(type(trainer.student).from_pretrained(tmp_path / "final")), logits(trainer.student))


def test_a_dense_save_is_one_that_plain_transformers_knows(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run", "qwen3_moe", save_format="dense")
    trainer.train()
    trainer.save_model(tmp_path / "final")
    assert "quantization_config" not in json.loads((tmp_path / "final" / "config.json").read_text())
    assert_close(logits(type(trainer.student).from_pretrained(tmp_path / "final")), logits(trainer.student))
    # There the experts are stored one by one.
    told = [layer for layer in report(tmp_path / "final").layers if ".experts." in layer.name]
    assert len(told) == 2 * 3 * 6
    assert sum(layer.kept_blocks for layer in told) == pytest.approx(
        0.25 * sum(layer.total_blocks for layer in told), rel=0.02
    )


def test_what_experts_read_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'importance="activation" cannot see .* model\.layers\.0\.mlp\.experts\.'):
        trainer_in(tmp_path, "mixtral", importance="activation")
    trainer_in(tmp_path, "mixtral", importance="activation", exclude_modules=".*experts.*").train()


def test_blocks_that_would_lie_in_two_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"experts\.down_proj: block_height=32 does not divide the 16 output rows"):
        trainer_in(tmp_path, "mixtral", block_overrides='{".*down_proj": [32, 1]}')

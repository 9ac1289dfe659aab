"""Contract 4: stop and resume equals straight through, bit for bit, and only a run that was begun is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_sparse import FormatError
from hf_sparse.training.checkpoints.checkpoint import STATE_FILE, load_state
from hf_sparse.training.checkpoints.whole import mark_whole
from tests.training.families import family_batch, family_model, family_rows
from tests.training.tiny import assert_same, bert, llama, make_trainer, pruned_zero, rows, weights_of

# Masks are chosen at steps 2, 4 and 6, coefficients at steps 0 and 3, layers grafted up to step 8 of 9.
RUN = {
    "max_steps": 9, "sparsity": 0.6, "sparsity_end": 0.66, "mask_updates": 3, "penalty_weight": 1e-3,
    "penalty_reweights": 2, "kd_weight": 0.5, "hidden_weight": 0.3, "attention_weight": 1.0, "graft_start": 0.4,
    "graft_end": 0.9, "optim": "adamw_torch", "weight_decay": 0.1, "max_grad_norm": 0.5,
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1,
}  # fmt: skip
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def trainer_in(folder: Path, model: Any = None, task: str = "classes", **changes: Any) -> Any:
    model = bert(**DROPOUT) if model is None else model
    # 20 samples: the run passes over them several times and stops in the middle of a pass.
    return make_trainer(model, folder, rows(task, 20), **{**RUN, **changes})


@pytest.fixture(scope="module")
def straight(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One run without a stop, with a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("straight")
    trainer = trainer_in(folder)
    trainer.train()
    return folder, weights_of(trainer.model), trainer.pruner.masks.state_dict()


# Before the first mask update, on either side of each, between reweightings, after pruning, at the last step.
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 6, 7, 8, 9])
def test_resumed_run_equals_straight_through(straight: Any, tmp_path: Path, stop: int) -> None:
    folder, weights, masks = straight
    torch.manual_seed(999 + stop)
    trainer = trainer_in(tmp_path, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
    assert_same(weights, weights_of(trainer.model))
    assert_same(masks, trainer.pruner.masks.state_dict())
    assert trainer.state.global_step == 9
    assert pruned_zero(trainer)


def test_a_chain_of_stops_equals_straight_through(straight: Any, tmp_path: Path) -> None:
    for stop in (2, 5):
        trainer = trainer_in(tmp_path)
        trainer.callback_handler.callbacks.append(StopAt(stop))
        with pytest.raises(RuntimeError, match="ended off target"):
            trainer.train(resume_from_checkpoint=None if stop == 2 else True)
    trainer = trainer_in(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert_same(straight[1], weights_of(trainer.model))


class StopAt:
    """A callback that ends training after a step, as a user's early stopping would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __getattr__(self, name: str) -> Any:
        def event(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if name == "on_step_end" and state.global_step == self.step:
                control.should_training_stop = control.should_save = True
            return control

        return event


@pytest.mark.parametrize("form", ["loss", "proximal"])
def test_a_causal_lm_resumes_with_either_form_of_the_penalty(tmp_path: Path, form: str) -> None:
    def run(folder: Path, **train: Any) -> Any:
        trainer = trainer_in(
            folder, llama(), "lm", max_steps=5, sparsity_end=0.6, penalty_form=form, sparsity_scope="global"
        )
        trainer.train(**train)
        return trainer

    first = run(tmp_path / "a")
    again = run(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_same(weights_of(first.model), weights_of(again.model))


def test_a_model_that_is_saved_under_other_names_resumes(tmp_path: Path) -> None:
    # transformers writes the layers of a ViT as its first checkpoints named them; `Trainer` would not find them again.
    def run(folder: Path, **train: Any) -> Any:
        trainer = make_trainer(
            family_model("vit"), folder, family_rows("vit", 20), extra={"data_collator": family_batch},
            **{**RUN, "max_steps": 5},
        )  # fmt: skip
        trainer.train(**train)
        return trainer

    first = run(tmp_path / "a")
    again = run(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert_same(weights_of(first.model), weights_of(again.model))


def test_weights_that_are_never_saved_may_be_missing(tmp_path: Path) -> None:
    model = bert()
    model._keys_to_ignore_on_save = ["bert.embeddings.position_embeddings.weight"]
    trainer = trainer_in(tmp_path, model)
    result = SimpleNamespace(missing_keys=["bert.embeddings.position_embeddings.weight"], unexpected_keys=[])
    trainer._issue_warnings_after_load(result)
    result.missing_keys.append("bert.pooler.dense.bias")
    with pytest.raises(ValueError, match=r"lacks 1 weights of BertForSequence\w+, bert\.pooler\.dense\.bias first"):
        trainer._issue_warnings_after_load(result)


def test_resuming_with_the_pruned_model_as_its_own_teacher_is_refused(straight: Any, tmp_path: Path) -> None:
    checkpoint = straight[0] / "checkpoint-8"
    model = type(bert()).from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=r"sparsity_state\.safetensors: teacher was '\w+', in this run it is '\w+'"):
        trainer_in(tmp_path, model).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_height": 8}, r"was pruned in blocks of \[4, 1\], this run asks for \[8, 1\].*block_height"),
        ({"block_overrides": '{".*query": [2, 2]}'}, r"query was pruned in blocks of \[4, 1\], .* \[2, 2\]"),
        ({"exclude_modules": ".*query"}, r"query is not a target layer of this run: target_modules or"),
        (
            {"target_modules": r".*(encoder.*dense|query|key|value|pooler\.dense)"},
            r"pooler\.dense is not a target layer of the checkpoint",
        ),
        # Pruned blocks never come back, so a lower target could not be met; known before hours of training.
        ({"sparsity": 0.3}, r"sparsity was 0\.6, in this run it is 0\.3"),
        ({"kd_weight": 0.4}, r"kd_weight was 0\.5, in this run it is 0\.4\. A resumed run must be set up as it was"),
        ({"penalty_weight": 0.0}, r"penalty_weight was 0\.001, in this run it is 0\.0"),
        ({"mask_updates": 4, "sparsity_end": 0.7}, r"sparsity_end was 0\.66.*; mask_updates was 3, in this run it"),
        ({"graft_start": 0.5}, r"graft_start was 0\.4"),
        (
            {"importance": "activation"},
            r"importance was 'fisher', in this run it is 'activation'; sparsity_scope was 'global', in .* 'layer'\.",
        ),
        ({"seed": 12}, r"seed was 11, in this run it is 12"),
        ({"sparsity_scope": "layer"}, r": sparsity_scope was 'global', in this run it is 'layer'"),
        ({"layer_share": 0.5}, r"layer_share was 0\.1, in this run it is 0\.5"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(straight: Any, tmp_path: Path, changes: Any, message: str) -> None:
    trainer = trainer_in(tmp_path, **changes)
    before = weights_of(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(straight[0] / "checkpoint-4"))
    assert_same(before, weights_of(trainer.model))


def test_what_does_not_change_a_step_may_change(straight: Any, tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, save_strategy="no", save_format="dense", logging_strategy="steps", logging_steps=1)
    trainer.train(resume_from_checkpoint=str(straight[0] / "checkpoint-4"))
    assert_same(straight[1], weights_of(trainer.model))


def test_another_length_is_said(straight: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_in(tmp_path, save_strategy="no", max_steps=10)
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=str(straight[0] / "checkpoint-4"))
    assert "The run was begun for 9 steps and is resumed for 10: sparsity" in caplog.text
    assert pruned_zero(trainer)


def test_a_checkpoint_of_the_model_alone_is_refused(straight: Any, tmp_path: Path) -> None:
    alone = copy_of(straight[0] / "checkpoint-4", tmp_path)
    (alone / "optimizer.pt").unlink()
    mark_whole(alone, 4, 1)
    for given in (str(alone), True):
        with pytest.raises(ValueError, match=r"checkpoint-4 holds no optimizer: it was written with save_only_model"):
            trainer_in(tmp_path).train(resume_from_checkpoint=given)


def test_data_without_a_length_are_said(straight: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for sized in (True, False):
        trainer = trainer_in(tmp_path / str(sized), save_strategy="no")
        if not sized:
            trainer.train_dataset = Dataset.from_list(trainer.train_dataset).to_iterable_dataset()
        with caplog.at_level("WARNING"):
            trainer.train(resume_from_checkpoint=str(straight[0] / "checkpoint-4"))
        assert ("The training data tell no length" in caplog.text) == (not sized)


def copy_of(checkpoint: Path, folder: Path) -> Path:
    target = folder / checkpoint.name
    target.mkdir()
    for file in checkpoint.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_plain_checkpoint_is_refused(straight: Any, tmp_path: Path) -> None:
    plain = copy_of(straight[0] / "checkpoint-4", tmp_path)
    (plain / STATE_FILE).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4 holds no sparsity_state\.safetensors"):
        trainer_in(tmp_path / "out").train(resume_from_checkpoint=str(plain))


def test_a_damaged_state_is_refused(straight: Any, tmp_path: Path) -> None:
    damaged = copy_of(straight[0] / "checkpoint-4", tmp_path)
    whole = (damaged / STATE_FILE).read_bytes()
    masks = trainer_in(tmp_path / "out").pruner.masks
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        (damaged / STATE_FILE).write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"sparsity_state\.safetensors is damaged"):
            load_state(damaged, masks, {})
    (damaged / STATE_FILE).write_bytes(whole)
    load_state(damaged, masks, {})


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_coefficients_that_do_not_fit_are_refused(straight: Any, tmp_path: Path, change: str) -> None:
    damaged = copy_of(straight[0] / "checkpoint-4", tmp_path)
    with safe_open(damaged / STATE_FILE, framework="pt") as handle:
        metadata, tensors = handle.metadata(), {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    name = next(key for key in tensors if key.endswith(".coef"))
    if change == "missing":
        del tensors[name]
    else:
        tensors[name if change == "shape" else "nowhere.coef"] = torch.ones(1, 1)
    save_file(tensors, damaged / STATE_FILE, metadata=metadata)
    trainer = trainer_in(tmp_path / "out")
    layer = "nowhere" if change == "unknown" else name.removesuffix(".coef")
    with pytest.raises(FormatError, match=f"is damaged: the coefficients of {layer} have shape .*, its grid is "):
        load_state(damaged, trainer.pruner.masks, {})


@pytest.mark.parametrize("state", [None, "not json", "[]", '{"version": 99}'])
def test_a_state_of_another_version_is_refused(straight: Any, tmp_path: Path, state: str | None) -> None:
    folder = copy_of(straight[0] / "checkpoint-4", tmp_path)
    tensors = load_file(folder / STATE_FILE)
    save_file(tensors, folder / STATE_FILE, metadata={"format": "pt"} | ({"hf_sparse_state": state} if state else {}))
    with pytest.raises(FormatError, match=r"sparsity_state\.safetensors (has version|is damaged)"):
        load_state(folder, trainer_in(tmp_path / "out").pruner.masks, {})


def test_a_share_that_is_not_known_is_not_taken_for_the_default(straight: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    folder = copy_of(straight[0] / "checkpoint-4", tmp_path)
    with safe_open(folder / STATE_FILE, framework="pt") as handle:
        state = json.loads(handle.metadata()["hf_sparse_state"])
    assert state.pop("layer_share") == 0.1 and "layer_share" not in state["facts"]
    save_file(load_file(folder / STATE_FILE), folder / STATE_FILE, metadata={"hf_sparse_state": json.dumps(state)})
    with pytest.raises(ValueError, match=r"layer_share was None, in this run it is 0\.1"):
        load_state(folder, trainer_in(tmp_path / "out").pruner.masks, {})


def test_a_checkpoint_from_before_there_was_a_choice_was_the_mean_squared_error(straight: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    folder = copy_of(straight[0] / "checkpoint-4", tmp_path)
    with safe_open(folder / STATE_FILE, framework="pt") as handle:
        state = json.loads(handle.metadata()["hf_sparse_state"])
    assert state["facts"].pop("hidden_form") == "relative"
    save_file(load_file(folder / STATE_FILE), folder / STATE_FILE, metadata={"hf_sparse_state": json.dumps(state)})
    masks = trainer_in(tmp_path / "out").pruner.masks
    with pytest.raises(ValueError, match=r"hidden_form was 'mse', in this run it is 'relative'"):
        load_state(folder, masks, {"hidden_form": "relative"})
    load_state(folder, masks, {"hidden_form": "mse"})


@pytest.mark.parametrize("missing", ["block_shapes", "scope", "facts"])
def test_a_state_with_a_part_missing_is_refused(straight: Any, tmp_path: Path, missing: str) -> None:
    from safetensors import safe_open

    folder = copy_of(straight[0] / "checkpoint-4", tmp_path)
    with safe_open(folder / STATE_FILE, framework="pt") as handle:
        state = json.loads(handle.metadata()["hf_sparse_state"])
    del state[missing]
    save_file(load_file(folder / STATE_FILE), folder / STATE_FILE, metadata={"hf_sparse_state": json.dumps(state)})
    with pytest.raises(FormatError, match=missing):
        load_state(folder, trainer_in(tmp_path / "out").pruner.masks, {})

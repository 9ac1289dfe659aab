"""What else Trainer offers, with pruning and distillation on: each works as it does there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import AutocastKwargs
from transformers import EarlyStoppingCallback

from hf_sparse import SparseDistillTrainer
from tests.training.tiny import (  # fmt: skip
    Watch,
    assert_same,
    bert,
    gradients_of,
    make_trainer,
    pad,
    pruned_zero,
    rows,
    sparse_config,
    weights_of,
)

ON = {
    "sparsity": 0.5, "sparsity_end": 0.5, "mask_updates": 2, "penalty_weight": 1e-2, "hidden_weight": 0.3,
    "graft_start": 0.5, "graft_end": 1.0,
}  # fmt: skip


def with_scaler(trainer: Any, scale: float, half: bool = False) -> torch.amp.GradScaler:
    """Give a trainer what fp16=True would bring: a loss scaler, and half precision if asked for.

    accelerate makes them for accelerators alone; all that uses them afterwards is its own code.
    """
    accelerator = trainer.accelerator
    accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    accelerator.autocast_handler = AutocastKwargs(enabled=half)
    return scaler


@pytest.mark.parametrize("form", ["loss", "proximal"])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_loss_scaler_changes_nothing(tmp_path: Path, form: str, clip: float) -> None:
    def run(scale: float | None) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor], Any]:
        trainer = make_trainer(bert(), tmp_path, rows("classes", 16), bert(5), **ON, penalty_form=form, max_steps=4,
                               optim="sgd", max_grad_norm=clip, per_device_train_batch_size=4,
                               gradient_accumulation_steps=2)  # fmt: skip
        scaler = with_scaler(trainer, scale) if scale else None
        seen = gradients_of(trainer)
        return seen, weights_of(trainer.model), scaler

    plain, scaled = run(None), run(2.0**10)
    assert scaled[2].get_scale() == 2.0**10
    for first, second in zip(plain[0], scaled[0], strict=True):
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6)
    for name, weight in plain[1].items():
        torch.testing.assert_close(scaled[1][name], weight, rtol=1e-5, atol=1e-7)


# Fused optimizers take part in the skipping, and accelerate does not hear of it.
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
@pytest.mark.parametrize("form", ["loss", "proximal"])
def test_a_step_that_the_scaler_skips_leaves_the_weights(tmp_path: Path, form: str, optim: str) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 16), bert(5), **ON, penalty_form=form, max_steps=6,
                           optim=optim)  # fmt: skip
    scaler = with_scaler(trainer, 4.0)
    after: list[dict[str, torch.Tensor]] = [weights_of(trainer.model)]

    original = trainer.pruner.finish_backward

    def overflow(plan: Any, scale: Any) -> Any:
        if plan.step == 2:
            trainer.model.classifier.weight.grad[0, 0] = float("inf")
        return original(plan, scale)

    trainer.pruner.finish_backward = overflow
    trainer.add_callback(Watch(on_step_end=lambda state: after.append(weights_of(trainer.model))))
    trainer.train()
    assert scaler.get_scale() == 2.0, "one step was skipped, and the scale halved"
    assert_same(after[2], after[3])
    assert not torch.equal(after[3]["classifier.weight"], after[4]["classifier.weight"])
    assert pruned_zero(trainer)


def test_fp16_autocast_with_a_loss_scaler(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 16), bert(5), **ON, max_steps=6, optim="sgd")
    scaler = with_scaler(trainer, 2.0**10, half=True)
    seen: list[torch.dtype] = []
    trainer.model.register_forward_hook(lambda m, i, out: seen.append(out.hidden_states[-1].dtype))
    half: list[torch.dtype] = []
    linear = trainer.model.bert.encoder.layer[0].intermediate.dense
    linear.register_forward_hook(lambda m, i, out: half.append(out.dtype))
    trainer.train()
    assert set(half) == {torch.float16} and seen
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
    assert scaler.get_scale() == 2.0**10 and pruned_zero(trainer)
    plain = make_trainer(bert(), tmp_path, rows("classes", 16), bert(5), **ON, max_steps=6, optim="sgd")
    plain.train()
    assert_same(plain.pruner.masks.state_dict(), trainer.pruner.masks.state_dict())
    for name, weight in weights_of(plain.model).items():
        torch.testing.assert_close(weights_of(trainer.model)[name], weight, rtol=1e-2, atol=1e-3)


def test_samples_grouped_by_length(tmp_path: Path) -> None:
    def lengths_of(**given: Any) -> list[list[int]]:
        seen: list[list[int]] = []

        def collate(batch: Any) -> dict[str, torch.Tensor]:
            seen.append([len(row["input_ids"]) for row in batch])
            return pad(batch)

        trainer = make_trainer(bert(), tmp_path, rows("classes", 64), **ON, max_steps=8, **given,
                               extra={"data_collator": collate})  # fmt: skip
        trainer.train()
        assert pruned_zero(trainer)
        return seen

    def spread(batches: list[list[int]]) -> int:
        return sum(max(batch) - min(batch) for batch in batches[:8])

    assert spread(lengths_of(train_sampling_strategy="group_by_length")) < spread(lengths_of()) * 0.6


class RunsOut(SparseDistillTrainer):
    """Runs out of memory with more than 4 samples, as a GPU would."""

    sizes: list[int]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.sizes = [*getattr(self, "sizes", []), len(inputs["input_ids"])]
        if len(inputs["input_ids"]) > 4:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


def test_auto_find_batch_size_begins_anew_with_fewer_samples(tmp_path: Path) -> None:
    given = {**ON, "max_steps": 5, "auto_find_batch_size": True}
    config = sparse_config(tmp_path, **given, per_device_train_batch_size=8)
    trainer = RunsOut(bert(), config, data_collator=pad, train_dataset=rows("classes", 16), teacher_model=bert(5))
    trainer.train()
    size = trainer.sizes[-1]
    assert trainer.sizes[0] == 8 and size <= 4 and trainer.state.global_step == 5
    assert pruned_zero(trainer)
    direct = make_trainer(bert(), tmp_path, rows("classes", 16), bert(5), **{**given, "auto_find_batch_size": False},
                          per_device_train_batch_size=size)  # fmt: skip
    direct.train()
    assert_same(weights_of(direct.model), weights_of(trainer.model))
    assert_same(direct.pruner.masks.state_dict(), trainer.pruner.masks.state_dict())


@pytest.mark.parametrize("given_teacher", [False, True])
def test_hyperparameter_search(tmp_path: Path, given_teacher: bool) -> None:
    pytest.importorskip("optuna")
    made: list[Any] = []
    reached: list[tuple[tuple[int, float], tuple[int, int], float, bool]] = []

    def init() -> Any:
        made.append(bert())
        return made[-1]

    config = sparse_config(tmp_path, **ON, max_steps=4, eval_strategy="steps", eval_steps=4)
    trainer: Any = SparseDistillTrainer(
        args=config, model_init=init, data_collator=pad, train_dataset=rows("classes", 16),
        eval_dataset=rows("classes", 8), teacher_model=bert(5) if given_teacher else None,
    )  # fmt: skip

    def look(state: Any) -> None:
        masks, asked = trainer.pruner.masks, (trainer.args.block_height, trainer.args.sparsity)
        shape = masks.block_shapes["bert.encoder.layer.0.output.dense"]
        reached.append((asked, shape, masks.sparsity, pruned_zero(trainer)))

    trainer.add_callback(Watch(on_train_end=look))

    def space(trial: Any) -> dict[str, Any]:
        return {"block_height": trial.suggest_categorical("block_height", [4, 8]),
                "sparsity": trial.suggest_categorical("sparsity", [0.25, 0.75]),
                "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)}  # fmt: skip

    best = trainer.hyperparameter_search(space, n_trials=6, backend="optuna", direction="minimize")
    assert set(best.hyperparameters) == {"block_height", "sparsity", "learning_rate"}
    assert len(reached) == 6
    for (height, asked), shape, found, zero in reached:
        assert shape == (height, 1), "the masks are those of this trial and not of the one before"
        assert found == pytest.approx(asked, abs=0.01) and zero
    assert len({asked for asked, *_ in reached}) > 1
    assert trainer.pruner.masks.targets["bert.encoder.layer.0.output.dense"] is (
        made[-1].bert.encoder.layer[0].output.dense
    )


def test_a_search_that_leaves_what_is_allowed_says_so(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    trainer: Any = SparseDistillTrainer(
        args=sparse_config(tmp_path, **ON, max_steps=2), model_init=lambda: bert(), data_collator=pad,
        train_dataset=rows("classes", 8), eval_dataset=rows("classes", 8),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"sparsity=1\.5 must be a number in \[0, 1\)"):
        trainer.hyperparameter_search(
            lambda trial: {"sparsity": trial.suggest_float("sparsity", 1.5, 1.5)}, n_trials=1, backend="optuna"
        )


def test_early_stopping_waits_for_the_target(tmp_path: Path) -> None:
    # The metric is best at the first evaluation, when nothing is pruned yet: patience counts from the target on, which
    # is reached before the fifth step.
    scores = iter([9.0, 1.0, 1.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    metric: Callable[[Any], dict[str, float]] = lambda _: {"score": next(scores)}  # noqa: E731
    trainer = make_trainer(
        bert(), tmp_path, rows("classes", 16), **{**ON, "sparsity_end": 0.4}, max_steps=8, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="score",
        greater_is_better=True, extra={"eval_dataset": rows("classes", 8), "compute_metrics": metric,
        "callbacks": [EarlyStoppingCallback(early_stopping_patience=2)]},
    )  # fmt: skip
    trainer.train()
    assert pruned_zero(trainer)
    assert trainer.state.global_step == 7
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-5")

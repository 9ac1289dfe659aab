"""Stages inside one run: the learning rate and the optimizer start anew, and what is frozen stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_sparse.training.stages import restart_step
from tests.training.tiny import Watch, assert_same, bert, make_trainer, rows, weights_of

# 10 steps, the second stage begins at step 6.
RUN = {"max_steps": 10, "lr_restart": 0.6, "learning_rate": 1.0, "max_grad_norm": 0.0, "optim": "sgd", "sparsity": 0.0,
       "kd_weight": 0.0}  # fmt: skip


def rates_of(folder: Path, **changes: Any) -> list[float]:
    """The learning rate of every step."""
    trainer = make_trainer(bert(), folder, rows("classes", 24), **{**RUN, **changes})
    seen: list[float] = []
    trainer.add_callback(Watch(on_step_begin=lambda state: seen.append(trainer.optimizer.param_groups[0]["lr"])))
    trainer.train()
    return seen


def test_the_learning_rate_starts_anew_from_its_peak(tmp_path: Path) -> None:
    expected = [1 - k / 6 for k in range(6)] + [1 - k / 4 for k in range(4)]
    assert rates_of(tmp_path) == pytest.approx(expected)
    assert rates_of(tmp_path, lr_restart=0.0) == pytest.approx([1 - k / 10 for k in range(10)])


def test_each_stage_warms_up(tmp_path: Path) -> None:
    expected = [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0.5, 1, 0.5]
    assert rates_of(tmp_path, warmup_steps=2) == pytest.approx(expected)


def test_a_schedule_with_settings_of_its_own_restarts_as_well(tmp_path: Path) -> None:
    kind = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 0.1}}
    expected = [0.9 * (1 - k / n) ** 2 + 0.1 for n in (6, 4) for k in range(n)]
    assert rates_of(tmp_path, **kind) == pytest.approx(expected)


def test_a_schedule_that_watches_the_metric_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 24), extra={"eval_dataset": rows("classes", 8)},
                           lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", **RUN)  # fmt: skip
    with pytest.raises(ValueError, match=r"lr_restart=0\.6 needs a learning rate that follows from the step alone"):
        trainer.train()


@pytest.mark.parametrize(("fraction", "steps", "expected"), [
    (0.5, 9, 5), (0.55, 100, 55), (0.999, 10, 9), (0.0, 10, None), (0.5, 1, None),
])  # fmt: skip
def test_restart_step(fraction: float, steps: int, expected: int | None) -> None:
    assert restart_step(fraction, steps) == expected


@pytest.mark.parametrize("reset", [False, True])
def test_the_optimizer_forgets_what_it_gathered_only_if_asked(tmp_path: Path, reset: bool) -> None:
    run = {**RUN, "optim": "adamw_torch", "learning_rate": 0.01, "reset_optimizer": reset}
    trainer = make_trainer(bert(), tmp_path, rows("classes", 24), **run)
    counts: list[int] = []

    def count(state: Any) -> None:
        counts.append(int(next(iter(trainer.optimizer.state.values()))["step"]))

    trainer.add_callback(Watch(on_step_end=count))
    trainer.train()
    assert counts == ([1, 2, 3, 4, 5, 6, 1, 2, 3, 4] if reset else list(range(1, 11)))


@pytest.mark.parametrize("stop", [5, 6, 7])
def test_resumed_around_the_restart_equals_straight_through(tmp_path: Path, stop: int) -> None:
    run = {**RUN, "optim": "adamw_torch", "learning_rate": 0.01, "sparsity": 0.5, "reset_optimizer": True,
           "train_only_layers": True, "save_strategy": "steps", "save_steps": 1, "warmup_steps": 1}  # fmt: skip
    straight = make_trainer(bert(), tmp_path / "straight", rows("classes", 20), **run)
    straight.train()
    torch.manual_seed(999)
    resumed = make_trainer(bert(), tmp_path / "resumed", rows("classes", 20), **{**run, "save_strategy": "no"})
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{stop}"))
    assert_same(weights_of(straight.model), weights_of(resumed.model))


def test_only_layers_are_trained_and_the_rest_is_in_no_optimizer(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 24), **{**RUN, "train_only_layers": True})
    before = weights_of(trainer.model)
    trainer.train()
    after = weights_of(trainer.model)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    layers = [name for name in before if name.startswith("bert.encoder.layer.")]
    # The gradient of the biases of keys is zero, up to rounding.
    assert [name for name in layers if "key.bias" not in name] == [name for name in moved if "key.bias" not in name]
    assert set(moved) <= set(layers)
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(layers)


def test_a_model_without_layers_cannot_train_only_them(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has no stack of repeated layers: set train_only_layers=False"):
        make_trainer(model, tmp_path, rows("classes", 8), train_only_layers=True, sparsity=0.0, kd_weight=0.0)

"""Contract 2: the same samples give the same gradient, however they are split into micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_sparse.training.schedules import graft_draws, plan_step
from tests.training.scenarios import TASKS, everything_on, model_for
from tests.training.tiny import Watch, arguments, gradients_of, make_trainer, pad, rows, t5


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor], where: str) -> None:
    assert list(first) == list(second), f"{where}: not the same parameters have gradients"
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{where} {n}: {m}"
        )


@pytest.mark.parametrize("task", TASKS)
def test_gradient_does_not_depend_on_the_split(tmp_path: Path, task: str) -> None:
    whole = gradients_of(everything_on(task, tmp_path, 8, 1))
    assert len(whole) == 3
    for per_device, accumulate in ((4, 2), (2, 4), (1, 8))[: 3 if task in ("classes", "lm") else 2]:
        parts = gradients_of(everything_on(task, tmp_path, per_device, accumulate))
        for step, (first, second) in enumerate(zip(whole, parts, strict=True)):
            assert_close(first, second, f"{per_device} x {accumulate}, step {step}")


def test_the_ragged_samples_of_these_tests_would_show_a_wrong_weighting() -> None:
    # The mean of means over halves differs from the mean over all: without that the tests above could not fail.
    model, data = model_for("tagging", 0).eval(), rows("tagging", 8)
    with torch.no_grad():
        whole = model(**pad(data)).loss
        halves = (model(**pad(data[:4])).loss + model(**pad(data[4:])).loss) / 2
    assert (whole - halves).abs() > 1e-4


def test_seq2seq_gradient_does_not_depend_on_the_split(tmp_path: Path) -> None:
    losses = {"kd_weight": 0.5, "hidden_weight": 0.3, "attention_weight": 1.0, "graft_start": 0.5, "graft_end": 1.0}

    def run(per_device: int, accumulate: int) -> list[dict[str, Tensor]]:
        return gradients_of(make_trainer(
            t5(0), tmp_path, rows("seq2seq", 16), t5(5), **losses, max_steps=2, optim="sgd", max_grad_norm=0.0,
            per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulate,
        ))  # fmt: skip

    whole, parts = run(8, 1), run(2, 4)
    for step, (first, second) in enumerate(zip(whole, parts, strict=True)):
        assert_close(first, second, f"step {step}")


def test_a_short_last_step_counts_what_it_holds(tmp_path: Path) -> None:
    # 10 samples in micro-batches of 4, 2 per step: the second step is one micro-batch of 2.
    def run(per_device: int, accumulate: int) -> list[dict[str, Tensor]]:
        trainer = make_trainer(
            model_for("tagging", 0), tmp_path, rows("tagging", 10), model_for("tagging", 5), sparsity=0.0,
            max_steps=-1, num_train_epochs=1, optim="sgd", max_grad_norm=0.0,
            per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulate,
        )  # fmt: skip
        return gradients_of(trainer)

    whole, parts = run(8, 1), run(4, 2)
    assert len(whole) == len(parts) == 2
    assert_close(whole[1], parts[1], "the last step")


def test_a_micro_batch_without_any_label_adds_nothing(tmp_path: Path) -> None:
    data = rows("lm", 8)
    for row in data[3:5]:
        row["labels"] = [-100] * len(row["labels"])

    def run(per_device: int, accumulate: int) -> list[dict[str, Tensor]]:
        return gradients_of(make_trainer(
            model_for("lm", 0), tmp_path, data, model_for("lm", 5), sparsity=0.0, max_steps=1, optim="sgd",
            max_grad_norm=0.0, per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulate,
        ))  # fmt: skip

    whole, parts = run(8, 1), run(1, 8)
    assert_close(whole[0], parts[0], "labels of -100 alone")


@pytest.mark.parametrize("task", ["classes", "tagging", "lm"])
def test_distilling_without_labels_does_not_depend_on_the_split(tmp_path: Path, task: str) -> None:
    data = [{key: value for key, value in row.items() if key != "labels"} for row in rows(task, 8)]

    def run(per_device: int, accumulate: int) -> list[dict[str, Tensor]]:
        return gradients_of(make_trainer(
            model_for(task, 0), tmp_path, data, model_for(task, 5), sparsity=0.0, task_weight=0.0, kd_weight=1.0,
            max_steps=1, optim="sgd", max_grad_norm=0.0, per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulate,
        ))  # fmt: skip

    whole, parts = run(8, 1), run(2, 4)
    assert_close(whole[0], parts[0], "no labels")


def test_logged_losses_do_not_depend_on_the_split(tmp_path: Path) -> None:
    def run(per_device: int, accumulate: int) -> list[dict[str, float]]:
        trainer = everything_on("tagging", tmp_path, per_device, accumulate, logging_strategy="steps", logging_steps=2)
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    for first, second in zip(run(8, 1), run(2, 4), strict=True):
        assert first == pytest.approx(second, rel=1e-4)


def test_plain_trainer_does_depend_on_it() -> None:
    # The known trap that contract 2 guards against; if this stops failing upstream, share.py can become simpler.
    def norm(per_device: int, accumulate: int) -> float:
        given = arguments("unused", optim="sgd", max_grad_norm=0.0, max_steps=1)
        del given["block_height"]
        given |= {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulate}
        trainer: Any = Trainer(model_for("classes", 0), TrainingArguments(**given), pad, rows("classes", 8))
        norms: list[float] = []

        def keep(state: Any) -> None:
            norms.append(sum(p.grad.square().sum() for p in trainer.model.parameters()).sqrt().item())

        trainer.add_callback(Watch(on_pre_optimizer_step=keep))
        trainer.train()
        return norms[0]

    assert norm(2, 4) > 2 * norm(8, 1)


def test_the_runs_of_these_tests_graft_penalise_and_prune(tmp_path: Path) -> None:
    trainer = everything_on("classes", tmp_path, 8, 1)
    plans = [plan_step(trainer.args, step, 3) for step in range(3)]
    draws = [graft_draws(plan.graft_prob, 2, trainer.args.seed, plan.step) for plan in plans]
    assert any(plan.update_masks for plan in plans)
    assert sum(plan.penalty_weight > 0 for plan in plans) == 2
    assert {True, False} <= {draw for step in draws for draw in step}

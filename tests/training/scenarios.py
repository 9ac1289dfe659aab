"""Runs that several tests share: one task each, every loss and every kind of pruning on."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tests.training.tiny import bert, gpt2, llama, make_trainer, pad, pad_to_10, rows, weights_of

TASKS = ("classes", "multi_label", "regression", "tagging", "qa", "mlm", "lm", "gpt2")

# One mask update in the middle, one reweighting before and one after the first step, half the layers grafted.
ALL_ON = {
    "sparsity": 0.5, "sparsity_end": 0.5, "mask_updates": 1, "penalty_weight": 1e-2, "penalty_reweights": 2,
    "task_weight": 0.7, "kd_weight": 0.4, "hidden_weight": 0.3, "attention_weight": 2.0, "graft_start": 0.5,
    "graft_end": 1.0,
}  # fmt: skip


def model_for(task: str, seed: int) -> Any:
    """A tiny model for a task of `rows`."""
    if task == "lm":
        return llama(seed)
    if task == "gpt2":
        return gpt2(seed)
    if task == "mlm":
        return bert(seed, "MaskedLM")
    if task == "tagging":
        return bert(seed, "TokenClassification")
    if task == "qa":
        return bert(seed, "QuestionAnswering", num_labels=2)
    settings = {"regression": {"num_labels": 1}, "multi_label": {"problem_type": "multi_label_classification"}}
    return bert(seed, **settings.get(task, {}))


def everything_on(task: str, folder: Path | str, per_device: int, accumulate: int, **changes: Any) -> Any:
    """A trainer over 3 steps of 8 ragged samples each, split as asked; SGD, so that a wrong scale shows."""
    settings = {**ALL_ON, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.05, "max_steps": 3, **changes}
    return make_trainer(
        model_for(task, 0), folder, rows(task, 24), model_for(task, 5),
        extra={"data_collator": pad_to_10 if task == "qa" else pad},
        per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulate, **settings,
    )  # fmt: skip


def wider_teacher(folder: Path | str, per_device: int) -> dict[str, Any]:
    """Student and projections after 3 steps of 8 samples with a wider and deeper teacher."""
    trainer = make_trainer(
        bert(0), folder, rows("classes", 24), bert(5, hidden_size=24, num_hidden_layers=4), sparsity=0.5,
        hidden_weight=0.7, layer_map="uniform", max_steps=3, optim="sgd", per_device_train_batch_size=per_device,
    )  # fmt: skip
    trainer.train()
    return {"student": weights_of(trainer.student), "maps": weights_of(trainer.distiller.projections)}


def begin_process() -> None:
    """Set a process up for a run: one thread, no progress bars or notes, and libraries that stay for good.

    accelerate has garbage looked for at the start of every training run; among half a million objects of the
    libraries that takes a quarter of a second.
    """
    torch.set_num_threads(1)
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    gc.freeze()

"""The terms of a training step: task loss and distillation losses, weighted, and their means for the log."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_sparse.training.config import SparseDistillConfig
from hf_sparse.training.distill import attention_loss, hidden_loss, logits_loss, logits_unit, output
from hf_sparse.training.distributed import sum_over_ranks, world_size


def distillation_terms(
    student: Any,
    teacher: Any,
    inputs: Mapping[str, Any],
    model_config: Any,
    config: SparseDistillConfig,
    shifted: bool,
) -> dict[str, tuple[Tensor, str]]:
    """Compute the distillation losses that a config asks for, unweighted.

    Args:
        student, teacher: model outputs.
        inputs: what both were called with.
        model_config: the student's own config.
        config: weights and temperature.
        shifted: whether position i predicts label i + 1.

    Returns:
        Any of "loss_kd", "loss_hidden", "loss_attention": a scalar, and of what it is a mean (`share.UNITS`).

    Raises:
        ValueError: if a model does not return what a loss needs.
    """
    terms = {}
    if config.kd_weight:
        loss = logits_loss(student, teacher, inputs, model_config, config.kd_temperature, shifted)
        terms["loss_kd"] = loss, logits_unit(student, inputs)
    if config.hidden_weight:
        pairs = _pairs(student, teacher, "hidden_states", inputs, "hidden_weight")
        terms["loss_hidden"] = torch.stack([hidden_loss(s, t, mask) for s, t, mask in pairs]).sum(), "samples"
    if config.attention_weight:
        pairs = _pairs(student, teacher, "attentions", inputs, "attention_weight")
        terms["loss_attention"] = torch.stack([attention_loss(s, t, mask) for s, t, mask in pairs]).sum(), "samples"
    return terms


def weighted_sum(
    terms: Mapping[str, tuple[Tensor, str]],
    config: SparseDistillConfig,
    shares: Mapping[str, Tensor | None],
    means: RunningMeans,
) -> Tensor:
    """Add up the terms of one micro-batch, each with its weight and its share of the step, and record them.

    Args:
        terms: {"loss_task" and the like: a scalar, and of what it is a mean (`share.UNITS`)}, at least one.
        config: has a weight for each: "task_weight" for "loss_task".
        shares: {unit: the micro-batch's share of the step}; None = 1.
        means: takes the unweighted terms.
    """
    weighted = []
    for name, (term, unit) in terms.items():
        weight, share = getattr(config, f"{name.removeprefix('loss_')}_weight"), shares[unit]
        # A share of 1 is left out, so that one micro-batch gives the plain loss to the last bit. Where nothing counts
        # (labels of -100 alone) the mean is NaN, and adds nothing.
        if share is not None:
            term = torch.where(share > 0, term * share.to(term.dtype), 0.0)
        means.add(name, term)
        weighted.append(term if weight == 1.0 else weight * term)
    return functools.reduce(torch.add, weighted)


class RunningMeans:
    """Means over the steps since they were last read, kept on the device so that no step waits for it."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, name: str, value: Tensor) -> None:
        """Add to the running step's total of `name`; the parts of one step sum up."""
        value = value.detach().float()
        self._totals[name] = self._totals[name] + value if name in self._totals else value

    def end_step(self) -> None:
        """Count one optimizer step."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Give the means over steps and ranks, and start anew. Waits for the device."""
        steps, totals, self._steps, self._totals = max(self._steps, 1), self._totals, 0, {}
        if not totals:
            return {}
        means = sum_over_ranks(torch.stack(list(totals.values()))) / (steps * world_size())
        return dict(zip(totals, means.tolist(), strict=True))


def _pairs(student: Any, teacher: Any, kind: str, inputs: Mapping[str, Any], field: str) -> list[tuple[Any, Any, Any]]:
    # Encoder-decoder models return one set for each side, with a padding mask of its own.
    sides = [
        (kind, "attention_mask"),
        (f"encoder_{kind}", "attention_mask"),
        (f"decoder_{kind}", "decoder_attention_mask"),
    ]
    pairs = []
    for name, mask in sides:
        mine, theirs = output(student, name), output(teacher, name)
        if mine and theirs and all(x is not None for x in (*mine, *theirs)):
            real = inputs.get(mask)
            if real is None and name.startswith("decoder_") and inputs.get("labels") is not None:
                # Without a mask of its own the decoder reads the labels shifted by one: padding is where they end.
                real = inputs["labels"] != -100
            pairs.append((mine, theirs, real))
    if not pairs:
        raise ValueError(f"{field} needs {kind}, but student or teacher does not return them: set {field}=0.")
    return pairs

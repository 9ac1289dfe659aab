"""The terms of a training step: task loss and distillation losses, weighted, and their means for the log."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_sparse.training.config import SparseDistillConfig
from hf_sparse.training.distillation.distill import attention_loss, hidden_loss
from hf_sparse.training.distillation.layerwise import compared_layers
from hf_sparse.training.distillation.predictions import prediction_loss, prediction_unit
from hf_sparse.training.distillation.projections import HiddenProjections
from hf_sparse.training.distributed import sum_over_ranks, world_size


def distillation_terms(
    student: Any,
    teacher: Any,
    inputs: Mapping[str, Any],
    model_config: Any,
    config: SparseDistillConfig,
    shifted: bool,
    hidden: bool | None,
    projections: HiddenProjections | None = None,
) -> dict[str, tuple[Tensor, str]]:
    """Compute the distillation losses that a config asks for, unweighted.

    Args:
        student, teacher: model outputs.
        inputs: what both were called with.
        model_config: the student's own config.
        config: weights and temperature.
        shifted: whether position i predicts label i + 1.
        hidden: whether hidden states are compared; None = in no batch, False = not in this one, whose term is 0.
        projections: make the student's hidden states as wide as the teacher's; None where they are.

    Returns:
        Any of "loss_kd", "loss_hidden", "loss_attention": a scalar, and of what it is a mean (`share.UNITS`).

    Raises:
        ValueError: if a model does not return what a loss needs.
    """
    terms = {}
    if config.kd_weight:
        temperature, pooling = config.kd_temperature, config.embedding_pooling
        loss = prediction_loss(student, teacher, inputs, model_config, temperature, shifted, pooling)
        terms["loss_kd"] = loss, prediction_unit(student, inputs)
    if hidden:
        sides = compared_layers(student, teacher, inputs, "hidden_states", "hidden_weight", config.teacher_layers)
        maps = [None if projections is None else projections.get(x.name) for x in sides]
        form = config.hidden_form
        losses = [hidden_loss(x.student, x.teacher, x.mask, m, form) for x, m in zip(sides, maps, strict=True)]
        terms["loss_hidden"] = torch.stack(losses).sum(), "samples"
    elif hidden is False:
        # In its place, so that all ranks log the same terms in the same order.
        terms["loss_hidden"] = torch.zeros_like(terms["loss_kd"][0].detach()), "samples"
    if config.attention_weight:
        sides = compared_layers(student, teacher, inputs, "attentions", "attention_weight", config.teacher_layers)
        losses = [attention_loss(x.student, x.teacher, x.mask) for x in sides]
        terms["loss_attention"] = torch.stack(losses).sum(), "samples"
    return terms


def weighted_sum(
    terms: Mapping[str, tuple[Tensor, str]],
    weight_of: Callable[[str], float],
    shares: Mapping[str, Tensor | None],
    means: RunningMeans,
) -> Tensor:
    """Add up the terms of one micro-batch, each with its weight and its share of the step, and record them.

    Args:
        terms: {"loss_task" and the like: a scalar, and of what it is a mean (`share.UNITS`)}, at least one.
        weight_of: gives the weight of each: of "task" for "loss_task".
        shares: {unit: the micro-batch's share of the step}; None = 1.
        means: takes the unweighted terms.
    """
    weighted = []
    for name, (term, unit) in terms.items():
        weight, share = weight_of(name.removeprefix("loss_")), shares[unit]
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

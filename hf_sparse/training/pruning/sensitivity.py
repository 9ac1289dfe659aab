"""How much the loss minds a change of each weight: running means of squared gradients (the diagonal of the Fisher).

Adam and its kin keep them anyway, and theirs are taken: nothing is stored or computed twice. For an optimizer that
keeps none they are kept here, by the same rule, for as long as masks are still chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_sparse.core.structure.experts import Prunable
from hf_sparse.core.structure.targets import oriented
from hf_sparse.training.distributed import is_sharded

DECAY = 0.999  # Adam's usual beta2


class SquaredGradients:
    """Running means of the squared gradients of some weights.

    Args:
        targets: {name: linear or fused experts}.

    Attributes:
        own: {name: mean, in the weight's shape} of those that the optimizer does not keep.
        steps: {name: scalar}, how many gradients are in it.
    """

    def __init__(self, targets: Mapping[str, Prunable]) -> None:
        self.targets = targets
        self.own: dict[str, Tensor] = {}
        self.steps: dict[str, Tensor] = {}

    @torch.no_grad()
    def watch(self, optimizer: Any, moved: Tensor | None = None) -> None:
        """Take a step's gradients in: after the optimizer has used them, before they are dropped.

        Args:
            optimizer: what moves the weights.
            moved: whether it did, a bool scalar (a loss scaler skips steps that overflow); None = yes.

        Raises:
            ValueError: if means would have to be kept of sharded weights.
        """
        for name, module in self.targets.items():
            weight = cast(Tensor, module.weight)
            if weight.grad is None or _kept_by(optimizer, weight) is not None:
                continue
            if is_sharded(weight):
                raise no_means_of_shards(type(getattr(optimizer, "optimizer", optimizer)).__name__)
            square = weight.grad.float().square()
            old = self.own[name].to(square.device) if name in self.own else torch.zeros_like(square)
            steps = self.steps[name].to(square.device) if name in self.steps else square.new_zeros(())
            # Without the factor (1 - DECAY), which is the same for all: only ratios matter.
            new = DECAY * old + square
            self.own[name] = new if moved is None else torch.where(moved, new, old)
            self.steps[name] = steps + (1.0 if moved is None else moved.to(steps.dtype))

    @torch.no_grad()
    def means(self, optimizer: Any) -> dict[str, Tensor]:
        """Give the means as [O, I], or as a scalar for a linear that has had no gradient yet.

        Such a linear counts as sensitive as the others are on average; before the first gradients all count the same.
        What the optimizer keeps and what is kept here differ by a common factor, so one run uses one of them. Means
        start from zero: one that has seen fewer gradients than others (of a layer that the teacher stood in for) is
        made up for that, as Adam does in its own steps.

        Args:
            optimizer: what moves the weights; None before there is one.

        Returns:
            {name: [O, I] or scalar, >= 0}.
        """
        found: dict[str, Tensor] = {}
        filled = self._filled(optimizer)
        fullest = max(filled.values(), default=1.0)
        for name, module in self.targets.items():
            weight = cast(Tensor, module.weight)
            square = _kept_by(optimizer, weight)
            # What only skipped steps have been seen for is still all zeros.
            square = self.own[name] if square is None and name in self.own and name in filled else square
            if square is not None:
                square = oriented(module, square.to(weight.device))
                part = filled.get(name, fullest)
                found[name] = square if part == fullest else square * (fullest / part)
        average = torch.stack([square.float().mean() for square in found.values()]).mean() if found else None
        missing = [name for name in self.targets if name not in found]
        for name in missing:
            weight = cast(Tensor, self.targets[name].weight)
            found[name] = torch.ones((), device=weight.device) if average is None else average.to(weight.device)
        return {name: found[name] for name in self.targets}

    def _filled(self, optimizer: Any) -> dict[str, float]:
        """How much of each mean is there, in (0, 1]: 1 - decay^steps; without those of which it is not known."""
        groups = [] if optimizer is None else optimizer.param_groups
        decays = {
            id(weight): float(group["betas"][1])
            for group in groups if len(group.get("betas") or ()) == 2 for weight in group["params"]
        }  # fmt: skip
        steps, logs = {}, {}
        for name, module in self.targets.items():
            weight = cast(Tensor, module.weight)
            kept = None if optimizer is None else optimizer.state.get(weight, {}).get("step")
            if name in self.steps:
                steps[name], logs[name] = self.steps[name], math.log(DECAY)
            elif (
                _kept_by(optimizer, weight) is not None
                and kept is not None
                and 0.0 < decays.get(id(weight), 0.0) < 1.0
            ):
                steps[name], logs[name] = torch.as_tensor(kept), math.log(decays[id(weight)])
        # One answer of the device for all of them.
        device = next((step.device for step in steps.values() if step.device.type != "cpu"), torch.device("cpu"))
        counts = torch.stack([step.float().to(device) for step in steps.values()]).tolist() if steps else []
        return {
            name: -math.expm1(count * log)
            for (name, log), count in zip(logs.items(), counts, strict=True) if count >= 1.0
        }  # fmt: skip


def keeps_means(optimizer_class: Any, settings: Mapping[str, Any], device: torch.device) -> bool | None:
    """Find out whether an optimizer keeps the means itself, by letting it move a weight of its own.

    Args:
        optimizer_class: called with a list of one parameter and the settings.
        settings: keyword arguments.
        device: where it will work.

    Returns:
        Whether it does; None if it cannot be tried, because it wants a whole model or another device.

    Example:
        >>> [keeps_means(kind, {}, torch.device("cpu")) for kind in (torch.optim.AdamW, torch.optim.SGD)]
        [True, False]
    """
    weight = nn.Parameter(torch.ones(2, 2, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        optimizer = optimizer_class([weight], **settings)
        optimizer.step()
    except Exception:  # noqa: BLE001 (optimizers of anybody: what this one wants is not known here)
        return None
    return _kept_by(optimizer, weight) is not None


def no_means_of_shards(optimizer: str) -> ValueError:
    """Say that an optimizer leaves Fisher information under FSDP2 without what it reads, and the ways out.

    Args:
        optimizer: its name.
    """
    return ValueError(
        f"importance='fisher' under FSDP2 reads the second moments that Adam keeps, and {optimizer} keeps none: use "
        f"optim='adamw_torch', importance='magnitude' or 'activation', or DDP."
    )


def _kept_by(optimizer: Any, weight: Tensor) -> Tensor | None:
    state = {} if optimizer is None else optimizer.state.get(weight, {})
    square = state.get("exp_avg_sq")
    # Some optimizers keep something else under the same name.
    usable = isinstance(square, Tensor) and square.shape == weight.shape and square.is_floating_point()
    return cast(Tensor, square) if usable else None

"""How much the loss minds a change of each weight: running means of squared gradients (the diagonal of the Fisher).

Adam and its kin keep them anyway, and theirs are taken: nothing is stored or computed twice. For an optimizer that
keeps none they are kept here, by the same rule, for as long as masks are still chosen.
"""

from __future__ import annotations

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
    """

    def __init__(self, targets: Mapping[str, Prunable]) -> None:
        self.targets = targets
        self.own: dict[str, Tensor] = {}

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
            # Without the factor (1 - DECAY), which is the same for all: only ratios matter.
            new = DECAY * old + square
            self.own[name] = new if moved is None else torch.where(moved, new, old)

    @torch.no_grad()
    def means(self, optimizer: Any) -> dict[str, Tensor]:
        """Give the means as [O, I], or as a scalar for a linear that has had no gradient yet.

        Such a linear counts as sensitive as the others are on average; before the first gradients all count the same.
        What the optimizer keeps and what is kept here differ by a common factor, so one run uses one of them.

        Args:
            optimizer: what moves the weights; None before there is one.

        Returns:
            {name: [O, I] or scalar, >= 0}.
        """
        found: dict[str, Tensor] = {}
        for name, module in self.targets.items():
            weight = cast(Tensor, module.weight)
            square = _kept_by(optimizer, weight)
            square = self.own.get(name) if square is None else square
            if square is not None:
                found[name] = oriented(module, square.to(weight.device))
        average = torch.stack([square.float().mean() for square in found.values()]).mean() if found else None
        missing = [name for name in self.targets if name not in found]
        for name in missing:
            weight = cast(Tensor, self.targets[name].weight)
            found[name] = torch.ones((), device=weight.device) if average is None else average.to(weight.device)
        return {name: found[name] for name in self.targets}


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

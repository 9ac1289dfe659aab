"""Blocks chosen by movement, for cells of the accuracy grid.

What leaves zero is kept, what goes towards it is removed (Sanh et al., NeurIPS 2020): the score of a block is the sum
over its weights and all steps so far of -weight * gradient. There a removed weight may come back; here, as with every
other importance of the grid, it stays at zero.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_sparse import SparseDistillTrainer
from hf_sparse.core.blocks import to_blocks
from hf_sparse.core.structure.targets import grad_view
from hf_sparse.training.pruning.pruner import Pruner
from hf_sparse.training.schedules import StepPlan


class MovementPruner(Pruner):
    """A `Pruner` that ranks blocks by movement, whatever `importance` says; a straight run on one rank only."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.moved: dict[str, Tensor] = {}

    @torch.no_grad()
    def finish_backward(self, plan: StepPlan, gradient_scale: Tensor | None = None) -> Tensor | None:
        """Take the gradients of the loss in, then do what any pruner does."""
        if gradient_scale is not None:
            raise ValueError("Movement is not summed up under a loss scaler: train in bf16 or float32.")
        for name, weight in self.masks.weights():
            grad = cast(Tensor, grad_view(self.masks.targets[name]))
            step = to_blocks(weight * grad, self.masks.block_shapes[name]).sum((-1, -2))
            self.moved[name] = self.moved.get(name, 0.0) - step
        return super().finish_backward(plan)

    def _scores(self, *_: Any) -> tuple[dict[str, Tensor], float | None]:
        return self.moved or {name: mask.float() for name, mask in self.masks.masks.items()}, None


class MovementTrainer(SparseDistillTrainer):
    """A `SparseDistillTrainer` with that pruner."""

    def _set_up(self, model: nn.Module) -> None:
        super()._set_up(model)
        self.pruner = MovementPruner(model, self.args)

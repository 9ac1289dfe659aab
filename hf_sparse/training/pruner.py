"""What pruning does in one optimizer step: choose masks, add the penalty, hold pruned blocks at zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from hf_sparse.core.feed_forward import FeedForward, find_feed_forwards, unit_overrides
from hf_sparse.core.targets import assign_block_shapes, find_targets, grad_view, weight_view
from hf_sparse.training.config import SparseDistillConfig
from hf_sparse.training.distributed import broadcast_from_rank_0_
from hf_sparse.training.importance import activation, magnitude
from hf_sparse.training.masks import BlockMasks
from hf_sparse.training.penalty import next_coef, penalty_gradient, proximal_shrink_
from hf_sparse.training.schedules import StepPlan
from hf_sparse.training.units import tie_scores


class Pruner:
    """The masks and reweighting coefficients of a run, and what each step does with them.

    Args:
        model: the model to prune; its target layers are found here.
        config: the run's settings.

    Raises:
        ValueError: if the targets, block shapes or sparsity do not fit the model.
    """

    def __init__(self, model: nn.Module, config: SparseDistillConfig) -> None:
        self.config = config
        # A run that neither prunes nor penalises has no targets: it is plain (distilled) training of any model.
        active = config.sparsity > 0.0 or config.penalty_weight > 0.0
        targets = find_targets(model, config.target_modules, config.exclude_modules) if active else {}
        if frozen := [name for name, module in targets.items() if not cast(Tensor, module.weight).requires_grad]:
            raise ValueError(
                f"{len(frozen)} target layer(s) are frozen (requires_grad=False), {frozen[0]} first: pruning would "
                f"take weights from them that nothing makes up for. Leave them out with exclude_modules, or unfreeze "
                f"them."
            )
        self.parts: list[FeedForward] = []
        overrides = config.shape_overrides
        if active and config.feed_forward == "units":
            self.parts = find_feed_forwards(model, targets)
            overrides = {**overrides, **unit_overrides(self.parts)}
        shapes = assign_block_shapes(targets, config.block_shape, overrides) if active else {}
        self.masks = BlockMasks(targets, shapes, config.sparsity_scope)
        self.masks.check_budgets(config.sparsity)
        self.coefs: dict[str, Tensor] = {}

    @torch.no_grad()
    def begin_step(self, plan: StepPlan, measure: Callable[[], Mapping[str, Tensor]] | None = None) -> None:
        """Take coefficients and masks anew where the plan says so; rank 0 decides for all ranks.

        Args:
            plan: the step's plan.
            measure: gives `importance.input_rms` of the step's batch; needed for importance="activation" alone.

        Raises:
            ValueError: if it is needed and missing.
        """
        if plan.update_coefs:
            epsilon = self.config.penalty_epsilon
            self.coefs = {n: next_coef(w, self.masks.block_shapes[n], epsilon) for n, w in self.masks.weights()}
            broadcast_from_rank_0_(self.coefs.values())
        if plan.update_masks:
            self.masks.choose(plan.sparsity, tie_scores(self._scores(measure), self.parts))
            broadcast_from_rank_0_(self.masks.masks.values())
            self.masks.apply_()

    @torch.no_grad()
    def add_penalty_gradient(self, plan: StepPlan, gradient_scale: Tensor | None = None) -> Tensor | None:
        """Add the gradient of penalty_weight * R to `.grad`, once per optimizer step and before clipping.

        Args:
            plan: the step's plan.
            gradient_scale: what a loss scaler has multiplied the gradients by; None = 1.

        Returns:
            R, a scalar on the weights' device; None if the step has no penalty in loss form.
        """
        if not plan.penalty_weight or self.config.penalty_form != "loss":
            return None
        values = []
        for name, module in self.masks.targets.items():
            shape = self.masks.block_shapes[name]
            value, gradient = penalty_gradient(weight_view(module), shape, self._coef(name))
            values.append(value)
            grad = grad_view(module)
            if grad is None:
                # A layer that the teacher stood in for in every micro-batch still feels the penalty.
                module.weight.grad = torch.zeros_like(module.weight)  # type: ignore[arg-type]
                grad = cast(Tensor, grad_view(module))
            if gradient_scale is not None:
                gradient = gradient * gradient_scale
            grad.add_(gradient, alpha=plan.penalty_weight)
        return torch.stack(values).sum()

    @torch.no_grad()
    def finish_step(self, plan: StepPlan, learning_rates: Mapping[int, float]) -> Tensor | None:
        """Shrink blocks (proximal form) and set pruned blocks back to zero, after the optimizer has moved the weights.

        Args:
            plan: the step's plan.
            learning_rates: {id of a parameter: learning rate of this step}; empty if the optimizer skipped the step.

        Returns:
            R before the shrinking, a scalar; None if the step has no penalty in proximal form.
        """
        values = []
        if plan.penalty_weight and self.config.penalty_form == "proximal":
            for name, module in self.masks.targets.items():
                threshold = plan.penalty_weight * learning_rates.get(id(module.weight), 0.0)
                shape = self.masks.block_shapes[name]
                values.append(proximal_shrink_(weight_view(module), shape, self._coef(name), threshold))
        self.masks.apply_()
        return torch.stack(values).sum() if values else None

    def check_target(self) -> None:
        """Refuse a result that is not at the target sparsity, or whose pruned blocks are not zero.

        Raises:
            RuntimeError: saying what was reached.
        """
        diverged = [name for name, weight in self.masks.weights() if not torch.isfinite(weight).all()]
        if diverged:
            raise RuntimeError(
                f"training diverged: {diverged[0]} holds NaN or infinite weights, and so do {len(diverged)} target "
                f"layer(s). Lower the learning rate, or resume from an earlier checkpoint."
            )
        off = self.masks.off_target(self.config.sparsity) if self.masks.targets else None
        if off is not None:
            raise RuntimeError(
                f"training ended off target: {off}. The masks reach sparsity={self.config.sparsity} at "
                f"sparsity_end={self.config.sparsity_end} of all steps. The trainer still holds the model and its "
                f"checkpoints stay: resume from one with resume_from_checkpoint, or set an earlier sparsity_end."
            )
        if not self.masks.is_applied():
            raise RuntimeError(
                "training ended with weights in pruned blocks: something wrote to them after the last step."
            )

    def _scores(self, measure: Callable[[], Mapping[str, Tensor]] | None) -> dict[str, Tensor]:
        if self.config.importance == "magnitude":
            return {name: magnitude(w, self.masks.block_shapes[name]) for name, w in self.masks.weights()}
        if measure is None:
            raise ValueError(f"importance={self.config.importance!r} looks at a batch: pass measure to begin_step.")
        rms = measure()
        return {name: activation(w, self.masks.block_shapes[name], rms[name]) for name, w in self.masks.weights()}

    def _coef(self, name: str) -> Tensor | None:
        if name not in self.coefs:
            return None
        device = weight_view(self.masks.targets[name]).device
        if self.coefs[name].device != device:
            self.coefs[name] = self.coefs[name].to(device)
        return self.coefs[name]

"""What pruning does in one optimizer step: choose masks, add the penalty, hold pruned blocks at zero."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_sparse.core.structure.feed_forward import FeedForward, find_feed_forwards, unit_overrides
from hf_sparse.core.structure.fused import fused_weights
from hf_sparse.core.structure.targets import assign_block_shapes, find_targets, grad_view, weight_view
from hf_sparse.inference.kernels import requested_backend
from hf_sparse.training.config import SparseDistillConfig
from hf_sparse.training.distributed import (
    all_finite,
    broadcast_from_rank_0_,
    check_agreement,
    norms_of_blocks,
    reshard,
)
from hf_sparse.training.pruning.importance import magnitudes, refuse_unmeasured
from hf_sparse.training.pruning.masks import BlockMasks
from hf_sparse.training.pruning.passes import add_penalty_gradient_, shrink_blocks_
from hf_sparse.training.pruning.penalty import coef_of_norms
from hf_sparse.training.pruning.sensitivity import SquaredGradients
from hf_sparse.training.pruning.units import tie_scores
from hf_sparse.training.schedules import StepPlan

logger = logging.getLogger(__name__)


class Pruner:
    """The masks and reweighting coefficients of a run, and what each step does with them.

    Args:
        model: the model to prune; its target layers are found here.
        config: the run's settings.

    Raises:
        ValueError: if the targets, block shapes or sparsity do not fit the model, or `HF_SPARSE_BACKEND` is no choice.
    """

    def __init__(self, model: nn.Module, config: SparseDistillConfig) -> None:
        self.model, self.config = model, config
        requested_backend()  # a wrong name is refused now, and not at the first mask
        # A run that neither prunes nor penalises has no targets: it is plain (distilled) training of any model.
        active = config.sparsity > 0.0 or config.penalty_weight > 0.0
        targets = find_targets(model, config.target_modules, config.exclude_modules) if active else {}
        if frozen := [name for name, module in targets.items() if not cast(Tensor, module.weight).requires_grad]:
            raise ValueError(
                f"{len(frozen)} target layer(s) are frozen (requires_grad=False), {frozen[0]} first: pruning would "
                f"take weights from them that nothing makes up for. Leave them out with exclude_modules, or unfreeze "
                f"them."
            )
        if config.importance == "activation":
            refuse_unmeasured(targets)
        for kind in fused_weights(model) if active else ():
            logger.warning("%s", kind)
        self.parts: list[FeedForward] = []
        overrides = config.shape_overrides
        if active and config.feed_forward == "units":
            self.parts = find_feed_forwards(model, targets)
            overrides = {**overrides, **unit_overrides(self.parts)}
        shapes = assign_block_shapes(targets, config.block_shape, overrides) if active else {}
        self.masks = BlockMasks(targets, shapes, config.budget_scope, config.layer_share)
        self.masks.check_budgets(config.sparsity)
        self.coefs: dict[str, Tensor] = {}
        self.squares = SquaredGradients(targets)

    @torch.no_grad()
    def begin_step(
        self, plan: StepPlan, measure: Callable[[], Mapping[str, Tensor]] | None = None, optimizer: Any = None
    ) -> None:
        """Take coefficients and masks anew where the plan says so; rank 0 decides for all ranks, which then compare.

        Args:
            plan: the step's plan.
            measure: gives `importance.input_rms` of the step's batch; needed for importance="activation" alone.
            optimizer: what moves the weights; read for importance="fisher" alone.

        Raises:
            ValueError: if it is needed and missing.
            RuntimeError: if the masks are not the same on all ranks.
        """
        if plan.update_masks or plan.update_coefs:
            reshard(self.model)
        if plan.update_coefs:
            epsilon = self.config.penalty_epsilon
            self.coefs = {name: coef_of_norms(norm, epsilon) for name, norm in self.masks.norms().items()}
            broadcast_from_rank_0_(self.coefs)
        if plan.update_masks:
            check_agreement(self.masks.bits, f"before the mask update of step {plan.step}")
            scores, share = self._scores(measure, optimizer)
            self.masks.choose(plan.sparsity, tie_scores(scores, self.parts), share)
            broadcast_from_rank_0_(self.masks.bits)
            check_agreement(self.masks.bits, f"after the mask update of step {plan.step}")
            self.masks.apply_()

    @torch.no_grad()
    def finish_backward(self, plan: StepPlan, gradient_scale: Tensor | None = None) -> Tensor | None:
        """Add the gradient of penalty_weight * R to `.grad`, and set that of pruned blocks to zero.

        Once per optimizer step, and before clipping.

        Args:
            plan: the step's plan.
            gradient_scale: what a loss scaler has multiplied the gradients by; None = 1.

        Returns:
            R, a scalar on the weights' device; None if the step has no penalty in loss form.
        """
        if not plan.penalty_weight or self.config.penalty_form != "loss":
            self.masks.apply_to_grads_()
            return None
        grads = {}
        for name, module in self.masks.targets.items():
            if grad_view(module) is None:
                # A layer that the teacher stood in for in every micro-batch still feels the penalty.
                module.weight.grad = torch.zeros_like(module.weight)  # type: ignore[arg-type]
            grads[name] = cast(Tensor, grad_view(module))
        return add_penalty_gradient_(
            grads, dict(self.masks.weights()), self.masks.block_shapes, self._coefs(), amount=plan.penalty_weight,
            scale=gradient_scale, bitmaps=self.masks.bitmaps,
        )  # fmt: skip

    def watch_gradients(self, plan: StepPlan, optimizer: Any, moved: Tensor | None = None) -> None:
        """Remember what the step's gradients tell about the weights, if masks are still chosen by it.

        Args:
            plan: the step's plan.
            optimizer: what has moved the weights.
            moved: whether it did, a bool scalar; None = yes.
        """
        if self.config.importance == "fisher" and not plan.final_sparsity:
            self.squares.watch(optimizer, moved)

    @torch.no_grad()
    def finish_step(
        self, plan: StepPlan, learning_rates: Mapping[int, float], moved: Tensor | None = None
    ) -> Tensor | None:
        """Shrink blocks (proximal form) and set pruned blocks back to zero, after the optimizer has moved the weights.

        Args:
            plan: the step's plan.
            learning_rates: {id of a parameter: learning rate of this step}; nothing is shrunk without one.
            moved: whether the optimizer took the step, a scalar on the weights' device; None = it did.

        Returns:
            R before the shrinking, a scalar; None if the step has no penalty in proximal form.
        """
        if not plan.penalty_weight or self.config.penalty_form != "proximal":
            self.masks.apply_()
            return None
        rates = {name: learning_rates.get(id(module.weight), 0.0) for name, module in self.masks.targets.items()}
        thresholds = {name: plan.penalty_weight * rate for name, rate in rates.items()}
        return shrink_blocks_(
            dict(self.masks.weights()), self.masks.block_shapes, self._coefs(), thresholds, moved=moved,
            bitmaps=self.masks.bitmaps,
        )  # fmt: skip

    def check_target(self) -> None:
        """Refuse a result that is not at the target sparsity, or whose pruned blocks are not zero.

        Raises:
            RuntimeError: saying what was reached.
        """
        reshard(self.model)
        check_agreement(self.masks.bits, "at the end of training")
        diverged = [name for name, finite in all_finite(dict(self.masks.weights())).items() if not finite]
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

    def _scores(
        self, measure: Callable[[], Mapping[str, Tensor]] | None, optimizer: Any
    ) -> tuple[dict[str, Tensor], float | None]:
        """Give the scores of all blocks, and the share that each layer decides itself if not the usual one."""
        weights, shapes = dict(self.masks.weights()), self.masks.block_shapes
        if self.config.importance == "magnitude":
            return magnitudes(norms_of_blocks(weights, shapes), shapes), None
        if self.config.importance == "fisher":
            squares = self.squares.means(optimizer)
            # Before the first gradients this ranks by magnitude, which does not compare layers.
            known = any(square.ndim for square in squares.values())
            share = None if known or self.config.sparsity_scope != "auto" else 1.0
            return magnitudes(norms_of_blocks(weights, shapes, lambda name: squares[name].sqrt()), shapes), share
        if measure is None:
            raise ValueError(f"importance={self.config.importance!r} looks at a batch: pass measure to begin_step.")
        rms = measure()
        # The forward that measured may have gathered weights.
        reshard(self.model)
        return magnitudes(norms_of_blocks(dict(self.masks.weights()), shapes, rms.__getitem__), shapes), None

    def _coefs(self) -> dict[str, Tensor]:
        for name, coef in self.coefs.items():
            device = weight_view(self.masks.targets[name]).device
            if coef.device != device:
                self.coefs[name] = coef.to(device)
        return self.coefs

"""Masks of a stack of models: chosen for many at once, by the scores that `hf_sparse.training` gives one weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.grid.stacked_bert import StackedBert
from benchmarks.grid.stacked_selection import decide_inside, keep_highest, removed
from benchmarks.grid.stacked_units import check_units, shape_in, tie_units_
from hf_sparse.core.blocks import BlockShape, block_norms, expand_mask, scale_blocks_
from hf_sparse.training.pruning.importance import magnitude
from hf_sparse.training.pruning.penalty import next_coef
from hf_sparse.training.schedules import StepPlan

DAMPING = 0.01


@dataclass
class Measured:
    """What the inputs of one linear are like, for some of the models: rms [N, I], moments [n, I, I] of the watched."""

    rms: Tensor
    moments: Tensor | None = None


@dataclass
class Watched:
    """Measures the inputs of linears in one forward; `moments_of` are the models whose second moments are needed."""

    real: Tensor  # [N, M] bool
    moments_of: list[int] = field(default_factory=list)
    found: dict[str, Measured] = field(default_factory=dict)

    def __call__(self, name: str, inputs: Tensor) -> None:
        """Take the inputs [N, M, I] of a linear."""
        flat = inputs.float() * self.real[:, :, None]
        count = self.real.sum(1).float()
        measured = Measured(rms=(flat.square().sum(1) / count[:, None]).sqrt())
        if self.moments_of:
            some = flat[self.moments_of]
            measured.moments = some.transpose(1, 2) @ some / count[self.moments_of][:, None, None]
        self.found[name] = measured


class StackedPruner:
    """Masks, penalties and what else pruning does, for models with settings of their own.

    Args:
        stack: the models.
        configs: one `SparseDistillConfig` per model.
        extra: one dictionary per model of settings under test: importance, compensate, relative, updates_of.
    """

    def __init__(self, stack: StackedBert, configs: Sequence[Any], extra: Sequence[Mapping[str, Any]]) -> None:
        self.stack, self.configs = stack, configs
        self.importance = [
            more.get("importance", config.importance) for config, more in zip(configs, extra, strict=True)
        ]
        self.compensate = [int(more.get("compensate", 0)) for more in extra]
        self.relative = [bool(more.get("relative", False)) for more in extra]
        for n, config in enumerate(configs):
            check_units(config, self.importance[n])
        self.full = [bool(config.sparsity) for config in configs]
        self.mask = torch.ones_like(stack.flat, dtype=torch.bool)
        views = stack.views(self.mask)
        self.masks = {name: views[f"{name}.weight"] for name in stack.targets}
        self.started = False
        self.coefs: dict[tuple[int, str], Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.moments: dict[str, Tensor] = {}
        self.moments_of = [n for n in range(stack.size) if self.importance[n] == "obs" or self.compensate[n]]
        self.taylor_of = [n for n in range(stack.size) if self.importance[n] in ("taylor", "movement")]

    def weight(self, name: str) -> Tensor:
        """Give the weights [N, O, I] of a linear, without a graph."""
        return self.stack.weights[f"{name}.weight"]

    @torch.no_grad()
    def begin_step(self, plans: Sequence[StepPlan], measure: Any, squares: Mapping[str, Tensor]) -> None:
        """Take coefficients and masks anew where plans say so.

        Args:
            plans: one per model.
            measure: gives {name: Measured}.
            squares: {name of a weight: Adam's second moments}.
        """
        for n, plan in enumerate(plans):
            if plan.update_coefs:
                for name in self.stack.targets:
                    weight, config = self.weight(name)[n], self.configs[n]
                    self.coefs[n, name] = next_coef(weight, self._shape(n, name), config.penalty_epsilon)
        due = [n for n, plan in enumerate(plans) if plan.update_masks]
        if not due:
            return
        needs = [n for n in due if self.importance[n] in ("activation", "obs") or self.compensate[n]]
        found = measure(self.moments_of) if needs else {}
        for name, measured in found.items():
            if measured.moments is not None:
                old = self.moments.get(name)
                self.moments[name] = measured.moments if old is None else old.lerp_(measured.moments, 0.2)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for n in due:
            config = self.configs[n]
            shape = config.block_shape, config.feed_forward
            # The share counts under a global budget alone.
            share = config.layer_share if config.budget_scope == "global" else 1.0
            key = (shape, self.importance[n], share, self.relative[n])
            groups.setdefault(key, []).append(n)
        kept_old = {name: self.masks[name][due] for name in self.masks} if any(self.compensate[n] for n in due) else {}
        for ((_, feed_forward), importance, share, relative), members in groups.items():
            scores = {}
            for name in self.stack.targets:
                score = self._score(name, members, self._shape(members[0], name), importance, found, squares)
                if relative:
                    score = score / score.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-30)
                scores[name] = score
            if feed_forward == "units":
                tie_units_(scores)
            self._choose(members, scores, [plans[n].sparsity for n in members], share)
        if kept_old:
            self._compensate([n for n in due if self.compensate[n]])
        self.started = True
        self.apply_()

    def _score(
        self,
        name: str,
        members: list[int],
        shape: BlockShape,
        importance: str,
        found: Mapping[str, Measured],
        squares: Mapping[str, Tensor],
    ) -> Tensor:
        weight = self.weight(name)[members]
        n, rows, columns = weight.shape
        grid = (n, -1, columns // shape[1])

        def of(values: Tensor) -> Tensor:
            return magnitude(values.reshape(n * rows, columns), shape).view(grid)

        if importance == "magnitude":
            return of(weight)
        if importance == "activation":
            return of(weight * found[name].rms[members][:, None])
        if importance in ("fisher", "factored"):
            square = squares[f"{name}.weight"][members]
            if importance == "factored":
                mean = square.mean((1, 2), keepdim=True).clamp(min=1e-30)
                square = square.mean(1, keepdim=True) * (square.mean(2, keepdim=True) / mean)
            return of(weight * square.sqrt())
        if importance in ("taylor", "movement"):
            slots = [self.taylor_of.index(n) for n in members]
            return self.gradients[name][slots].view(grid)
        if importance == "obs":
            slots = [self.moments_of.index(n) for n in members]
            inverse = torch.linalg.inv(damped(self.moments[name][slots]))
            return of(weight / inverse.diagonal(dim1=1, dim2=2).sqrt()[:, None])
        raise ValueError(f"importance={importance!r} is not known.")

    def _choose(self, members: list[int], scores: dict[str, Tensor], sparsity: list[float], share: float) -> None:
        ranked, shapes = {}, {name: self._shape(members[0], name) for name in scores}
        for name, score in scores.items():
            alive = self._grid(name, members, shapes[name])
            ranked[name] = torch.where(alive, score, float("-inf")).flatten(1)
        if share < 1.0:
            inside = [decide_inside(score, sparsity, share) for score in ranked.values()]
            joined = torch.cat(inside, 1)
            parts = keep_highest(joined, removed(joined, sparsity)).split([score.shape[1] for score in inside], 1)
            keep = dict(zip(ranked, parts, strict=True))
        else:
            keep = {name: keep_highest(score, removed(score, sparsity)) for name, score in ranked.items()}
        for name, kept in keep.items():
            alive = self._grid(name, members, shapes[name])
            grid = kept.view(alive.shape) & alive
            full = expand_mask(grid.flatten(0, 1), shapes[name]).view(len(members), *self.masks[name].shape[1:])
            self.masks[name][members] = full

    def _shape(self, n: int, name: str) -> BlockShape:
        _, rows, columns = self.weight(name).shape
        return shape_in(self.configs[n], name, rows, columns)

    def _grid(self, name: str, members: list[int], shape: BlockShape) -> Tensor:
        # One weight of every block tells, since masks hold whole blocks: [n, R, C].
        return self.masks[name][members][:, :: shape[0], :: shape[1]]

    def _compensate(self, members: list[int]) -> None:
        slots = [self.moments_of.index(n) for n in members]
        for name in self.stack.targets:
            weight, mask = self.weight(name), self.masks[name]
            steps = max(self.compensate[n] for n in members)
            weight[members] = least_squares(weight[members], mask[members], damped(self.moments[name][slots]), steps)

    @torch.no_grad()
    def add_gradients(self, plans: Sequence[StepPlan]) -> None:
        """Add penalty gradients in loss form, and remember what gradients tell about blocks; before clipping."""
        self._penalise(plans, "loss", None)
        if self.taylor_of and not all(plans[n].final_sparsity for n in self.taylor_of):
            shape = self.configs[self.taylor_of[0]].block_shape
            for name in self.stack.targets:
                grad = self.stack.grads[f"{name}.weight"][self.taylor_of]
                product = grad * self.weight(name)[self.taylor_of]
                n, rows, columns = product.shape
                sums = product.view(n, rows // shape[0], shape[0], columns // shape[1], shape[1]).sum((2, 4))
                squared = torch.tensor([self.importance[k] == "taylor" for k in self.taylor_of], device=sums.device)
                new = torch.where(squared[:, None, None], sums.square(), -sums)
                old = self.gradients.get(name)
                self.gradients[name] = new if old is None else old.lerp_(new, 0.02)

    def apply_to_grads_(self) -> None:
        """Set gradients of pruned blocks to zero."""
        if self.started:
            self.stack.grad.mul_(self.mask)

    @torch.no_grad()
    def apply_(self) -> None:
        """Set pruned blocks to zero."""
        if self.started:
            self.stack.flat.mul_(self.mask)

    @torch.no_grad()
    def finish_step(self, plans: Sequence[StepPlan], rates: Sequence[float]) -> None:
        """Shrink blocks (proximal form) and set pruned blocks back to zero."""
        self._penalise(plans, "proximal", rates)
        self.apply_()

    def _penalise(self, plans: Sequence[StepPlan], form: str, rates: Sequence[float] | None) -> None:
        # For the cells of one block shape at once: 8 kernels per layer, however many cells there are.
        groups: dict[tuple[Any, ...], list[int]] = {}
        for n, plan in enumerate(plans):
            if plan.penalty_weight and self.configs[n].penalty_form == form:
                groups.setdefault((self.configs[n].block_shape, self.configs[n].feed_forward), []).append(n)
        for members in groups.values():
            strength = torch.tensor([plans[n].penalty_weight * (1.0 if rates is None else rates[n]) for n in members])
            strength = strength.to(self.stack.flat.device)[:, None, None]
            for name in self.stack.targets:
                weight, shape = self.weight(name)[members], self._shape(members[0], name)
                n, rows, columns = weight.shape
                norm = block_norms(weight.view(n * rows, columns), shape).view(n, -1, columns // shape[1])
                coefs = [self.coefs.get((k, name)) for k in members]
                coef = torch.stack([norm.new_ones(norm.shape[1:]) if c is None else c for c in coefs])
                pull = strength * coef / torch.where(norm > 0, norm, 1.0) * (norm > 0)
                factor = pull if form == "loss" else (1.0 - pull).clamp_(min=0.0)
                scale_blocks_(weight.view(n * rows, columns), factor.flatten(0, 1), shape)
                if form == "loss":
                    self.stack.grads[f"{name}.weight"][members] += weight
                else:
                    self.weight(name)[members] = weight

    def sparsity(self) -> list[float]:
        """Give the fraction of weights removed, per model."""
        kept = sum(mask.sum((1, 2)) for mask in self.masks.values())
        total = sum(mask[0].numel() for mask in self.masks.values())
        return (1.0 - kept / total).tolist()  # type: ignore[union-attr]


def damped(moments: Tensor) -> Tensor:
    """Add a share of the mean of the diagonal to the diagonals: [n, I, I]."""
    diagonal = moments.diagonal(dim1=1, dim2=2)
    return moments + torch.diag_embed((DAMPING * diagonal.mean(1, keepdim=True) + 1e-8).expand_as(diagonal))


def least_squares(weight: Tensor, mask: Tensor, moments: Tensor, steps: int) -> Tensor:
    """Let the weights kept make up for those removed: min ||X (new - old)^T||^2, by conjugate gradients.

    Args:
        weight: [n, O, I], before the cut.
        mask: [n, O, I] bool.
        moments: [n, I, I], X^T X / tokens of the inputs, positive definite.
        steps: of conjugate gradients.

    Returns:
        [n, O, I], zero where the mask is False.
    """
    scale = moments.diagonal(dim1=1, dim2=2)[:, None]
    new = weight * mask
    rest = torch.bmm(weight - new, moments) * mask
    ahead = rest / scale
    product = (rest * ahead).sum(-1, keepdim=True)
    direction = ahead
    for _ in range(steps):
        image = torch.bmm(direction, moments) * mask
        size = (direction * image).sum(-1, keepdim=True)
        alpha = torch.where(size > 0, product / size.clamp(min=1e-30), 0.0)
        new = new + alpha * direction
        rest = rest - alpha * image
        ahead = rest / scale
        following = (rest * ahead).sum(-1, keepdim=True)
        beta = torch.where(product > 0, following / product.clamp(min=1e-30), 0.0)
        direction, product = ahead + beta * direction, following
    return new

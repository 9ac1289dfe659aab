"""What a step does to the blocks of all pruned layers: the penalty's gradient or proximal step, and the masks.

Whole float32 weights on the CPU take one pass each, in the native kernel. All others (on a GPU, sharded, of another
dtype) take a pass per task in torch, with what needs an answer from other ranks put together in one message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_sparse.core.bits import Bitmap, few_at_a_time, masks_as_factors
from hf_sparse.core.blocks import BlockShape, grid_shape
from hf_sparse.inference.kernels import prune
from hf_sparse.training.distributed import add_scaled_blocks_, norms_of_blocks, scale_blocks_of_
from hf_sparse.training.pruning.penalty import gradient_factors, lasso_of_norms, shrink_factors

Shapes = Mapping[str, BlockShape]


@torch.no_grad()
def mask_blocks_(tensors: Mapping[str, Tensor], shapes: Shapes, bitmaps: Mapping[str, Bitmap]) -> None:
    """Set pruned blocks to zero, in place.

    Args:
        tensors: {name: [O, I]}, weights or gradients, whole or sharded.
        shapes: {name: (h, w)}, both positive.
        bitmaps: {name: mask}; moved to where the tensors are.
    """
    # One kind, unless layers lie on several devices.
    kinds: dict[tuple[torch.device, torch.dtype], dict[str, Bitmap]] = {}
    for name, tensor in tensors.items():
        bitmap = bitmaps[name].move(tensor.device)
        if prune.fits(tensor):
            prune.mask_(tensor, shapes[name], bitmap.bits)
        else:
            kinds.setdefault((tensor.device, tensor.dtype), {})[name] = bitmap
    for (_, dtype), others in kinds.items():
        for name, factors in masks_as_factors(others, dtype):
            scale_blocks_of_(tensors[name], factors, shapes[name])


@torch.no_grad()
def add_penalty_gradient_(
    grads: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    shapes: Shapes,
    coefs: Mapping[str, Tensor],
    *,
    amount: float,
    scale: Tensor | None,
    bitmaps: Mapping[str, Bitmap] | None,
) -> Tensor:
    """Add the gradient of amount * R to the gradients, then set those of pruned blocks to zero.

    Args:
        grads: {name: [O, I]}, written to.
        weights: {name: [O, I]}, whole or sharded as their gradients are.
        shapes: {name: (h, w)}, both positive.
        coefs: {name: [R, C]}; a name that is missing counts every block as 1.
        amount: the penalty's weight.
        scale: what a loss scaler has multiplied the gradients by, a scalar; None = 1.
        bitmaps: {name: mask}; None = nothing is pruned.

    Returns:
        R, a scalar.
    """
    plain = scale is None or scale.dtype == torch.float32
    native, others = _sorted_out(weights, lambda name, weight: plain and prune.fits(grads[name], weight))
    values = [
        prune.add_lasso_gradient_(
            grads[name], weight, shapes[name], amount=amount, coef=coefs.get(name), scale=_beside(weight, scale),
            bits=_bits(bitmaps, name, weight),
        )
        for name, weight in native.items()
    ]  # fmt: skip
    for norms, coef, names in _together(norms_of_blocks(others, shapes), coefs):
        values.append(lasso_of_norms(norms, coef))
        factors = gradient_factors(norms, coef)
        if scale is not None:
            factors = factors * scale.to(factors.device)
        for name, part in _apart(factors, names, others, shapes):
            add_scaled_blocks_(grads[name], others[name], part, shapes[name], amount)
    if bitmaps is not None:
        mask_blocks_({name: grads[name] for name in others}, shapes, bitmaps)
    return _sum(values)


@torch.no_grad()
def shrink_blocks_(
    weights: Mapping[str, Tensor],
    shapes: Shapes,
    coefs: Mapping[str, Tensor],
    thresholds: Mapping[str, float],
    *,
    moved: Tensor | None,
    bitmaps: Mapping[str, Bitmap] | None,
) -> Tensor:
    """Shrink every block towards zero by its threshold * coef, then set pruned blocks to zero: the proximal step.

    Args:
        weights: {name: [O, I]}, whole or sharded, written to.
        shapes: {name: (h, w)}, both positive.
        coefs: {name: [R, C]}; a name that is missing counts every block as 1.
        thresholds: {name: learning rate * penalty_weight}, >= 0.
        moved: whether the optimizer took the step, a bool scalar; None = it did. Nothing is shrunk where not.
        bitmaps: {name: mask}; None = nothing is pruned.

    Returns:
        R before the step, a scalar.
    """
    native, others = _sorted_out(weights, lambda _, weight: prune.fits(weight))
    values = [
        prune.shrink_(
            weight, shapes[name], threshold=thresholds[name], coef=coefs.get(name), moved=_beside(weight, moved),
            bits=_bits(bitmaps, name, weight),
        )
        for name, weight in native.items()
    ]  # fmt: skip
    for norms, coef, names in _together(norms_of_blocks(others, shapes), coefs, thresholds):
        values.append(lasso_of_norms(norms, coef))
        factors = shrink_factors(norms, coef, thresholds[names[0]])
        if moved is not None:
            factors = torch.where(moved.to(factors.device), factors, 1.0)
        if bitmaps is not None:
            # Shrunk and masked by one multiplication of each weight.
            masks = {name: bitmaps[name].move(factors.device) for name in names}
            factors = factors * torch.cat([kept.reshape(-1) for _, kept in masks_as_factors(masks, factors.dtype)])
        for name, part in _apart(factors, names, others, shapes):
            scale_blocks_of_(others[name], part, shapes[name])
    return _sum(values)


def _sorted_out(
    weights: Mapping[str, Tensor], fits: Callable[[str, Tensor], bool]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give the weights that the native kernel takes, and the others."""
    native = {name: weight for name, weight in weights.items() if fits(name, weight)}
    return native, {name: weight for name, weight in weights.items() if name not in native}


def _bits(bitmaps: Mapping[str, Bitmap] | None, name: str, weight: Tensor) -> Tensor | None:
    return None if bitmaps is None else bitmaps[name].move(weight.device).bits


def _beside(weight: Tensor, scalar: Tensor | None) -> Tensor | None:
    return None if scalar is None else scalar.to(weight.device)


def _together(
    norms: Mapping[str, Tensor], coefs: Mapping[str, Tensor], thresholds: Mapping[str, float] | None = None
) -> Iterator[tuple[Tensor, Tensor | None, list[str]]]:
    """Yield (norms, coefficients, names) of small layers as one: what they cost a GPU is the launches."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, norm in norms.items():
        threshold = None if thresholds is None else thresholds[name]
        groups.setdefault((norm.device, norm.dtype, name in coefs, threshold), []).append(name)
    for (_, _, weighted, _), alike in groups.items():
        for names in few_at_a_time({name: norms[name].numel() for name in alike}):
            coef = torch.cat([coefs[name].reshape(-1) for name in names]) if weighted else None
            yield torch.cat([norms[name].reshape(-1) for name in names]), coef, names


def _apart(
    factors: Tensor, names: list[str], weights: Mapping[str, Tensor], shapes: Shapes
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, [R, C]) of what `_together` has put in a row."""
    grids = {name: grid_shape((weights[name].shape[0], weights[name].shape[1]), shapes[name]) for name in names}
    parts = factors.split([rows * cols for rows, cols in grids.values()])
    for (name, grid), part in zip(grids.items(), parts, strict=True):
        yield name, part.view(grid)


def _sum(values: list[Tensor]) -> Tensor:
    # Layers may lie on several devices.
    return torch.stack([value.to(values[0].device) for value in values]).sum()

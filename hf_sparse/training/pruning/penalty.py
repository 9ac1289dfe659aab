"""The reweighted group lasso: R = sum over blocks of coef * ||block||_2, its gradient, its proximal step.

Source: Hardware-friendly Block Structured Pruning (Li et al., Findings of EMNLP 2020): groups are blocks, and
coef = 1 / (||block||_2 + epsilon) is renewed a few times, so that small blocks are pushed to zero and large ones left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.core.blocks import BlockShape, block_norms, grid_shape, to_blocks


def group_lasso(weight: Tensor, block_shape: BlockShape, coef: Tensor | None = None) -> Tensor:
    """Compute the penalty of one weight. Differentiable; the gradient at a block of zeros is 0.

    Args:
        weight: [O, I].
        block_shape: (h, w), may hold -1.
        coef: [R, C], >= 0, treated as a constant; None = 1 for every block (the plain group lasso).

    Returns:
        A scalar, >= 0, float32 (float64 for a float64 weight).

    Raises:
        ValueError: if the weight is no floating-point matrix, the blocks do not tile it, or coef is not of its grid.

    Example:
        >>> group_lasso(torch.tensor([[3., 4., 0., 1.]]), (1, 2))
        tensor(6.)
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"the group lasso is that of a floating-point weight [O, I], not of {weight.dtype} of shape "
            f"{list(weight.shape)}: pass one weight at a time, Conv1D's transposed."
        )
    grid = grid_shape((weight.shape[0], weight.shape[1]), block_shape)
    if coef is not None and coef.shape != grid:
        # It would be broadcast, and weigh other blocks than it was made for.
        raise ValueError(
            f"coef has shape {list(coef.shape)}, the grid of {list(weight.shape)} in blocks of {list(block_shape)} is "
            f"{list(grid)}: take it from a weight of this shape, in blocks of this shape."
        )
    squared = to_blocks(weight, block_shape).to(_at_least_float32(weight)).square().sum(dim=(2, 3))
    # The square root has an infinite slope at 0, where the subgradient that leaves a pruned block alone is 0.
    norms = torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)
    return norms.sum() if coef is None else (coef.detach() * norms).sum()


def next_coef(weight: Tensor, block_shape: BlockShape, epsilon: float) -> Tensor:
    """Compute the reweighting coefficients of a weight as it is now.

    Args:
        weight: [O, I].
        block_shape: (h, w), may hold -1.
        epsilon: > 0.

    Returns:
        [R, C], in (0, 1 / epsilon].

    Example:
        >>> next_coef(torch.tensor([[3., 4.]]), (1, 2), epsilon=5.0)
        tensor([[0.1000]])
    """
    return coef_of_norms(block_norms(weight.detach(), block_shape), epsilon)


def coef_of_norms(norms: Tensor, epsilon: float) -> Tensor:
    """Compute the reweighting coefficients 1 / (norm + epsilon) from the norms of blocks, [R, C]."""
    # In the order of the grid, where the norms of a Conv1D's blocks lie the other way round, as its weight does.
    return (1.0 / (norms + epsilon)).contiguous()


def lasso_of_norms(norms: Tensor, coef: Tensor | None) -> Tensor:
    """Compute the penalty, a scalar, from the norms and coefficients of blocks, both [R, C]; None = 1 for each."""
    return norms.sum() if coef is None else torch.dot(coef.reshape(-1), norms.reshape(-1))


def gradient_factors(norms: Tensor, coef: Tensor | None) -> Tensor:
    """Compute what a block is multiplied by to give the penalty's gradient: coef / norm; 0 at a block of zeros.

    Args:
        norms: [R, C], >= 0.
        coef: [R, C]; None = 1 for every block.

    Example:
        >>> gradient_factors(torch.tensor([[2., 0.]]), None)
        tensor([[0.5000, 0.0000]])
    """
    return ((1.0 if coef is None else coef) / norms).masked_fill_(norms == 0, 0.0)


def shrink_factors(norms: Tensor, coef: Tensor | None, threshold: float) -> Tensor:
    """Compute what a block is multiplied by in the proximal step: max(0, 1 - threshold * coef / norm).

    Args:
        norms: [R, C], >= 0.
        coef: [R, C]; None = 1 for every block.
        threshold: learning rate * penalty_weight, >= 0.

    Example:
        >>> shrink_factors(torch.tensor([[4., 0.5]]), None, threshold=1.0)
        tensor([[0.7500, 0.0000]])
    """
    safe = torch.where(norms > 0, norms, 1.0)
    return (1.0 - threshold * (1.0 if coef is None else coef) / safe).clamp_(min=0.0)


def _at_least_float32(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32

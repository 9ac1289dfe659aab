"""A weight seen as a grid of blocks.

A block is a rectangle of a weight: h output rows by w input columns. Blocks tile the weight exactly: a shape that
does not divide it is refused, here and once, so that no other module ever meets a ragged block.

Shape letters: O, I out and in features; h, w block height and width; R, C grid rows and columns: R = O / h, C = I / w.
"""

from __future__ import annotations

import torch
from torch import Tensor

BlockShape = tuple[int, int]

_ROWS_ONE_BY_ONE = 8  # highest blocks whose squares the CPU sums up row by row


class TilingError(ValueError):
    """A block shape does not divide a weight that it was meant for; another shape for that weight would help."""


def resolve_block_shape(block_shape: BlockShape, weight_shape: tuple[int, int]) -> BlockShape:
    """Replace -1 by the whole dimension and check that the blocks tile the weight.

    Args:
        block_shape: (h, w) in weights; -1 stands for the whole dimension.
        weight_shape: (O, I).

    Returns:
        (h, w), both positive, h dividing O and w dividing I.

    Raises:
        ValueError: if the shape is no pair, or h or w is 0 or below -1.
        TilingError: if h or w does not divide its dimension; a ValueError, too.

    Example:
        >>> resolve_block_shape((8, -1), (16, 12))
        (8, 12)
    """
    if not isinstance(block_shape, tuple | list) or len(block_shape) != 2:
        raise ValueError(
            f"block_shape={block_shape!r} is no block shape: use a pair (h, w) of output rows and input columns, such "
            f"as (8, 1), with -1 for the whole dimension."
        )
    resolved = []
    for name, size, dim, side in zip(
        ("block_height", "block_width"), block_shape, weight_shape, ("output rows", "input columns"), strict=True
    ):
        if isinstance(size, bool) or not isinstance(size, int) or size == 0 or size < -1:
            raise ValueError(f"{name}={size!r} is not a block size: use a positive integer, or -1 for all {side}.")
        size = dim if size == -1 else size
        if dim % size:
            raise TilingError(
                f"{name}={size} does not divide the {dim} {side} of a weight of shape {tuple(weight_shape)} "
                f"({dim} % {size} = {dim % size}). Pick a divisor of {dim}."
            )
        resolved.append(size)
    return resolved[0], resolved[1]


def grid_shape(weight_shape: tuple[int, int], block_shape: BlockShape) -> tuple[int, int]:
    """Count the blocks per side of a weight.

    Args:
        weight_shape: (O, I).
        block_shape: (h, w), may hold -1.

    Returns:
        (R, C).

    Example:
        >>> grid_shape((16, 12), (8, 1))
        (2, 12)
    """
    h, w = resolve_block_shape(block_shape, weight_shape)
    return weight_shape[0] // h, weight_shape[1] // w


def to_blocks(weight: Tensor, block_shape: BlockShape) -> Tensor:
    """View a weight as a grid of blocks, without copying.

    Args:
        weight: [O, I], any dtype, any device (including "meta").
        block_shape: (h, w), may hold -1.

    Returns:
        [R, C, h, w]. It shares memory with `weight`: writing to one writes to both.

    Raises:
        ValueError: if the blocks do not tile the weight exactly.

    Example:
        >>> to_blocks(torch.arange(8.).reshape(2, 4), (2, 2))[0, 1]
        tensor([[2., 3.],
                [6., 7.]])
    """
    rows, cols = weight.shape
    h, w = resolve_block_shape(block_shape, (rows, cols))
    return weight.unflatten(0, (rows // h, h)).unflatten(2, (cols // w, w)).transpose(1, 2)


def add_scaled_blocks_(
    target: Tensor, weight: Tensor, factors: Tensor, block_shape: BlockShape, alpha: float = 1.0
) -> Tensor:
    """Add alpha * factor * block to every block of another tensor, in place and without a copy.

    Args:
        target: [O, I], floating point, written to.
        weight: [O, I], of the same dtype.
        factors: [R, C], floating point.
        block_shape: (h, w), both positive.
        alpha: a number.

    Returns:
        The target.

    Example:
        >>> add_scaled_blocks_(torch.ones(1, 4), torch.ones(1, 4), torch.tensor([[1., 0.]]), (1, 2), alpha=0.5)
        tensor([[1.5000, 1.5000, 1.0000, 1.0000]])
    """
    h, w = block_shape
    onto, blocks = (tensor.unflatten(0, (-1, h)).unflatten(2, (-1, w)) for tensor in (target, weight))
    onto.addcmul_(blocks, factors.to(weight.dtype)[:, None, :, None], value=alpha)
    return target


def scale_blocks_(weight: Tensor, factors: Tensor, block_shape: BlockShape) -> Tensor:
    """Multiply every block of a weight by its own factor, in place.

    Args:
        weight: [O, I], floating point.
        factors: [R, C], bool (False sets a block to zero) or floating point.
        block_shape: (h, w), both positive.

    Returns:
        The weight.

    Example:
        >>> scale_blocks_(torch.ones(1, 4), torch.tensor([[True, False]]), (1, 2))
        tensor([[1., 1., 0., 0.]])
    """
    h, w = block_shape
    # In the weight's own order of memory, and by multiplication: several times as fast as filling under a mask.
    in_order = weight.unflatten(0, (-1, h)).unflatten(2, (-1, w))
    in_order.mul_(factors.to(weight.dtype)[:, None, :, None])
    return weight


def from_blocks(blocks: Tensor) -> Tensor:
    """Put a grid of blocks back together into a weight; the inverse of `to_blocks`.

    Args:
        blocks: [R, C, h, w].

    Returns:
        [R * h, C * w], contiguous.

    Example:
        >>> weight = torch.arange(12.).reshape(4, 3)
        >>> torch.equal(from_blocks(to_blocks(weight, (2, 3))), weight)
        True
    """
    grid_rows, grid_cols, h, w = blocks.shape
    return blocks.transpose(1, 2).reshape(grid_rows * h, grid_cols * w)


def block_norms(weight: Tensor, block_shape: BlockShape) -> Tensor:
    """Compute the L2 norm of every block, in float32 or better.

    Args:
        weight: [O, I], floating point.
        block_shape: (h, w), may hold -1.

    Returns:
        [R, C], >= 0; float64 for a float64 weight, float32 otherwise.

    Example:
        >>> block_norms(torch.tensor([[3., 4., 0., 0.]]), (1, 2))
        tensor([[5., 0.]])
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    h, w = resolve_block_shape(block_shape, (weight.shape[0], weight.shape[1]))
    if h == w == 1:
        return weight.to(wide).abs()
    bands = weight.unflatten(0, (-1, h))
    # Rows first, along whole lines of memory: 16 times as fast for h x 1 blocks as a norm over both sides at once.
    if weight.device.type == "cpu" and h <= _ROWS_ONE_BY_ONE:
        # Summed up row by row, no square of the whole weight is ever held, whose memory costs more than the sums.
        sums = bands[:, 0].to(wide).square()
        for row in range(1, h):
            line = bands[:, row].to(wide)
            sums.addcmul_(line, line)
    else:
        sums = bands.to(wide).square().sum(1)
    return (sums.unflatten(1, (-1, w)).sum(2) if w > 1 else sums).sqrt_()


def expand_mask(mask: Tensor, block_shape: BlockShape) -> Tensor:
    """Spread a block mask over the weights.

    Args:
        mask: [R, C] bool, True = keep.
        block_shape: (h, w), both positive.

    Returns:
        [R * h, C * w] bool.

    Example:
        >>> expand_mask(torch.tensor([[True, False]]), (1, 2))
        tensor([[ True,  True, False, False]])
    """
    h, w = block_shape
    return (
        mask[:, :, None, None].expand(*mask.shape, h, w).transpose(1, 2).reshape(mask.shape[0] * h, mask.shape[1] * w)
    )

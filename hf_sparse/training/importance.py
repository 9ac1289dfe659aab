"""What a block is worth: a score per block, higher = kept longer."""

from __future__ import annotations

from torch import Tensor

from hf_sparse.core.blocks import BlockShape, block_norms


def magnitude(weight: Tensor, block_shape: BlockShape) -> Tensor:
    """Score blocks by the root mean square of their weights.

    Inside one weight this ranks as the L2 norm does; dividing by the block size makes blocks of different shapes
    comparable under a global budget.

    Args:
        weight: [O, I].
        block_shape: (h, w), both positive.

    Returns:
        [R, C], >= 0, float32 (float64 for a float64 weight).

    Example:
        >>> import torch
        >>> magnitude(torch.tensor([[3., 3., 0., 0.]]), (1, 2))
        tensor([[3., 0.]])
    """
    return block_norms(weight, block_shape) / (block_shape[0] * block_shape[1]) ** 0.5

"""One weight, dense <-> stored (docs/format.md).

A stored weight is two tensors: the kept blocks in row-major order of the grid, and a bitmap with one bit per block.
Nothing here trusts a file: every function that reads checks what it was given and raises `FormatError`.

Shape letters: O, I out and in features; h, w block height and width; R, C grid rows and columns; N kept blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.core.bits import pack_bits
from hf_sparse.core.blocks import BlockShape, from_blocks, grid_shape, to_blocks
from hf_sparse.core.stored.formats import (
    FORMAT_VERSION,
    MASK_SUFFIX,
    MAX_WEIGHT_ELEMENTS,
    QUANT_METHOD,
    FormatError,
    LayerFormat,
    read_layer_formats,
    shortened,
    version_of,
)

__all__ = [
    "FORMAT_VERSION",
    "MASK_SUFFIX",
    "MAX_WEIGHT_ELEMENTS",
    "QUANT_METHOD",
    "FormatError",
    "LayerFormat",
    "pack",
    "pack_mask",
    "read_layer_formats",
    "shortened",
    "unpack",
    "unpack_mask",
    "version_of",
]

# The 8 bits of every byte as 8 bools, held in one number: looking them up is ten times as fast as shifting.
_BITS = ((torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu")) & 1).bool().view(torch.int64)
_BITS = _BITS[:, 0]


def pack_mask(mask: Tensor) -> Tensor:
    """Turn a block mask into a bitmap.

    Args:
        mask: [R, C] bool, True = keep.

    Returns:
        [ceil(R * C / 8)] uint8; block i of the row-major grid is bit i % 8, least significant first, of byte i // 8.
        Unused bits of the last byte are 0.

    Example:
        >>> pack_mask(torch.tensor([[True, False, True]]))
        tensor([5], dtype=torch.uint8)
    """
    return pack_bits(mask.reshape(-1))


def unpack_mask(bitmap: Tensor, grid: tuple[int, int]) -> Tensor:
    """Turn a bitmap back into a block mask; the inverse of `pack_mask`.

    Args:
        bitmap: [ceil(R * C / 8)] uint8.
        grid: (R, C).

    Returns:
        [R, C] bool.

    Raises:
        FormatError: if the bitmap has another dtype or length, or sets a bit beyond the grid.
    """
    num_blocks = grid[0] * grid[1]
    expected = ((num_blocks + 7) // 8,)
    if bitmap.dtype != torch.uint8 or tuple(bitmap.shape) != expected:
        raise FormatError(
            f"a bitmap for a {grid[0]} x {grid[1]} grid must be uint8 of shape {list(expected)}, "
            f"found {bitmap.dtype} of shape {list(bitmap.shape)}."
        )
    bits = torch.index_select(_BITS.to(bitmap.device), 0, bitmap.int()).view(torch.bool)
    if bits[num_blocks:].any():
        raise FormatError(f"the bitmap sets bits beyond the {num_blocks} blocks of its {grid[0]} x {grid[1]} grid.")
    return bits[:num_blocks].view(grid)


def pack(weight: Tensor, mask: Tensor, block_shape: BlockShape) -> tuple[Tensor, Tensor]:
    """Leave the pruned blocks of a weight out of storage.

    Args:
        weight: [O, I], any dtype.
        mask: [R, C] bool on the same device, True = keep.
        block_shape: (h, w), may hold -1.

    Returns:
        values [N, h, w] in the weight's dtype, bit for bit, contiguous, sharing no memory; bitmap as in `pack_mask`.

    Raises:
        ValueError: if the mask does not fit the grid.

    Example:
        >>> pack(torch.tensor([[1., 2., 3., 4.]]), torch.tensor([[False, True]]), (1, 2))
        (tensor([[[3., 4.]]]), tensor([2], dtype=torch.uint8))
    """
    blocks = to_blocks(weight, block_shape)
    if mask.dtype != torch.bool or mask.shape != blocks.shape[:2]:
        raise ValueError(
            f"the mask must be bool of shape {list(blocks.shape[:2])} for a weight {list(weight.shape)} in blocks of "
            f"{tuple(block_shape)}, found {mask.dtype} of shape {list(mask.shape)}."
        )
    return blocks[mask].contiguous(), pack_mask(mask)


def unpack(values: Tensor, bitmap: Tensor, dense_shape: tuple[int, int]) -> Tensor:
    """Put stored blocks back into a dense weight; the inverse of `pack`.

    Args:
        values: [N, h, w].
        bitmap: uint8, as in `pack_mask`, with N bits set.
        dense_shape: (O, I).

    Returns:
        [O, I], values' dtype and device, zero where blocks were left out. Differentiable in `values`.

    Raises:
        FormatError: if the bitmap does not fit the grid or does not have exactly N bits set.
    """
    if values.ndim != 3:
        raise FormatError(f"stored values must have 3 dimensions [kept, h, w], found shape {list(values.shape)}.")
    block_shape = (values.shape[1], values.shape[2])
    mask = unpack_mask(bitmap, grid_shape(dense_shape, block_shape))
    if (population := int(mask.sum())) != values.shape[0]:
        raise FormatError(f"the bitmap keeps {population} blocks, but {values.shape[0]} are stored.")
    blocks = values.new_zeros(*mask.shape, *block_shape)
    return from_blocks(blocks.index_put((mask,), values))

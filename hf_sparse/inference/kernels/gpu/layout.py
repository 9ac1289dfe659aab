"""What the GPU kernels read: the values as they are stored, and for each band of output rows which blocks it has.

Nothing is copied: a kernel computes from a block's number where its values lie. The same description serves both
directions. Forward, a band is a row of the grid, its blocks follow each other in memory, and the sum runs over input
columns. Backward (the gradient of x), a band is a column of the grid, its blocks are found through a list, and the sum
runs over output rows.

Shape letters: O, I out and in features; h, w block height and width; N kept blocks; R, C rows and columns of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_sparse.core.stored.packing import FormatError
from hf_sparse.inference.kernels.registry import BlockIndex

MAX_INDEX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Side:
    """The blocks of a weight, band by band, in one direction.

    Attributes:
        table: [bands, 3] int32, a line for each band: its number, its first entry in the next two, and how many it has
            there. Longest first, so that a wave of programs ends together.
        block: [N] int32, number of each block in `values`; None where it is the entry's own number.
        column: [N] int32, the block's place in the direction that is summed over, in blocks.
        height: rows of a band.
        width: what a block adds to the sum.
        stride_row, stride_inner: elements of `values` between neighbours along height and along width.
        features: of x, whose products are summed.
    """

    table: Tensor
    block: Tensor | None
    column: Tensor
    height: int
    width: int
    stride_row: int
    stride_inner: int
    features: int

    @property
    def bands(self) -> int:
        """Number of bands."""
        return self.table.shape[0]


@dataclass(frozen=True, eq=False)
class GpuWeight:
    """A weight, ready for the GPU kernels.

    Attributes:
        values: [N, h, w], contiguous; the layer's own storage where that was contiguous.
        forward: bands of output rows.
        index: where the blocks belong.
        launches: what was found out about earlier calls, by what they have in common.
    """

    values: Tensor
    forward: Side
    index: BlockIndex
    launches: dict[Any, Any] = field(default_factory=dict)

    @property
    def backward(self) -> Side:
        """Bands of input columns; made when first asked for."""
        if "backward" not in self.launches:
            self.launches["backward"] = backward_side(self.index)
        return self.launches["backward"]

    @property
    def density(self) -> float:
        """Fraction of blocks kept, [0, 1]."""
        return self.index.layer.kept / self.index.layer.num_blocks


def to_gpu(values: Tensor, index: BlockIndex) -> GpuWeight:
    """Describe a weight to the kernels.

    Args:
        values: [N, h, w].
        index: where the blocks belong.

    Raises:
        FormatError: if the index does not fit 32 bits, or the values do not belong to it.
    """
    layer = index.layer
    if tuple(values.shape) != layer.values_shape or index.rows.numel() != values.shape[0]:
        raise FormatError(
            f"values {list(values.shape)} and an index of {index.rows.numel()} blocks do not fit a layer of "
            f"{list(layer.values_shape)} values."
        )
    if max(*layer.dense_shape, values.shape[0] * max(layer.block_shape)) > MAX_INDEX:
        raise FormatError(f"{values.shape[0]} blocks of {layer.block_shape} do not fit 32-bit indices.")
    weight = GpuWeight(values.detach().contiguous(), forward_side(index), index)
    if values.is_cuda and not torch.cuda.is_current_stream_capturing():
        # Programs read the weight before the work ahead of them has ended: whatever made it has to have ended first.
        torch.cuda.current_stream(values.device).synchronize()
    return weight


def forward_side(index: BlockIndex) -> Side:
    """List the blocks of every band of output rows.

    Example:
        >>> from hf_sparse.core.stored.packing import LayerFormat
        >>> layer = LayerFormat(block_shape=(8, 4), kept=3, dense_shape=(24, 8))
        >>> side = forward_side(BlockIndex(layer, torch.tensor([0, 2, 2]), torch.tensor([1, 0, 1])))
        >>> side.table.tolist(), side.column.tolist()
        ([[2, 1, 2], [0, 0, 1], [1, 1, 0]], [1, 0, 1])
    """
    (height, width), bands = index.layer.block_shape, index.layer.grid[0]
    table = _table(index.rows, bands)
    return Side(table, None, index.cols.int(), height, width, width, 1, index.layer.dense_shape[1])


def backward_side(index: BlockIndex) -> Side:
    """List the blocks of every band of input columns."""
    (height, width), bands = index.layer.block_shape, index.layer.grid[1]
    block = torch.argsort(index.cols, stable=True)
    table, rows = _table(index.cols, bands), index.rows[block].int()
    return Side(table, block.int(), rows, width, height, 1, width, index.layer.dense_shape[0])


def _table(of_block: Tensor, bands: int) -> Tensor:
    counts = torch.bincount(of_block, minlength=bands)
    order = torch.argsort(counts, descending=True, stable=True)
    first = counts.cumsum(0) - counts
    return torch.stack([order, first[order], counts[order]], 1).int()

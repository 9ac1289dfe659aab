"""Weights in bands of columns: the layout that the native kernels read.

A block of h rows x w columns is w adjacent columns of a band of h rows, so that every block shape is one layout: for
each band the input columns that it keeps, and for each of those h weights. Blocks h x 1 are stored in it already.

Kernels that multiply pairs of bfloat16 take two columns per step: neighbours 2c and 2c + 1 where w is even, otherwise
couples of any two, with a weight of zero to fill up a band of odd length.

Shape letters: O, I out and in features; h, w block height and width; R bands; N kept blocks; K = N * w kept columns;
S steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.core.packing import FormatError
from hf_sparse.inference.kernels.registry import BlockIndex

MAX_INDEX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Bands:
    """A weight in bands.

    Attributes:
        values: [S, h] float32, or [S, h, 2] bfloat16 for pairs.
        band_start: [R + 1] int32; band r takes the steps band_start[r] to band_start[r + 1].
        column: [S] int32, the column of each step, or half the first one for neighbours; [S, 2] for couples.
    """

    values: Tensor
    band_start: Tensor
    column: Tensor

    @property
    def kind(self) -> str:
        """How the native library calls the layout: "single", "neighbours" or "couples"."""
        if self.values.ndim == 2:
            return "single"
        return "neighbours" if self.column.ndim == 1 else "couples"


def to_bands(values: Tensor, index: BlockIndex, pairs: bool) -> Bands:
    """Lay stored blocks out in bands.

    Args:
        values: [N, h, w] on the CPU, float32 or bfloat16.
        index: where they belong.
        pairs: True for pairs of bfloat16. Otherwise float32 weights, one column per step; blocks of width 1 and
            dtype float32 then share the memory of `values`.

    Raises:
        FormatError: if the weight has too many columns for 32-bit indices.

    Example:
        >>> from hf_sparse.core.packing import LayerFormat
        >>> layer = LayerFormat(block_shape=(1, 1), kept=3, dense_shape=(2, 9))
        >>> index = BlockIndex(layer=layer, rows=torch.tensor([0, 1, 1]), cols=torch.tensor([8, 0, 5]))
        >>> bands = to_bands(torch.tensor([4.0, 5.0, 6.0]).view(3, 1, 1), index, pairs=False)
        >>> bands.band_start.tolist(), bands.column.tolist(), bands.values.tolist()
        ([0, 1, 3], [8, 0, 5], [[4.0], [5.0], [6.0]])
    """
    height, width = index.layer.block_shape
    if max(index.cols.numel() * width, *index.layer.dense_shape) > MAX_INDEX:
        raise FormatError(
            f"{index.cols.numel()} kept blocks of {height} x {width} in a weight {index.layer.dense_shape} do not fit "
            f"32-bit indices."
        )
    counts = torch.bincount(index.rows, minlength=index.layer.grid[0]) * width
    if not pairs:
        packed = values.detach().transpose(1, 2).reshape(-1, height)
        return Bands(packed.to(torch.float32).contiguous(), _starts(counts), _columns(index.cols, width))
    halves = values.detach().to(torch.bfloat16)
    if width % 2 == 0:
        packed = halves.unflatten(2, (width // 2, 2)).transpose(1, 2).reshape(-1, height, 2)
        return Bands(packed.contiguous(), _starts(counts // 2), _columns(index.cols, width // 2))
    return _couples(halves.transpose(1, 2).reshape(-1, height), counts, _columns(index.cols, width))


def _couples(values: Tensor, counts: Tensor, column: Tensor) -> Bands:
    # values [K, h] and column [K] of all bands in turn; an odd band gets its last column again, with weights of zero.
    starts = _starts((counts + 1) // 2)
    band = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    rank = torch.arange(column.numel()) - (counts.cumsum(0) - counts)[band]
    place = 2 * starts.long()[band] + rank
    steps = int(starts[-1])
    packed = values.new_zeros(2 * steps, values.shape[1])
    packed[place] = values
    columns = column.new_zeros(2 * steps)
    columns[place] = column
    odd = (counts % 2).bool()
    last = 2 * starts.long()[1:][odd] - 1
    columns[last] = columns[last - 1]
    return Bands(packed.view(steps, 2, -1).transpose(1, 2).contiguous(), starts, columns.view(steps, 2))


def _starts(counts: Tensor) -> Tensor:
    starts = torch.zeros(counts.numel() + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=starts[1:])
    return starts.int()


def _columns(cols: Tensor, width: int) -> Tensor:
    return (cols[:, None] * width + torch.arange(width)).reshape(-1).int()

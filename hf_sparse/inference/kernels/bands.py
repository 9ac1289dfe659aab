"""Weights in bands of columns: the layout that the native kernels read.

A block of h rows x w columns is w adjacent columns of a band of h rows, so that every block shape is one layout: for
each band the input columns that it keeps, and for each of those h weights. Blocks h x 1 are stored in it already.

Kernels that multiply pairs of bfloat16 take two columns per step: neighbours 2c and 2c + 1 where w is even, otherwise
couples of any two, with a weight of zero to fill up a band of odd length. Row segments 1 x w are vectors as they
stand: a step is as many of their columns as fill a register.

Matrix tiles multiply 16 pairs at once: a band of pairs is laid out for them in chunks, a second time.

Shape letters: O, I out and in features; h, w block height and width; R bands; N kept blocks; K = N * w kept columns;
S steps; V columns of a segment step; C chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.core.stored.packing import FormatError
from hf_sparse.inference.kernels.registry import BlockIndex

MAX_INDEX = 2**31 - 1
CHUNK = 16


@dataclass(frozen=True, eq=False)
class Chunks:
    """Pairs in chunks of 16; a chunk that a band does not fill repeats its last columns, with weights of zero.

    Attributes:
        values: [C, h, 16, 2] bfloat16.
        start: [R + 1] int32; band r takes the chunks start[r] to start[r + 1].
        column: [C, 16] int32, half the first column of each pair; [C, 16, 2] for couples.
    """

    values: Tensor
    start: Tensor
    column: Tensor


@dataclass(frozen=True, eq=False)
class Bands:
    """A weight in bands.

    Attributes:
        values: [S, h] float32; [S, h, 2] bfloat16 for pairs; [S, 1, V] float32 for segments.
        band_start: [R + 1] int32; band r takes the steps band_start[r] to band_start[r + 1].
        column: [S] int32, the column of each step, the first one for segments, half the first for neighbours; [S, 2]
            for couples.
        chunks: the same for matrix tiles; None where there is no need.
    """

    values: Tensor
    band_start: Tensor
    column: Tensor
    chunks: Chunks | None = None

    @property
    def kind(self) -> str:
        """How the native library calls the layout: "single", "neighbours", "couples" or "segments"."""
        if self.values.dtype == torch.bfloat16:
            return "neighbours" if self.column.ndim == 1 else "couples"
        return "single" if self.values.ndim == 2 else "segments"


def to_bands(values: Tensor, index: BlockIndex, *, lanes: int = 0, pairs: bool = False) -> Bands:
    """Lay stored blocks out in bands.

    Args:
        values: [N, h, w] on the CPU, float32 or bfloat16. Float32 blocks of width 1 or height 1 are not copied.
        index: where they belong.
        lanes: floats in a register, 4, 8 or 16: segments are made of blocks of height 1 whose width is a multiple
            of 4. 0 makes none.
        pairs: whether to make pairs of bfloat16 of what is no segment.

    Raises:
        FormatError: if the weight has too many columns for 32-bit indices.

    Example:
        >>> from hf_sparse.core.stored.packing import LayerFormat
        >>> layer = LayerFormat(block_shape=(1, 1), kept=3, dense_shape=(2, 9))
        >>> index = BlockIndex(layer=layer, rows=torch.tensor([0, 1, 1]), cols=torch.tensor([8, 0, 5]))
        >>> bands = to_bands(torch.tensor([4.0, 5.0, 6.0]).view(3, 1, 1), index)
        >>> bands.band_start.tolist(), bands.column.tolist(), bands.values.tolist()
        ([0, 1, 3], [8, 0, 5], [[4.0], [5.0], [6.0]])
    """
    height, width = index.layer.block_shape
    if max(index.cols.numel() * width, *index.layer.dense_shape) > MAX_INDEX:
        raise FormatError(
            f"{index.cols.numel()} kept blocks of {height} x {width} in a weight {index.layer.dense_shape} do not fit "
            f"32-bit indices."
        )
    values, counts = values.detach(), torch.bincount(index.rows, minlength=index.layer.grid[0])
    segment = next((v for v in (16, 8, 4) if v <= lanes and height == 1 and width % v == 0), 0)
    if segment:
        packed = values.reshape(-1, 1, segment).to(torch.float32).contiguous()
        starts = _starts(counts * (width // segment))
        return Bands(packed, starts, _columns(index.cols, width, step=segment))
    if not pairs:
        packed = values.transpose(1, 2).reshape(-1, height).to(torch.float32).contiguous()
        return Bands(packed, _starts(counts * width), _columns(index.cols, width))
    halves = values.to(torch.bfloat16)
    if width % 2 == 0:
        packed = halves.unflatten(2, (width // 2, 2)).transpose(1, 2).reshape(-1, height, 2).contiguous()
        return Bands(packed, _starts(counts * (width // 2)), _columns(index.cols, width // 2))
    return _couples(halves.transpose(1, 2).reshape(-1, height), counts * width, _columns(index.cols, width))


def to_chunks(bands: Bands) -> Chunks:
    """Lay pairs out for matrix tiles.

    Args:
        bands: of kind "neighbours" or "couples".
    """
    first, counts = bands.band_start[:-1].long(), bands.band_start.diff().long()
    start = _starts((counts + CHUNK - 1) // CHUNK)
    band = torch.repeat_interleave(torch.arange(counts.numel()), CHUNK * start.diff())
    step = first[band] + torch.arange(band.numel()) - CHUNK * start.long()[band]
    last = (first + counts - 1)[band]
    real, chunks = torch.minimum(step, last), int(start[-1])
    values = bands.values[real].masked_fill((step > last)[:, None, None], 0)
    return Chunks(
        values=values.unflatten(0, (chunks, CHUNK)).transpose(1, 2).contiguous(),
        start=start,
        column=bands.column[real].unflatten(0, (chunks, CHUNK)),
    )


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
    return Bands(packed.view(steps, 2, values.shape[1]).transpose(1, 2).contiguous(), starts, columns.view(steps, 2))


def _starts(counts: Tensor) -> Tensor:
    starts = torch.zeros(counts.numel() + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=starts[1:])
    return starts.int()


def _columns(cols: Tensor, width: int, step: int = 1) -> Tensor:
    return (cols[:, None] * width + torch.arange(0, width, step)).reshape(-1).int()

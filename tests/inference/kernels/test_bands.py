"""The layout of the native kernels, decoded by hand and compared with the dense weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_sparse.core.stored.packing import FormatError, LayerFormat
from hf_sparse.inference.kernels.bands import CHUNK, Bands, to_bands, to_chunks
from hf_sparse.inference.kernels.reference import to_dense
from hf_sparse.inference.kernels.registry import BlockIndex
from tests.inference.kernels.conftest import random_layer


def decode(bands: Bands, dense_shape: tuple[int, int]) -> Tensor:
    """Lay bands out as [O, I], one step at a time."""
    dense = torch.zeros(dense_shape)
    height = bands.values.shape[1]
    for band in range(bands.band_start.numel() - 1):
        rows = slice(band * height, (band + 1) * height)
        for step in range(int(bands.band_start[band]), int(bands.band_start[band + 1])):
            column, values = bands.column[step], bands.values[step].float()
            if bands.kind == "single":
                dense[rows, column] += values
            elif bands.kind == "segments":
                dense[rows, column : column + values.shape[1]] += values
            else:
                pair = [2 * int(column), 2 * int(column) + 1] if bands.kind == "neighbours" else column.tolist()
                for half in (0, 1):
                    dense[rows, pair[half]] += values[:, half]
    return dense


@pytest.mark.parametrize("density", [0.0, 0.15, 0.5, 1.0])
@pytest.mark.parametrize(
    ("dense_shape", "block_shape"),
    [
        *(((8, 7), (1, 1)), ((24, 30), (8, 1)), ((24, 30), (8, 2)), ((12, 24), (4, 4)), ((12, 30), (4, 3))),
        *(((3, 20), (1, 5)), ((64, 32), (32, 32)), ((4, 6), (4, 6)), ((1, 1), (1, 1))),
    ],
)
def test_bands_hold_the_weight(dense_shape: tuple[int, int], block_shape: tuple[int, int], density: float) -> None:
    for seed in range(3):
        values, index = random_layer(dense_shape, block_shape, density, seed=seed, dtype=torch.bfloat16)
        expected = to_dense(values, index).float()
        single, pairs = to_bands(values, index), to_bands(values, index, pairs=True)
        assert single.kind == "single" and single.values.dtype == torch.float32
        assert pairs.kind == ("couples" if block_shape[1] % 2 else "neighbours")
        for bands in (single, pairs):
            assert torch.equal(decode(bands, dense_shape), expected)
            assert bands.column.dtype == bands.band_start.dtype == torch.int32
        kept = values.shape[0] * block_shape[1]
        assert single.values.shape == (kept, block_shape[0])
        assert kept <= 2 * pairs.values.shape[0] <= kept + index.layer.grid[0]


@pytest.mark.parametrize("density", [0.0, 0.15, 0.5, 1.0])
@pytest.mark.parametrize(
    ("dense_shape", "block_shape"),
    [((24, 66), (8, 1)), ((24, 66), (8, 2)), ((3, 65), (1, 5)), ((64, 64), (32, 32)), ((1, 1), (1, 1))],
)
def test_chunks_are_the_bands_filled_up(
    dense_shape: tuple[int, int], block_shape: tuple[int, int], density: float
) -> None:
    values, index = random_layer(dense_shape, block_shape, density, seed=0, dtype=torch.bfloat16)
    bands = to_bands(values, index, pairs=True)
    chunks = to_chunks(bands)
    steps = bands.band_start.diff()
    assert torch.equal(chunks.start.diff(), (steps + CHUNK - 1) // CHUNK) and int(chunks.start[0]) == 0
    filled = Bands(
        chunks.values.transpose(1, 2).reshape(-1, block_shape[0], 2),
        chunks.start * CHUNK,
        chunks.column.flatten(0, 1),
    )
    assert torch.equal(decode(filled, dense_shape), to_dense(values, index).float())
    for band, (first, last) in enumerate(zip(bands.band_start[:-1], bands.band_start[1:], strict=True)):
        kept = bands.column[first:last]
        held = filled.column[int(filled.band_start[band]) : int(filled.band_start[band + 1])]
        assert torch.equal(held[: len(kept)], kept)
        assert bool((held[len(kept) :] == kept[-1:]).all()), "a chunk reads a column that its band does not keep"


@pytest.mark.parametrize(("width", "lanes", "step"), [(4, 16, 4), (8, 4, 4), (24, 8, 8), (24, 16, 8), (32, 16, 16)])
def test_segments_fill_registers(width: int, lanes: int, step: int) -> None:
    for density in (0.0, 0.3, 1.0):
        values, index = random_layer((10, 96), (1, width), density, seed=0, dtype=torch.float32)
        bands = to_bands(values, index, lanes=lanes, pairs=True)
        assert bands.kind == "segments" and bands.values.shape[1:] == (1, step)
        assert torch.equal(decode(bands, (10, 96)), to_dense(values, index))
        assert bands.values.data_ptr() == values.data_ptr()


def test_what_is_no_segment() -> None:
    for block, lanes in (((1, 6), 16), ((2, 8), 16), ((1, 8), 0)):
        values, index = random_layer((12, 24), block, 0.5, seed=0, dtype=torch.float32)
        assert to_bands(values, index, lanes=lanes).kind == "single"


def test_a_weight_too_large_for_32_bit_indices_is_refused() -> None:
    layer = LayerFormat(block_shape=(1, 2**20), kept=2**11, dense_shape=(2**11, 2**20))
    index = BlockIndex(layer=layer, rows=torch.arange(2**11), cols=torch.zeros(2**11, dtype=torch.int64))
    values = torch.zeros(1, 1, 1).expand(2**11, 1, 2**20)
    with pytest.raises(FormatError, match="2048 kept blocks of 1 x 1048576 .* do not fit 32-bit indices"):
        to_bands(values, index)

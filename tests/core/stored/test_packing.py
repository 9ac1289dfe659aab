from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_sparse.core.blocks import expand_mask, grid_shape
from hf_sparse.core.stored.packing import (
    FormatError,
    LayerFormat,
    pack,
    pack_mask,
    read_layer_formats,
    unpack,
    unpack_mask,
)

GRIDS = [(1, 1), (1, 7), (1, 8), (3, 3), (5, 13), (16, 16)]
ENTRY = {"block_shape": [2, 1], "kept": 3, "dense_shape": [4, 4]}


def random_mask(grid: tuple[int, int], density: float = 0.4, seed: int = 0) -> torch.Tensor:
    return torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < density


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_bitmaps_are_bits_least_significant_first(grid: tuple[int, int], density: float) -> None:
    mask = random_mask(grid, density + (density == 1.0))
    bitmap = pack_mask(mask)
    number = sum(int(keep) << i for i, keep in enumerate(mask.flatten().tolist()))
    assert bytes(bitmap.tolist()) == number.to_bytes((mask.numel() + 7) // 8, "little")
    assert bitmap.dtype == torch.uint8
    assert torch.equal(unpack_mask(bitmap, grid), mask)


def test_bitmaps_of_masks_with_any_strides() -> None:
    mask = random_mask((6, 10)).t()
    assert torch.equal(unpack_mask(pack_mask(mask), (10, 6)), mask)


@pytest.mark.parametrize(
    ("bitmap", "message"),
    [
        (torch.zeros(2, dtype=torch.uint8), r"a 3 x 3 grid .*\[2\], found torch.uint8 of shape \[2\]|beyond"),
        (torch.zeros(1, dtype=torch.uint8), r"must be uint8 of shape \[2\], found torch.uint8 of shape \[1\]"),
        (torch.zeros(3, dtype=torch.uint8), r"found torch.uint8 of shape \[3\]"),
        (torch.zeros(2, dtype=torch.int8), "found torch.int8"),
        (torch.zeros(1, 2, dtype=torch.uint8), r"of shape \[1, 2\]"),
        (torch.tensor([0, 2], dtype=torch.uint8), "sets bits beyond the 9 blocks of its 3 x 3 grid"),
        (torch.tensor([255, 255], dtype=torch.uint8), "sets bits beyond"),
    ],
)
def test_bitmaps_that_do_not_fit(bitmap: torch.Tensor, message: str) -> None:
    if bitmap.shape == (2,) and bitmap.dtype == torch.uint8 and not bitmap.any():
        assert not unpack_mask(bitmap, (3, 3)).any()
        return
    with pytest.raises(FormatError, match=message):
        unpack_mask(bitmap, (3, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8], ids=str)
@pytest.mark.parametrize("block", [(8, 1), (1, 8), (4, 2), (24, 16), (1, 1), (24, 1), (1, 16)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.1])
def test_packing_is_bit_exact(dtype: torch.dtype, block: tuple[int, int], density: float) -> None:
    weight = (torch.randn(24, 16, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    mask = random_mask(grid_shape((24, 16), block), density)
    values, bitmap = pack(weight, mask, block)
    assert values.shape == (int(mask.sum()), *block)
    assert values.dtype == dtype
    assert values.is_contiguous()
    expected = weight.masked_fill(~expand_mask(mask, block), 0)
    assert torch.equal(unpack(values, bitmap, (24, 16)), expected)


def test_values_keep_odd_bits() -> None:
    weight = torch.tensor([[-0.0, float("nan"), 1e-45, float("inf")]])
    values, _ = pack(weight, torch.tensor([[True, True]]), (1, 2))
    assert torch.equal(values.flatten().view(torch.int32), weight.flatten().view(torch.int32))


def test_values_are_in_row_major_order_of_the_grid() -> None:
    weight = torch.arange(16.0).reshape(4, 4)
    values, bitmap = pack(weight, torch.tensor([[True, False], [True, True]]), (2, 2))
    assert values.tolist() == [[[0, 1], [4, 5]], [[8, 9], [12, 13]], [[10, 11], [14, 15]]]
    assert bitmap.tolist() == [0b1101]


def test_values_share_no_memory() -> None:
    weight = torch.ones(2, 2)
    values, _ = pack(weight, torch.ones(1, 1, dtype=torch.bool), (2, 2))
    weight.zero_()
    assert values.sum() == 4


def test_unpack_has_a_gradient() -> None:
    values, bitmap = pack(torch.ones(4, 4), torch.tensor([[True, False], [False, True]]), (2, 2))
    values.requires_grad_()
    (unpack(values, bitmap, (4, 4)) * torch.arange(16.0).reshape(4, 4)).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[[0, 1], [4, 5]], [[10, 11], [14, 15]]]


def test_masks_that_do_not_fit_the_weight() -> None:
    with pytest.raises(
        ValueError, match=r"must be bool of shape \[2, 4\] for a weight \[4, 4\] in blocks of \(2, 1\)"
    ):
        pack(torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bool), (2, 1))
    with pytest.raises(ValueError, match="found torch.float32 of shape"):
        pack(torch.ones(4, 4), torch.ones(2, 4), (2, 1))


def test_values_that_do_not_fit_the_bitmap() -> None:
    values, bitmap = pack(torch.ones(4, 4), torch.tensor([[True, False], [False, True]]), (2, 2))
    with pytest.raises(FormatError, match="keeps 2 blocks, but 1 are stored"):
        unpack(values[:1], bitmap, (4, 4))
    with pytest.raises(FormatError, match=r"3 dimensions \[kept, h, w\], found shape \[2, 4\]"):
        unpack(values.flatten(1), bitmap, (4, 4))


def test_layer_format_counts() -> None:
    layer = LayerFormat(block_shape=(3, 5), kept=7, dense_shape=(9, 25))
    assert layer.grid == (3, 5)
    assert layer.num_blocks == 15
    assert layer.mask_bytes == 2
    assert layer.values_shape == (7, 3, 5)


EXPERTS = {"block_shape": [2, 1], "kept": 3, "dense_shape": [3, 4, 4]}


@pytest.mark.parametrize(
    "entry", [EXPERTS, ENTRY, {**ENTRY, "transposed": 1}, {**ENTRY, "kept": 0}, {**ENTRY, "kept": 8}]
)
def test_layer_format_round_trip(entry: dict[str, Any]) -> None:
    assert LayerFormat.from_dict("q", entry).to_dict() == entry


def test_layer_format_writes_transposed_only_where_true() -> None:
    assert LayerFormat.from_dict("q", {**ENTRY, "transposed": 0}).to_dict() == ENTRY


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "found NoneType"),
        ([2, 1, 3], "found list"),
        ({}, r"must hold \['block_shape', 'dense_shape', 'kept'\]"),
        ({k: v for k, v in ENTRY.items() if k != "kept"}, r"found \['block_shape', 'dense_shape'\]"),
        ({**ENTRY, "dtype": "F32"}, "'dtype'"),
        ({**ENTRY, "kept": 9}, r"kept=9, but the grid \(2, 4\) has 8 blocks"),
        ({**ENTRY, "kept": -1}, "kept=-1"),
        ({**ENTRY, "kept": True}, "'kept' must be a plain integer, found True"),
        ({**ENTRY, "kept": 3.0}, "found 3.0"),
        ({**ENTRY, "kept": "3"}, "found '3'"),
        ({**ENTRY, "block_shape": [2]}, r"'block_shape' must be two integers, found \[2\]"),
        ({**ENTRY, "block_shape": [2, 1, 1]}, "must be two integers"),
        ({**ENTRY, "block_shape": 2}, "must be two integers, found 2"),
        ({**ENTRY, "block_shape": [2, 1.0]}, "must be a plain integer"),
        ({**ENTRY, "dense_shape": [4]}, r"'dense_shape' must be two or three integers, found \[4\]"),
        ({**ENTRY, "dense_shape": [1, 2, 3, 4]}, "must be two or three integers"),
        ({**ENTRY, "dense_shape": [8, 1, 4]}, r"do not tile a weight of \[1, 4\], one of each expert"),
        ({**ENTRY, "dense_shape": [2, 4, 4], "transposed": 1}, "'transposed' does not go with the experts of"),
        ({**ENTRY, "block_shape": [0, 1]}, "must be positive"),
        ({**ENTRY, "block_shape": [-1, 1]}, "must be positive"),
        ({**ENTRY, "block_shape": [3, 1]}, r"blocks of \[3, 1\] do not tile a weight of \[4, 4\]"),
        ({**ENTRY, "dense_shape": [4, 0]}, "must be positive"),
        ({**ENTRY, "dense_shape": [2**21, 2**20]}, "at most 1099511627776 weights"),
        ({**ENTRY, "dense_shape": [10**30, 4]}, "at most"),
        ({**ENTRY, "transposed": 2}, "'transposed' must be 0 or 1, found 2"),
        ({**ENTRY, "transposed": False}, "must be 0 or 1, found False"),
    ],
)
def test_layer_format_refuses(entry: Any, message: str) -> None:
    with pytest.raises(FormatError, match=rf"modules\['q'\].*{message}"):
        LayerFormat.from_dict("q", entry)


CONFIG = {"quant_method": "hf_sparse", "format_version": 1, "modules": {"q": ENTRY}}


def test_configs_are_read() -> None:
    assert read_layer_formats(CONFIG) == {"q": LayerFormat(block_shape=(2, 1), kept=3, dense_shape=(4, 4))}
    assert read_layer_formats({**CONFIG, "modules": {}, "dequantize": True}) == {}
    fused = LayerFormat(block_shape=(2, 1), kept=3, dense_shape=(12, 4), experts=3)
    assert read_layer_formats({**CONFIG, "format_version": 2, "modules": {"q": ENTRY, "e": EXPERTS}})["e"] == fused
    assert (fused.num_blocks, fused.stored_shape) == (24, (3, 4, 4))
    assert (fused.weight_key("e"), fused.mask_key("e")) == ("e", "e_block_mask")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "must hold quant_method 'hf_sparse', found None"),
        ({**CONFIG, "quant_method": "awq"}, "must hold quant_method 'hf_sparse', found {'quant_method': 'awq'"),
        ({k: v for k, v in CONFIG.items() if k != "format_version"}, "must be an integer from 1, found None"),
        (
            {**CONFIG, "format_version": 3, "modules": 5, "new": 1},
            "format_version 3 is newer .*up to 2: pip install -U",
        ),
        ({**CONFIG, "format_version": True}, "must be an integer from 1, found True"),
        ({**CONFIG, "format_version": 0}, "must be an integer from 1, found 0"),
        ({**CONFIG, "modules": {"e": EXPERTS}}, r"modules\['e'\]: 'dense_shape' must be two integers"),
        ({**CONFIG, "bits": 4}, "format 1 has no key 'bits'"),
        ({**CONFIG, "dequantize": 1}, "dequantize must be true or false, found 1"),
        ({k: v for k, v in CONFIG.items() if k != "modules"}, "modules must map layer names to shapes, found None"),
        ({**CONFIG, "modules": {1: ENTRY}}, "modules must map layer names to shapes, found {1"),
        ({**CONFIG, "modules": ["x" * 500]}, r"found \['x{70,80}\.\.\."),
        ({**CONFIG, "modules": {"q": {}}}, r"modules\['q'\] must hold"),
    ],
)
def test_configs_that_are_refused(config: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_layer_formats(config)

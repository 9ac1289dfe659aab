"""Masks at one bit per block: packed and unpacked without loss, small layers together and large ones alone."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_sparse.core import bits
from hf_sparse.core.bits import Bitmap, Masks, masks_as_factors, pack_bits, unpack_bits
from hf_sparse.core.stored.packing import pack_mask, unpack_mask

DTYPES = (torch.bool, torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random_mask(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.4


@pytest.mark.parametrize("count", [1, 7, 8, 9, 255, 256, 1000])
def test_bits_come_back(count: int) -> None:
    for flat in (random_mask(count), torch.zeros(count, dtype=torch.bool), torch.ones(count, dtype=torch.bool)):
        packed = pack_bits(flat)
        assert packed.dtype == torch.uint8 and len(packed) == -(-count // 8)
        # By hand: bit i % 8 of byte i // 8.
        assert [bool(packed[i // 8].item() >> (i % 8) & 1) for i in range(count)] == flat.tolist()
        for dtype in DTYPES:
            assert torch.equal(unpack_bits(packed, count, dtype), flat.to(dtype))


def test_every_byte_is_spread_out_as_it_is_written() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    expected = [bool(byte >> bit & 1) for byte in range(256) for bit in range(8)]
    assert unpack_bits(packed, 2048).tolist() == expected
    assert torch.equal(pack_bits(unpack_bits(packed, 2048)), packed)


def test_the_layout_is_that_of_the_file_format() -> None:
    mask = random_mask(5, 7)
    bitmap = Bitmap(mask)
    assert torch.equal(bitmap.bits, pack_mask(mask))
    assert torch.equal(unpack_mask(bitmap.bits, (5, 7)), mask)
    assert torch.equal(bitmap.mask(), mask) and bitmap.num_blocks == 35
    assert torch.equal(Bitmap(mask.t()).mask(), mask.t()), "not contiguous"
    bitmap.mask().fill_(True)
    assert torch.equal(copy.deepcopy(bitmap).mask(), mask)


def test_masks_are_a_mapping_of_new_tensors() -> None:
    given = {"a": random_mask(3, 3), "b": random_mask(2, 9, seed=1)}
    masks = Masks({name: Bitmap(mask) for name, mask in given.items()})
    assert list(masks) == ["a", "b"] and len(masks) == 2
    assert all(torch.equal(masks[name], mask) for name, mask in given.items())
    assert masks["a"] is not masks["a"]


@pytest.mark.parametrize("together", [1, 20, 40, 10**6])
def test_factors_of_many_masks(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr(bits, "_TOGETHER", together)
    masks = {str(i): random_mask(*shape, seed=i) for i, shape in enumerate([(3, 3), (4, 8), (1, 1), (5, 1), (9, 9)])}
    bitmaps = {name: Bitmap(mask) for name, mask in masks.items()}
    calls: list[int] = []

    def counted(packed: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
        calls.append(count)
        return unpack_bits(packed, count, dtype)

    monkeypatch.setattr(bits, "unpack_bits", counted)
    found = dict(masks_as_factors(bitmaps, torch.float32))
    assert list(found) == list(masks)
    assert all(torch.equal(found[name], mask.float()) for name, mask in masks.items())
    assert len(calls) == {1: 5, 20: 4, 40: 3, 10**6: 1}[together]
    assert not list(masks_as_factors({}, torch.float32))

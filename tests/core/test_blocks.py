from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_sparse.core.blocks import (
    add_scaled_blocks_,
    block_norms,
    expand_mask,
    from_blocks,
    grid_shape,
    resolve_block_shape,
    scale_blocks_,
    to_blocks,
)

SHAPES = [(8, 1), (1, 8), (4, 2), (24, 16), (24, 1), (1, 16), (1, 1), (3, 2)]
WEIGHT = (24, 16)


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(WEIGHT, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("block", SHAPES, ids=str)
def test_blocks_are_the_rectangles_of_the_weight(block: tuple[int, int]) -> None:
    w, (h, k) = weight(), block
    blocks = to_blocks(w, block)
    assert blocks.shape == (24 // h, 16 // k, h, k)
    for r in range(blocks.shape[0]):
        for c in range(blocks.shape[1]):
            assert torch.equal(blocks[r, c], w[r * h : (r + 1) * h, c * k : (c + 1) * k])


@pytest.mark.parametrize("block", SHAPES, ids=str)
def test_from_blocks_is_the_inverse(block: tuple[int, int]) -> None:
    assert torch.equal(from_blocks(to_blocks(weight(), block)), weight())
    transposed = weight().t().contiguous().t()
    assert torch.equal(from_blocks(to_blocks(transposed, block)), weight())


def test_blocks_share_memory() -> None:
    w = weight()
    to_blocks(w, (4, 2))[1, 3] = 0
    assert torch.count_nonzero(w[4:8, 6:8]) == 0
    assert torch.count_nonzero(w) == 24 * 16 - 8


def test_blocks_on_meta() -> None:
    assert to_blocks(torch.empty(WEIGHT, device="meta"), (8, 1)).shape == (3, 16, 8, 1)


@pytest.mark.parametrize(
    ("block", "resolved"), [((-1, 1), (24, 1)), ((1, -1), (1, 16)), ((-1, -1), (24, 16)), ((8, 4), (8, 4))]
)
def test_minus_one_is_the_whole_dimension(block: tuple[int, int], resolved: tuple[int, int]) -> None:
    assert resolve_block_shape(block, WEIGHT) == resolved
    assert grid_shape(WEIGHT, block) == (24 // resolved[0], 16 // resolved[1])


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ((5, 1), r"block_height=5 does not divide the 24 output rows of a weight of shape \(24, 16\) \(24 % 5 = 4\)"),
        ((1, 3), r"block_width=3 does not divide the 16 input columns"),
        ((48, 1), "block_height=48 does not divide"),
        ((0, 1), "block_height=0 is not a block size: use a positive integer, or -1 for all output rows"),
        ((1, -2), "block_width=-2 is not a block size: use a positive integer, or -1 for all input columns"),
        ((True, 1), "block_height=True is not a block size"),
        ((2.0, 1), "block_height=2.0 is not a block size"),
        (("8", 1), "block_height='8' is not a block size"),
        ((4,), r"block_shape=\(4,\) is no block shape: use a pair \(h, w\)"),
        ((4, 1, 1), r"block_shape=\(4, 1, 1\) is no block shape"),
        (4, "block_shape=4 is no block shape: use a pair"),
        ("8x1", "block_shape='8x1' is no block shape"),
        (None, "block_shape=None is no block shape"),
    ],
)
def test_shapes_that_do_not_tile(block: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_block_shape(block, WEIGHT)
    with pytest.raises(ValueError, match=message):
        to_blocks(weight(), block)


@pytest.mark.parametrize("block", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_norms_are_a_double_loop(block: tuple[int, int], dtype: torch.dtype) -> None:
    w = weight(dtype)
    norms = block_norms(w, block)
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    blocks = to_blocks(w.double(), block)
    for r in range(norms.shape[0]):
        for c in range(norms.shape[1]):
            assert norms[r, c].item() == pytest.approx(blocks[r, c].square().sum().sqrt().item(), rel=1e-6)


@pytest.mark.parametrize("block", SHAPES, ids=str)
def test_scaled_blocks_are_added_in_place(block: tuple[int, int]) -> None:
    w, onto = weight(), torch.full(WEIGHT, 2.0)
    factors = torch.randn(grid_shape(WEIGHT, block), generator=torch.Generator().manual_seed(2))
    assert add_scaled_blocks_(onto, w, factors, block, alpha=0.5) is onto
    spread = factors.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    torch.testing.assert_close(onto, 2.0 + 0.5 * spread * weight())
    assert torch.equal(w, weight())
    transposed = torch.full((WEIGHT[1], WEIGHT[0]), 2.0).t()
    torch.testing.assert_close(add_scaled_blocks_(transposed, w, factors, block, alpha=0.5), onto)


def test_norms_of_a_transposed_weight() -> None:
    w = weight().t().contiguous().t()
    torch.testing.assert_close(block_norms(w, (4, 2)), block_norms(weight(), (4, 2)))


@pytest.mark.parametrize("block", SHAPES, ids=str)
def test_expanded_masks_cover_their_blocks(block: tuple[int, int]) -> None:
    mask = torch.rand(grid_shape(WEIGHT, block), generator=torch.Generator().manual_seed(1)) < 0.5
    full = expand_mask(mask, block)
    assert full.shape == WEIGHT
    blocks = to_blocks(full, block)
    assert torch.equal(blocks.all(3).all(2), mask)
    assert torch.equal(blocks.any(3).any(2), mask)


@pytest.mark.parametrize("block", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_scaling_reaches_each_block_in_place(block: tuple[int, int], transposed: bool) -> None:
    w = weight().t().contiguous().t() if transposed else weight()
    expected = w.clone()
    factors = torch.rand(grid_shape(WEIGHT, block), generator=torch.Generator().manual_seed(1))
    assert scale_blocks_(w, factors, block) is w
    torch.testing.assert_close(to_blocks(w, block), to_blocks(expected, block) * factors[:, :, None, None])
    mask = factors > 0.5
    scale_blocks_(w, mask, block)
    assert torch.count_nonzero(w[~expand_mask(mask, block)]) == 0

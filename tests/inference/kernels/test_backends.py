"""Every backend answers to the reference, and the reference to plain arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sparse.core.blocks import expand_mask, grid_shape
from hf_sparse.core.stored.packing import LayerFormat, pack
from hf_sparse.inference.kernels import BlockIndex, LayerSpec, block_sparse_linear, get_backend, to_dense
from hf_sparse.inference.kernels.reference import ACTIVATIONS, activate

PLAIN = ("reference", "dense", "torch")
# What rounding adds up to over the longest sum of the cases below.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 3e-2, "atol": 0.3},
}
BLOCKS = [(8, 1), (32, 1), (1, 8), (16, 16), (4, 2), (1, 1), (96, 1), (1, 48), (96, 48), (3, 5)]


def case(
    block: tuple[int, int], density: float, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, BlockIndex, Tensor]:
    """A random layer: dense weight, values, index and bias."""
    generator = torch.Generator().manual_seed(seed)
    shape = (96, 48) if block != (3, 5) else (63, 35)
    mask = torch.rand(grid_shape(shape, block), generator=generator) < density
    weight = torch.randn(shape, generator=generator).masked_fill(~expand_mask(mask, block), 0).to(dtype)
    values, bitmap = pack(weight, mask, block)
    layer = LayerFormat(block_shape=block, kept=values.shape[0], dense_shape=shape)
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    return weight, values, BlockIndex.from_bitmap(bitmap, layer), bias


def x_for(weight: Tensor, *leading: int) -> Tensor:
    return torch.randn(*leading, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(weight.dtype)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_reference_is_a_double_loop(block: tuple[int, int]) -> None:
    weight, values, index, bias = case(block, 0.4, torch.float64)
    x = x_for(weight, 3)
    expected = bias.repeat(3, 1)
    for value, row, col in zip(values, index.rows.tolist(), index.cols.tolist(), strict=True):
        h, w = block
        expected[:, row * h : (row + 1) * h] += x[:, col * w : (col + 1) * w] @ value.t()
    torch.testing.assert_close(
        block_sparse_linear(x, values, index, bias, backend="reference"), expected, **TOLERANCE[torch.float64]
    )


@pytest.mark.parametrize("name", [n for n in PLAIN if n != "reference"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_backend_matches_reference(name: str, block: tuple[int, int], density: float, dtype: torch.dtype) -> None:
    weight, values, index, bias = case(block, density, dtype)
    # 1, 7 and 8 tokens are on both sides of a switch; 300 are more than one piece.
    for tokens in (0, 1, 7, 8, 33, 300):
        x = x_for(weight, tokens)
        for maybe_bias in (bias, None):
            expected = block_sparse_linear(x, values, index, maybe_bias, backend="reference")
            found = block_sparse_linear(x, values, index, maybe_bias, backend=name)
            torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
            assert found.is_contiguous()


@pytest.mark.parametrize("name", PLAIN)
def test_unbalanced_bands(name: str) -> None:
    # One band keeps everything, some keep nothing: the worst case for padding.
    mask = torch.zeros(12, 48, dtype=torch.bool)
    mask[3] = True
    mask[5:8, ::7] = True
    weight = torch.randn(96, 48).masked_fill(~expand_mask(mask, (8, 1)), 0)
    values, bitmap = pack(weight, mask, (8, 1))
    layer = LayerFormat(block_shape=(8, 1), kept=int(mask.sum()), dense_shape=(96, 48))
    index = BlockIndex.from_bitmap(bitmap, layer)
    for tokens in (1, 40):
        x = x_for(weight, tokens)
        torch.testing.assert_close(
            block_sparse_linear(x, values, index, backend=name), x @ weight.t(), **TOLERANCE[torch.float32]
        )


@pytest.mark.parametrize("name", PLAIN)
def test_any_leading_dimensions_and_strides(name: str) -> None:
    weight, values, index, bias = case((8, 1), 0.3)
    base = x_for(weight, 5, 2, 3)
    wide = torch.randn(4, 96)
    for x in (
        base[0, 0, 0],
        base,
        base.transpose(0, 2),
        wide[:, ::2],
        torch.randn(48, 6).t(),
        x_for(weight, 1).expand(7, 48),
    ):
        expected = torch.nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(
            block_sparse_linear(x, values, index, bias, backend=name), expected, **TOLERANCE[torch.float32]
        )


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activation_is_applied_last(name: str, activation: str) -> None:
    weight, values, index, bias = case((8, 1), 0.3)
    x = x_for(weight, 9)
    expected = activate(torch.nn.functional.linear(x, weight, bias), activation)
    torch.testing.assert_close(
        block_sparse_linear(x, values, index, bias, activation, backend=name), expected, **TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("name", PLAIN)
def test_unknown_activation_is_refused(name: str) -> None:
    weight, values, index, _ = case((8, 1), 0.3)
    with pytest.raises(ValueError, match=r"activation='swish' is not one of .*gelu"):
        block_sparse_linear(x_for(weight, 1), values, index, activation="swish", backend=name)


@pytest.mark.parametrize("name", PLAIN)
def test_no_output_element_is_forgotten(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, values, index, bias = case((8, 1), 0.05)

    def filled(tensor: Tensor, *size: Any) -> Tensor:
        return tensor.new_full(size, float("nan"))

    monkeypatch.setattr(Tensor, "new_empty", filled)
    assert torch.isfinite(block_sparse_linear(x_for(weight, 9), values, index, bias, backend=name)).all()


def test_pruned_blocks_do_not_spread_what_is_not_finite() -> None:
    # A dense weight multiplies infinities by the zeros of pruned blocks; a band never reads them unless it pads.
    weight, values, index, _ = case((96, 1), 0.3)
    pruned_columns = sorted(set(range(1, 48)) - set(index.cols.tolist()))
    x = x_for(weight, 2)
    x[:, pruned_columns] = float("inf")
    assert torch.isfinite(block_sparse_linear(x, values, index, backend="torch")).all()


def test_to_dense_is_the_inverse_of_pack_and_has_a_gradient() -> None:
    weight, values, index, _ = case((4, 2), 0.4)
    assert torch.equal(to_dense(values, index), weight)
    values.requires_grad_()
    (to_dense(values, index) * 3).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, torch.full_like(values, 3))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_backends_take_every_layer(name: str) -> None:
    _, _, index, _ = case((1, 1), 0.5)
    spec = LayerSpec(layer=index.layer, device=torch.device("meta"), dtype=torch.float16)
    assert get_backend(name).available()[0]
    assert get_backend(name).supports(spec)[0]


def test_torch_backend_never_claims_another_device() -> None:
    _, _, index, _ = case((96, 1), 0.05)
    for device, claims in (("cpu", True), ("cuda", False)):
        spec = LayerSpec(layer=index.layer, device=torch.device(device), dtype=torch.float32)
        assert get_backend("torch").wins(spec) is claims

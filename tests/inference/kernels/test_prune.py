"""The native pass over weights in training, against the same in double precision, block by block."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sparse.core.bits import pack_bits
from hf_sparse.core.blocks import block_norms, expand_mask, grid_shape
from hf_sparse.inference.kernels import library, prune

pytestmark = pytest.mark.usefixtures("native_library")

# Sizes that fill no register, one block for all, tiles that are cut, more than one thread's work.
CASES = [
    ((8, 16), (8, 1)), ((24, 37), (8, 1)), ((6, 5), (1, 1)), ((12, 100), (4, 1)), ((3, 48), (1, 8)),
    ((32, 64), (32, 32)),
    ((64, 3), (64, 1)), ((7, 70), (7, 70)), ((5, 2400), (1, 1)), ((2, 2500), (1, 1250)), ((4096, 19), (4096, 1)),
    ((9, 6), (3, 2)), ((512, 600), (8, 1)), ((1, 1), (1, 1)), ((16, 33), (2, 11)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _any_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", "auto")


@pytest.fixture(params=library.load_library().isas)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(library.ENV_ISA, request.param)
    return str(request.param)


def laid_out(tensor: Tensor, turned: bool) -> Tensor:
    """The same numbers, stored column by column where `turned`, as those of a Conv1D are."""
    return tensor.t().contiguous().t() if turned else tensor.clone()


def spread(blocks: Tensor, block: tuple[int, int]) -> Tensor:
    return blocks.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


def example(size: tuple[int, int], block: tuple[int, int]) -> dict[str, Any]:
    weight, grid = torch.randn(size), grid_shape(size, block)
    weight[: block[0], : block[1]] = 0.0
    mask = torch.rand(grid) < 0.4
    return {"weight": weight, "grad": torch.randn(size), "coef": torch.rand(grid) + 0.1, "mask": mask}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("size", "block"), CASES)
def test_a_pass_equals_its_formulas(isa: str, size: Any, block: Any, turned: bool) -> None:
    given = example(size, block)
    bits, wide = pack_bits(given["mask"].reshape(-1)), given["weight"].double()
    kept = expand_mask(given["mask"], block)
    norms = block_norms(wide, block)
    for coef in (None, given["coef"]):
        weights = torch.ones_like(norms) if coef is None else coef.double()
        penalty = float((weights * norms).sum())
        share = spread(weights / norms.where(norms > 0, torch.inf), block)
        for keep in (None, bits):
            grad, weight = laid_out(given["grad"], turned), laid_out(given["weight"], turned)
            value = prune.add_lasso_gradient_(
                grad, weight, block, amount=0.5, coef=coef, bits=keep, scale=torch.tensor(4.0)
            )
            expected = given["grad"].double() + 2.0 * share * wide
            expected = expected if keep is None else expected * kept
            torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(weight, given["weight"]), "the weight is only read"
            assert value.item() == pytest.approx(penalty, rel=1e-5)
            shrunk = laid_out(given["weight"], turned)
            value = prune.shrink_(shrunk, block, threshold=0.3, coef=coef, bits=keep, moved=torch.tensor(True))
            expected = wide * (1.0 - 0.3 * share).clamp(min=0.0)
            expected = expected if keep is None else expected * kept
            torch.testing.assert_close(shrunk.double(), expected, rtol=1e-5, atol=1e-6)
            assert value.item() == pytest.approx(penalty, rel=1e-5)
    masked = laid_out(given["weight"], turned)
    prune.mask_(masked, block, bits)
    assert torch.equal(masked, given["weight"] * kept)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("size", "block"), [
    ((30000, 3), (30000, 1)), ((3, 30000), (1, 30000)), ((1500, 1100), (1500, 1100)), ((64, 4096), (1, 1)),
])  # fmt: skip
def test_neither_height_nor_width_costs_accuracy(isa: str, size: Any, block: Any, turned: bool) -> None:
    weight = laid_out(torch.randn(size), turned)
    norms, grad = block_norms(weight.double(), block), torch.zeros_like(weight)
    value = prune.add_lasso_gradient_(grad, weight, block, amount=1.0)
    assert value.item() == pytest.approx(float(norms.sum()), rel=5e-7)
    torch.testing.assert_close(grad.double(), weight.double() / spread(norms, block), rtol=5e-7, atol=0.0)


def test_autograd_sees_the_write() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    loss = (weight.exp() * weight).sum()
    with torch.no_grad():
        prune.mask_(weight.t(), (4, 1), torch.ones(1, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_threads_change_nothing() -> None:
    given = example((1024, 512), (8, 1))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        weight = given["weight"].clone()
        results.append((prune.shrink_(weight, (8, 1), threshold=0.1, coef=given["coef"]), weight))
    for value, weight in results[1:]:
        assert torch.equal(value, results[0][0]) and torch.equal(weight, results[0][1])


def test_a_step_that_was_skipped_shrinks_nothing_and_keeps_masks() -> None:
    given = example((16, 12), (4, 1))
    weight, bits = given["weight"].clone(), pack_bits(given["mask"].reshape(-1))
    prune.shrink_(weight, (4, 1), threshold=0.5, moved=torch.tensor(False), bits=bits)
    assert torch.equal(weight, given["weight"] * expand_mask(given["mask"], (4, 1)))


def test_what_is_no_number_leaves_pruned_blocks_and_stays_in_others() -> None:
    weight = torch.full((8, 2), math.nan)
    prune.mask_(weight, (8, 1), pack_bits(torch.tensor([True, False])))
    assert weight[:, 0].isnan().all() and (weight[:, 1] == 0).all()
    bad = torch.tensor([[math.nan, 1.0, math.inf, 2.0]])
    grad = torch.zeros(1, 4)
    assert prune.add_lasso_gradient_(grad, bad, (1, 2), amount=0.5).isnan()
    assert grad[0, :3].isnan().all() and grad[0, 3] == 0.0, "NaN in a block of NaN; inf * 0 and 2 * 0 in one of inf"
    value = prune.shrink_(bad, (1, 1), threshold=0.5)
    assert value.isnan() and bad[0, 0].isnan() and bad[0, 1:].tolist() == [0.5, math.inf, 1.5]


def test_what_does_not_fit_is_told_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.ones(8, 8)
    assert prune.fits(whole) and prune.fits(whole.t()) and prune.fits(whole, whole.clone())
    assert not prune.fits(whole.double()) and not prune.fits(whole[:, ::2]) and not prune.fits(whole[:, :4])
    assert not prune.fits(whole, whole.clone().t()), "laid out in two ways"
    assert not prune.fits(whole.to("meta")) and not prune.fits(whole[None])
    bits = torch.ones(1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"takes a float32 weight .*; found torch.float64 \[8, 8\]"):
        prune.mask_(whole.double(), (8, 1), bits)
    with pytest.raises(ValueError, match=r"bits must be torch.uint8 of shape \[1\], .*; found .* shape \[2\]"):
        prune.mask_(whole, (8, 1), torch.ones(2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"coef must be torch.float32 of shape \[1, 8\]"):
        prune.shrink_(whole, (8, 1), threshold=0.1, coef=torch.ones(8, 1))
    with pytest.raises(ValueError, match="moved must be torch.bool"):
        prune.shrink_(whole, (8, 1), threshold=0.1, moved=torch.tensor(1.0))
    with pytest.raises(ValueError, match="block_height=3 does not divide"):
        prune.mask_(whole, (3, 1), bits)
    assert torch.equal(whole, torch.ones(8, 8))
    for backend in ("reference", "dense"):
        monkeypatch.setenv("HF_SPARSE_BACKEND", backend)
        assert not prune.fits(whole), "another backend was asked for"
        with pytest.raises(ValueError, match=rf"=auto or cpu; found .* on cpu under {backend}\."):
            prune.mask_(whole, (8, 1), bits)


def test_what_torch_compiles_is_left_to_it() -> None:
    assert torch.compile(lambda weight: prune.fits(weight), backend="eager", fullgraph=True)(torch.ones(8, 8)) is False


def test_no_library_means_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load_library", lambda: library.Library(None, (), False, "none"))
    assert not prune.fits(torch.ones(8, 8))
    monkeypatch.setenv("HF_SPARSE_BACKEND", "cpu")
    assert not prune.fits(torch.ones(8, 8).double()), "nothing that it would take"
    with pytest.raises(ValueError, match="HF_SPARSE_BACKEND='cpu' cannot be used: none"):
        prune.fits(torch.ones(8, 8))

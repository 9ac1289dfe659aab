"""Experts one by one on their kept blocks: the same values as the dense code, and chosen only where it pays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hf_sparse import compress
from hf_sparse.core.blocks import scale_blocks_
from hf_sparse.core.structure.experts import experts_of
from hf_sparse.core.structure.targets import weight_view
from hf_sparse.inference.compress import compressed_experts, format_of
from hf_sparse.inference.kernels import backend_status
from hf_sparse.inference.layers.expert_linears import MIN_WEIGHTS, ExpertLinears
from hf_sparse.inference.layers.experts import BlockSparseExperts
from tests.inference import models
from tests.mixtures import MIXTURES, logits, mixture

BACKENDS = [name for name in ("reference", "torch", "cpu") if backend_status()[name][0]]


def dense_experts(experts: int = 4, hidden: int = 16, units: int = 32) -> Any:
    """The experts of one layer, in eval mode."""
    config = MixtralConfig(hidden_size=hidden, intermediate_size=units, num_local_experts=experts)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    module = MixtralExperts(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(0, 0.3)
    return module


def packed(module: Any, density: float = 0.3, empty: int | None = None) -> BlockSparseExperts:
    """Prune a module in place, one expert wholly if asked for, and compress it."""
    masks = {}
    for part, target in experts_of("", module):
        weight = weight_view(target)
        mask = torch.rand(weight.shape[0] // 4, weight.shape[1]) < density
        if empty is not None:
            mask.view(target.experts, -1, weight.shape[1])[empty] = False
        scale_blocks_(weight, mask, (4, 1))
        masks[part] = (mask, format_of(target, (4, 1), int(mask.sum())))
    return BlockSparseExperts.from_dense(module, masks).eval()


def call(tokens: int, hidden: int = 16, experts: int = 4, chosen: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the experts of each token, their weights."""
    weights, index = torch.rand(tokens, experts).topk(chosen)
    return torch.randn(tokens, hidden), index, weights


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_SPARSE_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("name", MIXTURES)
def test_a_model_computes_the_same(name: str, backend: str) -> None:
    model = mixture(name)
    masks = models.prune(model)
    expected = logits(model)
    compress(model, {part: mask for part, mask in masks.items() if "experts." in part and "shared" not in part})
    assert all(set(module.backends()) == {backend} for module in compressed_experts(model).values())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [0, 1, 2, 9, 70])
@pytest.mark.parametrize("empty", [None, 0, 3])
def test_values_are_those_of_the_dense_module(tokens: int, empty: int | None, backend: str) -> None:
    dense = dense_experts()
    sparse = packed(dense, empty=empty)
    given = call(tokens)
    with torch.no_grad():
        torch.testing.assert_close(sparse(*given), dense(*given), rtol=1e-4, atol=1e-5)
    assert sparse._ready is not None and sparse._ready.dense is None, "nothing was laid out dense"


def test_numbers_that_are_no_experts_are_left_out(backend: str) -> None:
    # As the dense code does for experts that lie on another rank.
    dense = dense_experts()
    sparse, (x, index, weights) = packed(dense), call(6)
    index[2, 1] = 4
    with torch.no_grad():
        torch.testing.assert_close(sparse(x, index, weights), dense(x, index, weights), rtol=1e-4, atol=1e-5)


class PlainExperts(nn.Module):
    """Experts without a gate, each followed by a norm, that say so as transformers' classes do."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 8, 4))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 8))
        self.post_expert_norm, self.act_fn = nn.LayerNorm(4), nn.ReLU()
        self.num_experts, self.is_transposed, self.has_gate, self.has_bias = 3, False, False, False
        self.has_post_expert_norm = True

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows = []
        for state, numbers, shares in zip(x, index, weights, strict=True):
            found = [self.down_proj[n] @ self.act_fn(self.up_proj[n] @ state) for n in numbers]
            rows.append(sum(s * self.post_expert_norm(f) for s, f in zip(shares, found, strict=True)))
        return torch.stack(rows)


def test_experts_without_a_gate_and_with_a_norm(backend: str) -> None:
    torch.manual_seed(1)
    dense = PlainExperts().eval().requires_grad_(False)
    sparse, given = packed(dense), call(5, hidden=4, experts=3)
    assert set(sparse.backends()) == {backend}
    torch.testing.assert_close(sparse(*given), dense(*given), rtol=1e-4, atol=1e-5)


def test_the_dense_code_takes_what_kernels_do_not(backend: str) -> None:
    dense = dense_experts()
    sparse, (x, index, weights) = packed(dense), call(6)
    named = {"top_k_index": index, "top_k_weights": weights}
    assert torch.equal(sparse(x, **named), dense(x, **named))
    x.requires_grad_()
    first, second = (torch.autograd.grad(module(x, index, weights).sum(), x)[0] for module in (sparse, dense))
    assert torch.equal(first, second)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(sparse(x, index, weights), dense(x, index, weights))


def test_new_blocks_are_seen(backend: str) -> None:
    dense = dense_experts()
    sparse, given = packed(dense), call(6)
    with torch.no_grad():
        before = sparse(*given)
        sparse.down_proj.mul_(2.0)
        torch.testing.assert_close(sparse(*given), 2 * before, rtol=1e-4, atol=1e-5)
        again = copy.deepcopy(sparse)
        again.load_state_dict({**sparse.state_dict(), "down_proj": sparse.down_proj / 2})
        torch.testing.assert_close(again(*given), before, rtol=1e-4, atol=1e-5)


def test_small_experts_and_other_cases_run_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", "auto")
    assert set(packed(dense_experts()).backends()) == {"dense"}, "too small to pay"
    monkeypatch.setenv("HF_SPARSE_BACKEND", "reference")
    sparse = packed(dense_experts())
    formats = sparse.layer_formats()
    assert ExpertLinears.of(sparse, {"down_proj": formats["down_proj"]}) is None
    sparse.has_bias = True
    assert ExpertLinears.of(sparse, formats) is None
    monkeypatch.setenv("HF_SPARSE_BACKEND", "dense")
    assert set(packed(dense_experts()).backends()) == {"dense"}


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native library is not built")
def test_large_sparse_experts_run_on_kernels_and_dense_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", "auto")
    hidden, units = 256, MIN_WEIGHTS // 256
    dense = dense_experts(2, hidden, units)
    sparse, given = packed(copy.deepcopy(dense), density=0.1), call(3, hidden, experts=2, chosen=1)
    assert set(sparse.backends()) == {"cpu"}
    with torch.no_grad():
        torch.testing.assert_close(sparse(*given), sparse.to_dense_module()(*given), rtol=1e-4, atol=1e-4)
    assert set(packed(dense, density=0.999).backends()) == {"dense"}

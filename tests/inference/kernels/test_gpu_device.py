"""The gpu backend on a real GPU: values of every program, CUDA graphs, torch.compile, and that nothing waits."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sparse import BlockSparseLinear
from hf_sparse.core.blocks import expand_mask, grid_shape, to_blocks
from hf_sparse.inference.kernels import to_dense
from hf_sparse.inference.kernels.gpu import GpuBackend
from hf_sparse.inference.kernels.reference import activate
from tests.inference.kernels.conftest import random_layer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="run with -m gpu: the interpreter is on otherwise"),
]

# Share of the largest right value: one rounding of the result, and sums in another order.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)
SHAPES = {
    (8, 1): (200, 136),
    (16, 1): (208, 136),
    (32, 1): (224, 136),
    (64, 1): (320, 136),
    (128, 1): (384, 136),
    (24, 8): (216, 136),
    (32, 2): (224, 136),
    (1, 16): (40, 144),
    (3, 5): (63, 35),
    (16, 16): (208, 144),
    (32, 32): (224, 160),
    (64, 64): (320, 192),
    (128, 128): (384, 256),
    (32, 128): (224, 256),
    (128, 32): (384, 160),
    (256, 64): (512, 192),
}
TOKENS = (1, 2, 7, 16, 17, 100, 300)


@pytest.fixture(autouse=True)
def _own_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_TUNE", "off")


def close(found: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype is dtype and found.isfinite().all()
    scale = float(right.abs().max()) or 1.0
    assert float((found.double() - right.double()).abs().max()) <= TOLERANCE[dtype] * scale


def layer(block: tuple[int, int], density: float, dtype: torch.dtype) -> tuple[GpuBackend, Any, Tensor, Tensor]:
    values, index = random_layer(SHAPES[block], block, density, seed=0, dtype=torch.float32)
    values, index = values.to("cuda", dtype), type(index)(index.layer, index.rows.cuda(), index.cols.cuda())
    bias = torch.randn(SHAPES[block][0]).to("cuda", dtype)
    backend = GpuBackend()
    return backend, backend.prepare(values, index), to_dense(values, index).double(), bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", SHAPES, ids=str)
def test_values(block: tuple[int, int], dtype: torch.dtype) -> None:
    for density in (0.0, 0.3, 1.0):
        backend, state, weight, bias = layer(block, density, dtype)
        for tokens in TOKENS:
            x = torch.randn(tokens, weight.shape[1], device="cuda").to(dtype)
            right = x.double() @ weight.t()
            close(backend.run(x, state, bias, "gelu"), activate(right + bias.double(), "gelu"), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [(16, 16), (64, 64), (32, 128)], ids=str)
def test_gradient_of_x(block: tuple[int, int], dtype: torch.dtype) -> None:
    backend, state, weight, _ = layer(block, 0.3, dtype)
    for tokens in (1, 40, 300):
        grad = torch.randn(tokens, weight.shape[0], device="cuda").to(dtype)
        found = backend.input_gradient(grad, state)
        assert found is not None
        close(found, grad.double() @ weight, dtype)


@pytest.mark.parametrize("block", [(32, 1), (64, 64)], ids=str)
def test_strides_and_shapes_of_x(block: tuple[int, int]) -> None:
    backend, state, weight, _ = layer(block, 0.3, torch.bfloat16)
    features = weight.shape[1]
    wide = torch.randn(130, 2 * features + 1, device="cuda", dtype=torch.bfloat16)
    tall = torch.randn(features, 256, device="cuda", dtype=torch.bfloat16)
    for x in (wide[:, ::2][:, :features], wide[:, 1 : features + 1], wide[::2, :features], tall.t(), tall[:, 3:80].t(),
              wide[:1, :features].expand(33, features), wide[:9, :features], wide[0:0, :features]):  # fmt: skip
        found = backend.run(x, state, None, None)
        assert found.shape == (x.shape[0], weight.shape[0]) and found.is_contiguous()
        if x.shape[0]:
            close(found, x.double() @ weight.t(), torch.bfloat16)


@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu", "gelu_tanh"])
def test_activations(activation: str | None) -> None:
    backend, state, weight, bias = layer((32, 32), 0.3, torch.float16)
    for tokens in (1, 9, 70):
        x = torch.randn(tokens, weight.shape[1], device="cuda").half()
        right = activate(x.double() @ weight.t() + bias.double(), activation)
        close(backend.run(x, state, bias, activation), right, torch.float16)


def module(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> tuple[BlockSparseLinear, Tensor]:
    monkeypatch.setenv("HF_SPARSE_BACKEND", "gpu")
    shape = SHAPES[block]
    mask = torch.rand(grid_shape(shape, block)) < 0.4
    dense = torch.randn(shape).masked_fill(~expand_mask(mask, block), 0)
    made = BlockSparseLinear.from_dense(dense, mask, block, bias=nn.Parameter(torch.randn(shape[0])))
    return made.to("cuda", torch.bfloat16).eval().requires_grad_(False), dense.to("cuda", torch.bfloat16)


@pytest.mark.parametrize("block", [(64, 1), (64, 64)], ids=str)
def test_a_cuda_graph_replays_what_was_recorded(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    made, dense = module(block, monkeypatch)
    for tokens in (1, 12, 200):
        x = torch.randn(tokens, dense.shape[1], device="cuda", dtype=torch.bfloat16)
        with torch.inference_mode():
            made(x)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = made(x)
            for _ in range(2):
                x.copy_(torch.randn_like(x))
                graph.replay()
                close(y, nn.functional.linear(x.double(), dense.double(), made.bias.double()), torch.bfloat16)


@pytest.mark.parametrize("block", [(64, 1), (64, 64)], ids=str)
def test_nothing_waits_for_the_device(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    made, dense = module(block, monkeypatch)
    inputs = [torch.randn(tokens, dense.shape[1], device="cuda", dtype=torch.bfloat16) for tokens in (1, 12, 200)]
    with torch.inference_mode():
        for x in inputs:
            made(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for x in inputs:
                made(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compile_sees_one_op(monkeypatch: pytest.MonkeyPatch) -> None:
    made, dense = module((64, 64), monkeypatch)
    graphs = []

    def backend(found: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append([str(node.target) for node in found.graph.nodes if node.op == "call_function"])
        return found

    x = torch.randn(40, dense.shape[1], device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        made(x)
        compiled = torch.compile(made, backend=backend, fullgraph=True)
        close(compiled(x), nn.functional.linear(x.double(), dense.double(), made.bias.double()), torch.bfloat16)
    assert graphs == [["hf_sparse.gpu_linear"]]


def test_tuning_keeps_the_values(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("HF_SPARSE_TUNE", str(tmp_path))
    from hf_sparse.inference.kernels.gpu import choice

    choice._plans.cache_clear()
    try:
        backend, state, weight, _ = layer((64, 64), 0.3, torch.bfloat16)
        x = torch.randn(256, weight.shape[1], device="cuda", dtype=torch.bfloat16)
        close(backend.run(x, state, None, None), x.double() @ weight.t(), torch.bfloat16)
        assert any("256" in key for key in choice._plans(x.device)._found)
    finally:
        choice._plans.cache_clear()


def test_results_do_not_change_from_call_to_call() -> None:
    for block in ((32, 1), (64, 64)):
        backend, state, weight, _ = layer(block, 0.3, torch.bfloat16)
        for tokens in (1, 16, 300):
            x = torch.randn(tokens, weight.shape[1], device="cuda", dtype=torch.bfloat16)
            first = backend.run(x, state, None, None)
            assert all(torch.equal(backend.run(x, state, None, None), first) for _ in range(5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [(16, 16), (64, 64), (32, 128)], ids=str)
def test_gradient_of_the_values(block: tuple[int, int], dtype: torch.dtype) -> None:
    backend, state, weight, _ = layer(block, 0.3, dtype)
    x = torch.randn(300, weight.shape[1], device="cuda").to(dtype)
    grad = torch.randn(300, weight.shape[0], device="cuda").to(dtype)
    found = backend.values_gradient(grad, x, state)
    assert found is not None
    whole = to_blocks(grad.double().t() @ x.double(), block)
    close(found, whole[state.index.rows, state.index.cols], dtype)

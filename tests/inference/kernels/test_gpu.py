"""The gpu backend without a GPU: Triton's interpreter runs the programs on tensors of the CPU.

The interpreter has no bfloat16 matrix product; float16 goes through the same lines.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sparse import BlockSparseLinear
from hf_sparse.core.blocks import expand_mask, scale_blocks_, to_blocks
from hf_sparse.core.stored.packing import FormatError, LayerFormat
from hf_sparse.inference.kernels import BlockIndex, LayerSpec, backend_status, block_sparse_linear, to_dense
from hf_sparse.inference.kernels.reference import ACTIVATIONS, activate
from tests.inference.kernels.conftest import random_layer, triton_is_missing

pytestmark = [
    pytest.mark.skipif(triton_is_missing(), reason="no triton of 3.6 or newer is installed"),
    pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="-m gpu compiles the programs"),
]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
# Divisible by none of the sizes of a tile, except where blocks are.
SHAPES = {
    (8, 1): (40, 50),
    (32, 1): (96, 50),
    (128, 1): (256, 50),
    (24, 8): (48, 40),
    (32, 2): (96, 50),
    (1, 16): (5, 48),
    (3, 5): (9, 35),
    (16, 16): (48, 48),
    (32, 32): (64, 64),
    (64, 64): (128, 128),
    (256, 32): (256, 64),
    (32, 128): (64, 256),
}


def prepared(block: tuple[int, int], density: float, dtype: torch.dtype) -> tuple[Any, Any, Tensor, Tensor]:
    from hf_sparse.inference.kernels.gpu import GpuBackend

    values, index = random_layer(SHAPES[block], block, density, seed=0, dtype=dtype)
    backend = GpuBackend()
    bias = torch.randn(SHAPES[block][0]).to(dtype)
    return backend, backend.prepare(values, index), to_dense(values, index).double(), bias


def close(found: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype is dtype and found.is_contiguous() and found.isfinite().all()
    scale = float(right.abs().max()) or 1.0
    assert float((found.double() - right).abs().max()) <= TOLERANCE[dtype] * scale


@pytest.mark.usefixtures("nan_outputs")
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("block", SHAPES, ids=str)
def test_values(block: tuple[int, int], dtype: torch.dtype) -> None:
    backend, state, weight, bias = prepared(block, 0.4, dtype)
    for tokens in (1, 5, 37):
        x = torch.randn(tokens, weight.shape[1]).to(dtype)
        right = x.double() @ weight.t()
        given, activation = (None, None) if tokens == 5 else (bias, "relu")
        right = right if given is None else (right + given.double()).relu()
        close(backend.run(x, state, given, activation), right, dtype)


@pytest.mark.usefixtures("nan_outputs")
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("block", [(32, 1), (16, 16), (64, 64)], ids=str)
def test_empty_bands_nothing_kept_all_kept(block: tuple[int, int], density: float) -> None:
    backend, state, weight, bias = prepared(block, density, torch.float32)
    for tokens in (1, 20):
        x = torch.randn(tokens, weight.shape[1])
        close(backend.run(x, state, bias, None), x.double() @ weight.t() + bias.double(), torch.float32)


@pytest.mark.usefixtures("nan_outputs")
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (32, 128), (24, 8)], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_gradient_of_x(block: tuple[int, int], dtype: torch.dtype) -> None:
    backend, state, weight, _ = prepared(block, 0.4, dtype)
    for tokens in (1, 20):
        grad = torch.randn(tokens, weight.shape[0]).to(dtype)
        found = backend.input_gradient(grad, state)
        if min(block) < 16:
            assert found is None
        else:
            close(found, grad.double() @ weight, dtype)


def _plans(block: tuple[int, int], tokens: int, backward: bool) -> list[Any]:
    from hf_sparse.inference.kernels.gpu.plan import candidates

    _, state, _, _ = prepared(block, 0.5, torch.float16)
    return candidates(state.backward if backward else state.forward, tokens, torch.float16)


@pytest.mark.usefixtures("nan_outputs")
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("block", [(64, 64), (32, 128), (32, 2)], ids=str)
def test_every_plan_computes_the_same(block: tuple[int, int], swapped: bool) -> None:
    from dataclasses import replace

    from hf_sparse.inference.kernels.gpu.choice import suited
    from hf_sparse.inference.kernels.gpu.launch import multiply

    _, state, weight, bias = prepared(block, 0.5, torch.float16)
    for tokens, side in ((1, state.forward), (16, state.forward), (150, state.forward), (150, state.backward)):
        backward = side is state.backward
        if backward and min(block) < 16:
            continue
        matrix = weight.t() if backward else weight
        x = torch.randn(tokens, matrix.shape[1]).half()
        for plan in _plans(block, tokens, backward):
            found = multiply(suited(x, plan), state.values, side, None, None, replace(plan, swapped=swapped, early=0))
            close(found, x.double() @ matrix.t(), torch.float16)


@pytest.mark.parametrize("block", [(32, 1), (64, 64)], ids=str)
def test_any_strides(block: tuple[int, int]) -> None:
    backend, state, weight, _ = prepared(block, 0.4, torch.float16)
    features = weight.shape[1]
    wide, tall = torch.randn(40, 2 * features + 1).half(), torch.randn(features, 64).half()
    for x in (wide[:, ::2][:, :features], wide[:, 1 : features + 1], wide[::2, :features], tall.t(), tall[:, 3:30].t(),
              wide[:1, :features].expand(33, features), wide[:9, :features]):  # fmt: skip
        close(backend.run(x, state, None, None), x.double() @ weight.t(), torch.float16)
    assert backend.run(wide[:0, :features], state, None, None).shape == (0, weight.shape[0])


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(activation: str) -> None:
    backend, state, weight, bias = prepared((16, 16), 0.4, torch.float32)
    x = torch.randn(9, weight.shape[1])
    close(backend.run(x, state, bias, activation), activate(x.double() @ weight.t() + bias, activation), torch.float32)


def test_the_backend_is_one_of_them() -> None:
    assert backend_status()["gpu"][0]
    values, index = random_layer((96, 48), (32, 1), 0.3, seed=0, dtype=torch.float32)
    x = torch.randn(2, 3, 48)
    right = block_sparse_linear(x, values, index, backend="reference")
    torch.testing.assert_close(block_sparse_linear(x, values, index, backend="gpu"), right, rtol=1e-4, atol=1e-4)


def test_auto_leaves_the_cpu_alone() -> None:
    from hf_sparse.inference.kernels.gpu import GpuBackend

    _, index = random_layer((96, 48), (32, 1), 0.05, seed=0, dtype=torch.float32)
    spec = LayerSpec(index.layer, torch.device("cpu"), torch.float32)
    assert not GpuBackend().wins(spec) and GpuBackend().until_tokens(spec) == 0


def test_values_are_not_copied() -> None:
    values, index = random_layer((96, 48), (32, 1), 0.3, seed=0, dtype=torch.float32)
    from hf_sparse.inference.kernels.gpu.layout import to_gpu

    assert to_gpu(values, index).values.data_ptr() == values.data_ptr()


def test_wrong_input_is_refused() -> None:
    backend, state, weight, bias = prepared((32, 1), 0.4, torch.float32)
    x = torch.randn(2, weight.shape[1])
    with pytest.raises(TypeError, match=r"x is torch.float16 on cpu, but the layer is torch.float32"):
        backend.run(x.half(), state, None, None)
    with pytest.raises(ValueError, match=r"x must be \[tokens, 50\], found shape \[2, 49\]"):
        backend.run(x[:, 1:], state, None, None)
    with pytest.raises(ValueError, match=r"activation='swish' is not one of"):
        backend.run(x, state, None, "swish")
    with pytest.raises(ValueError, match=r"bias must be torch.float32 of shape \[96\]"):
        backend.run(x, state, bias[1:], None)
    with pytest.raises(FormatError, match="do not fit a layer"):
        backend.prepare(torch.zeros(1, 32, 1), state.index)


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [("meta", torch.float32, "not on a GPU"), ("cuda", torch.float64, "none of float32")],
)
def test_what_it_does_not_compute(device: str, dtype: torch.dtype, expected: str) -> None:
    from hf_sparse.inference.kernels.gpu import GpuBackend

    layer = LayerFormat(block_shape=(32, 1), kept=2, dense_shape=(64, 64))
    able, reason = GpuBackend().supports(LayerSpec(layer, torch.device(device), dtype))
    assert not able and expected in reason


def test_compile_sees_one_op_for_any_number_of_tokens() -> None:
    backend, state, weight, bias = prepared((16, 16), 0.4, torch.float32)
    graphs = []

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return backend.run(x, state, bias, "relu")

    def look(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return module

    compiled = torch.compile(Layer(), backend=look, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (11, 18):
            x = torch.randn(tokens, weight.shape[1])
            close(compiled(x), (x.double() @ weight.t() + bias).relu(), torch.float32)
    assert graphs == [["hf_sparse.gpu_linear"]]


def test_layers_that_keep_different_numbers_of_blocks_share_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", "gpu")
    layers, graphs = [], []
    for density in (0.3, 0.5, 0.6, 0.8, 0.9):
        mask = torch.rand(7, 9) < density
        made = BlockSparseLinear.from_dense(torch.randn(112, 144), mask, (16, 16)).eval().requires_grad_(False)
        layers.append(made)

    def look(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return module

    x = torch.randn(2, 144)
    torch.compiler.reset()
    with torch.no_grad():
        for made in layers:
            right = made(x)
            made.compile(backend=look)
            torch.testing.assert_close(made(x), right)
    assert len(graphs) <= 2 and all(graph == ["hf_sparse.gpu_linear"] for graph in graphs), graphs


def test_opcheck() -> None:
    _, state, weight, bias = prepared((16, 16), 0.4, torch.float32)
    side = state.forward
    args = (torch.randn(3, weight.shape[1]), state.values, side.table, side.column, bias, "relu", 48)
    torch.library.opcheck(torch.ops.hf_sparse.gpu_linear.default, args)


def test_index_of_another_layer_does_not_reach_the_programs() -> None:
    from hf_sparse.inference.kernels.gpu.layout import to_gpu

    layer = LayerFormat(block_shape=(8, 8), kept=2, dense_shape=(16, 16))
    index = BlockIndex(layer, torch.tensor([0]), torch.tensor([1]))
    with pytest.raises(FormatError, match="an index of 1 blocks"):
        to_gpu(torch.zeros(2, 8, 8), index)


@pytest.mark.parametrize("block", [(16, 16), (64, 64), (32, 128), (32, 1)], ids=str)
def test_gradient_of_the_values(block: tuple[int, int]) -> None:
    backend, state, weight, _ = prepared(block, 0.4, torch.float16)
    x, grad = torch.randn(70, weight.shape[1]).half(), torch.randn(70, weight.shape[0]).half()
    found = backend.values_gradient(grad.t().contiguous().t(), x, state)
    if block == (32, 1):
        assert found is None
        return
    whole = to_blocks(grad.double().t() @ x.double(), block)
    close(found, whole[state.index.rows, state.index.cols], torch.float16)


def test_a_layer_trains_where_its_weight_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", "gpu")
    mask = torch.rand(4, 3) < 0.6
    mask[0, 0] = True
    dense = nn.Linear(48, 64)
    with torch.no_grad():
        scale_blocks_(dense.weight, mask, (16, 16))
    made = BlockSparseLinear.from_dense(dense.weight.detach().clone(), mask, (16, 16), bias=nn.Parameter(dense.bias))
    made.weight.requires_grad_()
    made.train()
    keep = expand_mask(mask, (16, 16))
    ours, theirs = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (made, dense))
    ready = None
    for _ in range(3):
        x = torch.randn(6, 48, requires_grad=True)
        other = x.detach().clone().requires_grad_()
        for layer, given, optimizer in ((made, x, ours), (dense, other, theirs)):
            optimizer.zero_grad()
            layer(given).square().sum().backward()
        torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)
        assert dense.weight.grad is not None
        dense.weight.grad *= keep
        ours.step()
        theirs.step()
        torch.testing.assert_close(made.dense_weight(), dense.weight, rtol=1e-4, atol=1e-4)
        # What was made ready for the first step serves all of them: the kernels read the weight itself.
        assert ready in (None, made._prepared) and made._prepared is not None and made._prepared.in_place is not None
        ready = made._prepared


def test_second_derivatives_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", "gpu")
    _, state, weight, _ = prepared((16, 16), 0.4, torch.float32)
    made = BlockSparseLinear.from_dense(weight.float(), _mask(state), (16, 16)).eval()
    x = torch.randn(3, weight.shape[1], requires_grad=True)
    (first,) = torch.autograd.grad(made(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    y = x.detach().clone().requires_grad_()
    (right,) = torch.autograd.grad((y @ weight.float().t()).pow(3).sum(), y, create_graph=True)
    (right,) = torch.autograd.grad(right.sum(), y)
    torch.testing.assert_close(second, right, rtol=1e-3, atol=1e-2)


def _whole(given: Any) -> Any:
    # A compiled program takes less of a descriptor than the interpreter does.
    from triton.tools.tensor_descriptor import TensorDescriptor

    if not hasattr(given, "block_shape"):
        return given
    return TensorDescriptor(given.base, list(given.shape), list(given.strides), list(given.block_shape))


class _Kept:
    """Stands in for a compiled program, which takes everything by position, and counts its launches."""

    def __init__(self, program: Any) -> None:
        self.program, self.launches = program, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> _Kept:
            self.launches += 1
            self.program[grid[:1]](*map(_whole, args), **options)
            return self

        return launch


@pytest.mark.parametrize("block", [(32, 1), (16, 16), (64, 64)], ids=str)
def test_later_calls_launch_what_the_first_compiled(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_sparse.inference.kernels.gpu import launch

    kept = {name: _Kept(program) for name, program in launch._PROGRAMS.items()}
    monkeypatch.setattr(launch, "_PROGRAMS", kept)
    backend, state, weight, bias = prepared(block, 0.5, torch.float16)
    other = torch.randn_like(bias)
    for tokens in (1, 3, 40):
        for given, activation in ((None, None), (bias, None), (other, None), (bias, "relu")):
            for _ in range(2):
                x = torch.randn(tokens, weight.shape[1]).half()
                right = x.double() @ weight.t() + (0 if given is None else given.double())
                close(backend.run(x, state, given, activation), activate(right, activation), torch.float16)
    # Nothing of a call is kept alive but the weight and the bias.
    x = torch.randn(50, weight.shape[1]).half()
    y = backend.run(x, state, None, None)
    alive = weakref.ref(x), weakref.ref(y)
    del x, y
    assert [found() for found in alive] == [None, None]
    # The second call of a kind skips everything but the launch.
    again = [value for value in state.launches.values() if callable(value) and not isinstance(value, _Kept)]
    assert len(again) == 13
    assert sum(program.launches for program in kept.values()) == 25


def _mask(state: Any) -> Tensor:
    mask = torch.zeros(state.index.layer.grid, dtype=torch.bool)
    mask[state.index.rows, state.index.cols] = True
    return mask

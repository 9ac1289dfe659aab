"""The cpu kernels as an operator of torch: `torch.compile` and `torch.export` see one node."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_sparse.core.stored.packing import FormatError
from hf_sparse.inference.kernels.bands import Bands
from hf_sparse.inference.kernels.cpu import CpuBackend
from hf_sparse.inference.kernels.reference import activate, to_dense
from tests.inference.kernels.conftest import random_layer

pytestmark = pytest.mark.usefixtures("native_library")


TOLERANCE = {torch.float32: {}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


class Layer(nn.Module):
    """One layer on the cpu backend."""

    def __init__(self, dtype: torch.dtype = torch.float32, activation: str | None = "gelu") -> None:
        super().__init__()
        self.values, self.index = random_layer((24, 20), (8, 1), 0.4, seed=0, dtype=dtype)
        self.backend, self.activation = CpuBackend(), activation
        self.state = self.backend.prepare(self.values, self.index)
        self.bias = nn.Parameter(torch.randn(24).to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.backend.run(x, self.state, self.bias, self.activation)

    def expected(self, x: Tensor) -> Tensor:
        return activate(nn.functional.linear(x, to_dense(self.values, self.index), self.bias), self.activation)


def _chunks(bands: Bands) -> list[Tensor]:
    chunks = bands.chunks
    return [] if chunks is None else [chunks.values, chunks.start, chunks.column]


def _nodes(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(dtype: torch.dtype, bias: bool) -> None:
    layer = Layer(dtype)
    state = layer.state
    x = torch.randn(3, 20).to(dtype)
    bands = state.bands
    args = (
        x,
        bands.values,
        bands.band_start,
        bands.column,
        _chunks(bands),
        layer.bias if bias else None,
        "relu",
        state.isa,
    )
    torch.library.opcheck(torch.ops.hf_sparse.cpu_linear.default, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compile_sees_one_op_for_any_number_of_tokens(dtype: torch.dtype) -> None:
    layer, graphs = Layer(dtype), []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(_nodes(module.graph))
        return module

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (5, 17, 64):
            x = torch.randn(tokens, 20).to(dtype)
            torch.testing.assert_close(compiled(x), layer.expected(x), **TOLERANCE[dtype])
    assert graphs == [["hf_sparse.cpu_linear"]]


def test_export_holds_the_op_and_the_weight() -> None:
    layer, tokens = Layer(), torch.export.Dim("tokens", min=2)
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(4, 20),), dynamic_shapes={"x": {0: tokens}})
        assert _nodes(program.graph) == ["hf_sparse.cpu_linear.default"]
        x = torch.randn(33, 20)
        torch.testing.assert_close(program.module()(x), layer.expected(x))


def test_tracing_records_the_op() -> None:
    layer = Layer(activation=None)
    with torch.no_grad(), pytest.warns(DeprecationWarning):
        traced = torch.jit.trace(layer, torch.randn(4, 20), check_trace=False)
        x = torch.randn(7, 20)
        torch.testing.assert_close(traced(x), layer.expected(x))


def test_the_op_checks_its_index() -> None:
    state = Layer().state
    bands, column = state.bands, state.bands.column.clone()
    column[3] = 20
    with pytest.raises(FormatError, match="the index points outside the weight"):
        torch.ops.hf_sparse.cpu_linear(
            torch.randn(2, 20), bands.values, bands.band_start, column, [], None, None, state.isa
        )

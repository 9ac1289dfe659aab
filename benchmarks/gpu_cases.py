"""What gpu.py measures: weights with random masks on the GPU, their dense counterparts, and the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse.core.blocks import BlockShape, grid_shape
from hf_sparse.core.stored.packing import LayerFormat
from hf_sparse.inference.kernels import BlockIndex, to_dense
from hf_sparse.inference.kernels.gpu.layout import GpuWeight, to_gpu

# Without a GPU everything runs once, in Triton's interpreter: a rehearsal, whose times mean nothing.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Buffers that are read in turn have to be more than the second-level cache holds.
ROTATE_BYTES = 160 * 2**20
# Largest error allowed, as a share of the largest right value: one rounding of the result, and sums in another order.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Case:
    """One weight.

    Attributes:
        shape: (O, I).
        block: (h, w).
        density: fraction of blocks kept, chosen at random.
        dtype: by name.
    """

    shape: tuple[int, int]
    block: BlockShape
    density: float
    dtype: str = "bfloat16"

    def weight(self, device: str = DEVICE) -> GpuWeight:
        """Draw it."""
        generator = torch.Generator().manual_seed(0)
        mask = torch.rand(grid_shape(self.shape, self.block), generator=generator) < self.density
        mask[0, 0] = True
        rows, cols = mask.nonzero(as_tuple=True)
        layer = LayerFormat(block_shape=self.block, kept=rows.numel(), dense_shape=self.shape)
        dtype = getattr(torch, self.dtype)
        torch.manual_seed(0)
        values = torch.randn(layer.values_shape, device=device) / (self.density * self.shape[1]) ** 0.5
        return to_gpu(values.to(dtype), BlockIndex(layer, rows.to(device), cols.to(device)))


def error(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """Give the largest error as a share of the largest value of the product in float64; inf if not finite."""
    right = x.double() @ weight.double().t()
    right = right if bias is None else right + bias.double()
    if found.shape != right.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found.double() - right).abs().max() / right.abs().max())


def dense(weight: GpuWeight) -> Tensor:
    """Lay a weight out dense [O, I]."""
    return to_dense(weight.values, weight.index)


def copies(tensor: Tensor, most: int = 64) -> list[Tensor]:
    """Give so many copies of a tensor that reading them in turn empties the cache; the first is the tensor itself."""
    size = max(1, tensor.numel() * tensor.element_size())
    return [tensor, *(tensor.clone() for _ in range(min(most, ROTATE_BYTES // size)))]


def wait() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Rehearsal:
    """Stands in for a CUDA graph where there is no GPU.

    Args:
        call: what it would have recorded.
    """

    def __init__(self, call: Callable[[int], Any]) -> None:
        self.call = call

    def replay(self) -> None:
        """Call it."""
        self.call(0)


def record(call: Callable[[int], Any], launches: int) -> torch.cuda.CUDAGraph | Rehearsal:
    """Record launches 0, 1, 2 ... of a call in a graph, after one that is not recorded."""
    call(0)
    if DEVICE == "cpu":
        return Rehearsal(call)
    wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(launches):
            call(number)
    return graph


def clock(call: Callable[[], Any]) -> float:
    """Time a call on the device, in milliseconds."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def times(calls: Mapping[str, tuple[Callable[[int], Any], int]], rounds: int = 5) -> dict[str, dict[str, Any]]:
    """Time calls in turn by replaying graphs of them.

    Args:
        calls: {name: (what to call with the number of the launch, launches in a graph)}.
        rounds: how often each graph is replayed; one more comes first and does not count.

    Returns:
        {name: {"ms": median of one call, "spread": first and third quartile, "runs": replays}}.
    """
    graphs = {name: (record(call, launches), launches) for name, (call, launches) in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 1):
        for name, (graph, launches) in graphs.items():
            spent = clock(graph.replay)
            if turn:
                taken[name].append(spent / launches)
    return {name: _summary(samples) for name, samples in taken.items()}


def _summary(samples: Sequence[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(samples, method="inclusive") if len(samples) > 1 else list(samples) * 3
    return {"ms": round(median, 6), "spread": [round(low, 6), round(high, 6)], "runs": len(samples)}


def ceilings() -> dict[str, float]:
    """Measure what the chip can do: {"memory_gbs": bytes read and written, "matmul_tflops": bfloat16}."""
    size = 8192 if DEVICE == "cuda" else 64
    big = torch.empty(4 * size**2, dtype=torch.float32, device=DEVICE).normal_()
    other = torch.empty_like(big)
    a = torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE)
    # A kernel, because a graph copies memory with another engine, which is slower.
    found = times({"copy": (lambda _: torch.mul(big, 2.0, out=other), 4), "matmul": (lambda _: a @ a, 4)})
    return {
        "memory_gbs": round(2 * big.numel() * 4 / found["copy"]["ms"] / 1e6, 1),
        "matmul_tflops": round(2 * size**3 / found["matmul"]["ms"] / 1e9, 1),
    }

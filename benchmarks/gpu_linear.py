"""One linear layer on the GPU: the programs of hf_sparse against cuBLAS, torch's BSR and 2:4 sparsity."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu_cases import DEVICE, TOLERANCE, Case, ceilings, copies, dense, error, times, wait
from benchmarks.gpu_record import Record
from hf_sparse.core.blocks import BlockShape
from hf_sparse.inference.kernels import get_backend
from hf_sparse.inference.kernels.gpu.layout import GpuWeight
from hf_sparse.inference.layers.prepared import Prepared

SHAPES = {
    "bert-base": [(768, 768), (3072, 768), (768, 3072)],
    "bert-large": [(1024, 1024), (4096, 1024), (1024, 4096)],
    "llama-7b": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "llama-70b": [(8192, 8192), (28672, 8192), (8192, 28672)],
}
TOKENS = (4096, 1, 16, 512, 16384)
DENSITIES = (0.1, 0.5, 0.2, 0.05)
BLOCKS: tuple[BlockShape, ...] = (
    (64, 64), (64, 1), (32, 1), (128, 128), (128, 1), (32, 32), (16, 1), (16, 16), (8, 1),
)  # fmt: skip
HEADLINE = ((4096, 4096), (11008, 4096))
# Tokens whose results are compared with float64: the first and the last ones.
_CHECKED = 256
# Milliseconds that a graph should take, and launches in it at most.
_GRAPH_MS, _MOST_LAUNCHES, _ROUNDS = 1.5, 64, 5


@dataclass(frozen=True)
class Cell:
    """One shape and one number of tokens, with the sparse weights that are timed in turn with dense."""

    shape: tuple[int, int]
    tokens: int
    densities: tuple[float, ...]
    dtype: str = "bfloat16"
    blocks: tuple[BlockShape, ...] = BLOCKS

    @property
    def name(self) -> str:
        """Name it, for the file."""
        shares = "+".join(f"{density:g}" for density in self.densities)
        return f"{self.dtype} {self.shape[0]}x{self.shape[1]} tokens {self.tokens} density {shares}"


def cells() -> Iterator[Cell]:
    """List the cells, what matters most first."""
    rest = [shape for shapes in SHAPES.values() for shape in shapes if shape not in HEADLINE]
    for tokens in TOKENS[:4]:
        yield from (Cell(shape, tokens, (0.1,)) for shape in HEADLINE)
    for tokens in TOKENS[:4]:
        yield Cell(HEADLINE[0], tokens, DENSITIES[1:])
    for tokens in TOKENS[:4]:
        yield from (Cell(shape, tokens, (0.1,)) for shape in rest)
    for dtype in ("float16", "float32"):
        yield from (Cell(HEADLINE[0], tokens, (0.1,), dtype, BLOCKS[:4]) for tokens in TOKENS[:4])
    for shape in (*HEADLINE, *rest):
        yield Cell(shape, TOKENS[4], (0.1,))
    for tokens in TOKENS[:4]:
        yield from (Cell(shape, tokens, DENSITIES[1:]) for shape in (*rest, HEADLINE[1]))
    for shape in (*HEADLINE, *rest):
        yield Cell(shape, TOKENS[4], DENSITIES[1:])


@torch.inference_mode()
def measure(cell: Cell, limits: dict[str, float]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure a cell.

    Args:
        cell: what.
        limits: of the chip, as `ceilings` gives them.

    Returns:
        (a row per engine and sparse weight, {engine: why it has no row}).
    """
    dtype = getattr(torch, cell.dtype)
    x = torch.randn(cell.tokens, cell.shape[1], device=DEVICE).to(dtype)
    skipped: dict[str, str] = {}
    calls: dict[str, tuple[Callable[[int], Any], int]] = {}
    facts: dict[str, dict[str, Any]] = {}
    plain = torch.randn(cell.shape, device=DEVICE).to(dtype) / cell.shape[1] ** 0.5
    launches = _launches(cell, dtype)
    matrices = copies(plain, 8) if cell.tokens <= 512 else [plain]
    calls["dense"] = (lambda i: linear(x, matrices[i % len(matrices)]), launches)
    facts["dense"] = {"engine": "dense", "block_shape": None, "density": 1.0, "nominal": 1.0, "max_error": 0.0}
    if dtype != torch.float32:
        _try("2:4", skipped, lambda: _two_to_four(plain, x, launches, calls, facts))
    for density in cell.densities:
        for block in cell.blocks:
            if cell.shape[0] % block[0] or cell.shape[1] % block[1]:
                skipped[f"{block[0]}x{block[1]}"] = "does not divide the weight"
                continue
            weight = Case(cell.shape, block, density, cell.dtype).weight()
            ours = partial(_ours, cell, block, density, weight, x, launches, calls, facts)
            _try(f"gpu {block[0]}x{block[1]} {density}", skipped, ours)
            if block[0] == block[1] and dtype != torch.float32 and cell.tokens >= 16:
                bsr = partial(_bsr, block, density, weight, x, launches, calls, facts)
                _try(f"torch_bsr {block[0]}x{block[1]} {density}", skipped, bsr)
    found = times(calls, rounds=_ROUNDS)
    reference = found["dense"]["ms"]
    rows = [
        {
            **{key: value for key, value in facts[name].items() if key not in ("flops", "bytes")},
            "device": "cuda", "dtype": cell.dtype, "out_features": cell.shape[0], "in_features": cell.shape[1],
            "tokens": cell.tokens, "threads": 1, **timing, "speedup": round(reference / timing["ms"], 3),
            **_shares(cell, facts[name], timing["ms"], limits, dtype),
        }
        for name, timing in found.items()
    ]  # fmt: skip
    return rows, skipped


def _launches(cell: Cell, dtype: torch.dtype) -> int:
    expected = 2 * cell.tokens * cell.shape[0] * cell.shape[1] / (6e11 if dtype != torch.float32 else 5e10)
    return max(2, min(_MOST_LAUNCHES, int(_GRAPH_MS / max(expected, 1e-3))))


def _try(name: str, skipped: dict[str, str], build: Callable[[], None]) -> None:
    try:
        build()
    # Engines fail in their own ways, and one that fails is no reason to measure nothing.
    except Exception as problem:  # noqa: BLE001
        lines = str(problem).strip().splitlines() or [""]
        skipped[name] = f"{type(problem).__name__}: {lines[0][:200]}"


def _check(call: Callable[[], Tensor], x: Tensor, matrix: Tensor) -> float:
    found = call()
    if not bool(found.isfinite().all()):
        raise ValueError("a value is not finite")
    ends = torch.cat([torch.arange(min(_CHECKED, len(x))), torch.arange(max(0, len(x) - _CHECKED), len(x))]).unique()
    share = error(found[ends], x[ends], matrix)
    if share > TOLERANCE[x.dtype]:
        raise ValueError(f"wrong values: the largest error is {share:.3g} of the largest value")
    return share


def _ours(
    cell: Cell, block: BlockShape, density: float, weight: GpuWeight, x: Tensor, launches: int,
    calls: dict[str, Any], facts: dict[str, Any],
) -> None:  # fmt: skip
    backend = get_backend("gpu")
    matrix = dense(weight)
    kept = {
        "block_shape": list(block), "density": round(weight.density, 5), "nominal": density,
        "flops": 2 * cell.tokens * weight.values.numel(), "bytes": weight.values.numel() * x.itemsize,
    }  # fmt: skip
    stored = copies(weight.values) if cell.tokens <= 512 else [weight.values]
    states = [GpuWeight(values, weight.forward, weight.index) for values in stored]
    share = _check(lambda: backend.run(x, states[0], None, None), x, matrix)
    name = f"gpu {block} {density}"
    calls[name] = (lambda i: backend.run(x, states[i % len(states)], None, None), max(launches, len(states)))
    facts[name] = {"engine": "gpu", **kept, "max_error": share}
    bitmap = torch.zeros(1, dtype=torch.uint8, device=DEVICE)
    os.environ["HF_SPARSE_BACKEND"] = "auto"
    ready = Prepared.from_values(weight.values, bitmap, weight.index, x.dtype)
    runs_dense = ready.backend.name == "dense" or ready.runs_dense(cell.tokens)
    facts[name]["auto"] = "dense" if runs_dense else ready.backend.name


def _bsr(
    block: BlockShape, density: float, weight: GpuWeight, x: Tensor, launches: int, calls: dict[str, Any],
    facts: dict[str, Any],
) -> None:  # fmt: skip
    matrix = dense(weight)
    made = [found.to_sparse_bsr(block) for found in (copies(matrix, 8) if len(x) <= 512 else [matrix])]
    share = _check(lambda: linear(x, made[0]), x, matrix)
    name = f"torch_bsr {block} {density}"
    calls[name] = (lambda i: linear(x, made[i % len(made)]), launches)
    facts[name] = {
        "engine": "torch_bsr", "block_shape": list(block), "density": round(weight.density, 5), "nominal": density,
        "flops": 2 * len(x) * weight.values.numel(), "bytes": weight.values.numel() * x.itemsize, "max_error": share,
    }  # fmt: skip


def _two_to_four(plain: Tensor, x: Tensor, launches: int, calls: dict[str, Any], facts: dict[str, Any]) -> None:
    from torch.sparse import to_sparse_semi_structured

    kept = plain.view(-1, 4).clone()
    kept[:, 2:] = 0
    pruned = kept.view_as(plain)
    made = [to_sparse_semi_structured(found) for found in (copies(pruned, 8) if len(x) <= 512 else [pruned])]
    share = _check(lambda: linear(x, made[0]), x, pruned)
    calls["2:4"] = (lambda i: linear(x, made[i % len(made)]), launches)
    facts["2:4"] = {
        "engine": "2:4", "block_shape": [1, 4], "density": 0.5, "nominal": 0.5, "max_error": share,
        "flops": len(x) * plain.numel(), "bytes": plain.numel() * x.itemsize // 2 + plain.numel() // 4,
    }  # fmt: skip


def _shares(
    cell: Cell, facts: dict[str, Any], ms: float, limits: dict[str, float], dtype: torch.dtype
) -> dict[str, float]:
    out_features, in_features = cell.shape
    flops = facts.get("flops", 2 * cell.tokens * out_features * in_features)
    moved = facts.get("bytes", out_features * in_features * dtype.itemsize)
    moved += cell.tokens * (out_features + in_features) * dtype.itemsize
    return {
        "share_matmul": round(flops / ms / 1e9 / limits["matmul_tflops"], 4),
        "share_memory": round(moved / ms / 1e6 / limits["memory_gbs"], 4),
    }


def warm(part: int, parts: int) -> None:
    """Compile a part of the programs, so that the process that measures finds them compiled."""
    backend, number = get_backend("gpu"), 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for block in BLOCKS if dtype == torch.bfloat16 else BLOCKS[:4]:
            case = Case((256, 256), block, 0.5, str(dtype).removeprefix("torch."))
            for tokens in TOKENS[:4]:
                if (number := number + 1) % parts == part:
                    state = case.weight()
                    backend.run(torch.randn(tokens, 256, device=DEVICE).to(dtype), state, None, None)
    wait()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure until the time is up, and write the file after every cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=270.0)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--warm", type=int)
    parser.add_argument("--compiled", choices=["done", "only"], help="compile before, or nothing but compile")
    options = parser.parse_args(arguments)
    if options.warm is not None:
        warm(options.warm, options.jobs)
        return
    begin = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu_linear", "--out", str(options.out), "--jobs", str(options.jobs)]
    if options.compiled != "done":
        workers = [subprocess.Popen([*command, "--warm", str(part)]) for part in range(options.jobs)]
        for worker in workers:
            worker.wait()
        print(f"programs compiled in {time.monotonic() - begin:.0f} s", flush=True)
    if options.compiled == "only":
        return
    record = Record(options.out, "linear", ceilings())
    for cell in cells():
        if time.monotonic() - begin > options.seconds:
            record.skip(cell.name, "the time was up")
            continue
        started = time.monotonic()
        rows, skipped = measure(cell, record.content["ceilings"])
        record.add(cell.name, rows, skipped, time.monotonic() - started)
        print(f"{cell.name}: {_headline(rows)}", flush=True)
        torch.cuda.empty_cache()
    record.finish()


def _headline(rows: Sequence[dict[str, Any]]) -> str:
    dense_us = next(1e3 * row["ms"] for row in rows if row["engine"] == "dense")
    words = [f"dense {dense_us:.1f} us"]
    for row in rows:
        if row["engine"] == "gpu" and row["nominal"] == min(r["nominal"] for r in rows if r["engine"] == "gpu"):
            words.append(f"{'x'.join(map(str, row['block_shape']))} {row['speedup']:.2f}x")
    return " ".join(words)


if __name__ == "__main__":
    main()

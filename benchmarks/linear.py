"""Time one linear layer on the CPU: every backend against the best dense engines, values checked first.

Engines: "nn.Linear" (what torch runs by default) and "onednn" (the same weight packed beforehand by oneDNN, where the
CPU allows it) are dense; "auto" is `BlockSparseLinear` as a user gets it; "torch" and "cpu" are backends forced where
they are available. The rows of a cell are measured in one process, call by call in turn. Rows that lose are kept.

Usage: python benchmarks/linear.py [--smoke] [--dtype float32] [--threads 1] [--clock wall] [--seconds 0.2]
           [--out FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse import BlockSparseLinear
from hf_sparse.core.blocks import grid_shape, scale_blocks_
from hf_sparse.inference.bench import check_close, time_interleaved
from hf_sparse.inference.environment import environment
from hf_sparse.inference.kernels import backend_status

REPOSITORY = Path(__file__).resolve().parents[1]
SHAPES = [(384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072)]
BLOCKS = [(8, 1), (32, 1), (16, 16), (32, 32), (1, 8), (1, 1)]
DENSITIES = [0.5, 0.2, 0.1, 0.05]
TOKENS = [1, 8, 32, 128, 1024]
# On a machine that others use too, the time of this process alone says more; it means something for one thread only.
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def cells(smoke: bool) -> Iterator[tuple[tuple[int, int], tuple[int, int], float, int]]:
    """List what is measured: weight shape, block shape, density, tokens."""
    if smoke:
        return itertools.product([(64, 32)], [(8, 1), (32, 32)], [0.2], [1, 8])
    return itertools.product(SHAPES, BLOCKS, DENSITIES, TOKENS)


@torch.inference_mode()
def measure(
    shape: tuple[int, int],
    block: tuple[int, int],
    density: float,
    tokens: int,
    dtype: torch.dtype,
    seconds: float,
    clock: str = "wall",
) -> list[dict[str, Any]]:
    """Measure one cell.

    Returns:
        One row per engine.

    Raises:
        MismatchError: if an engine does not compute what the pruned dense layer does; nothing is timed then.
    """
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(shape[1], shape[0], dtype=dtype).eval()
    mask = torch.rand(grid_shape(shape, block), generator=generator) < density
    scale_blocks_(dense.weight.data, mask, block)
    x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
    auto = sparse(dense, mask, block, "auto")
    engines: dict[str, Callable[[Tensor], Tensor]] = {"nn.Linear": dense, "auto": auto}
    if (packed := onednn(dense, tokens)) is not None:
        engines["onednn"] = packed
    for name in ("torch", "cpu"):
        if backend_status()[name][0]:
            engines[name] = sparse(dense, mask, block, name)
    # The errors of sums in another order grow with the numbers summed, so the truth is computed with more digits.
    truth = nn.functional.linear(x.double(), dense.weight.double(), dense.bias.double())
    errors = {name: check_close(truth, engine(x)) for name, engine in engines.items()}
    calls = {name: _bind(engine, x) for name, engine in engines.items()}
    timings = time_interleaved(calls, seconds, rounds=5, clock=CLOCKS[clock])
    return [
        {
            "engine": name,
            "backend": auto.backend() if name == "auto" else None,
            "device": "cpu",
            "dtype": str(dtype).removeprefix("torch."),
            "out_features": shape[0],
            "in_features": shape[1],
            "tokens": tokens,
            "block_shape": list(block),
            "density": density,
            "threads": torch.get_num_threads(),
            "clock": clock,
            "ms": round(timing.median_ms, 5),
            "spread": [round(timing.low_ms, 5), round(timing.high_ms, 5)],
            "runs": timing.runs,
            "max_error": errors[name],
        }
        for name, timing in timings.items()
    ]


def sparse(dense: nn.Linear, mask: Tensor, block: tuple[int, int], backend: str) -> BlockSparseLinear:
    """Compress a layer and have it prepared by a backend."""
    layer = BlockSparseLinear.from_dense(dense.weight, mask, block, bias=dense.bias).eval()
    os.environ["HF_SPARSE_BACKEND"] = backend
    layer(torch.zeros(1, dense.in_features, dtype=dense.weight.dtype))
    return layer


def onednn(dense: nn.Linear, tokens: int) -> Callable[[Tensor], Tensor] | None:
    """Pack a dense weight for oneDNN, the fastest dense engine inside torch; None where this CPU cannot."""
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(dense.weight.detach(), tokens)
    except RuntimeError as error:
        if "needs the cpu support" not in str(error):
            raise
        return None
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, dense.bias, "none", [], "")


def _bind(engine: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: engine(x)


def main(arguments: list[str] | None = None) -> Path:
    """Measure all cells and write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a handful of tiny cells, to see that it runs")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.2, help="per cell, all engines together")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/linear_cpu_DTYPE.json")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="process: for one thread, on a busy machine"
    )
    options = parser.parse_args(arguments)
    if options.clock == "process" and options.threads != 1:
        parser.error("--clock process adds up what all threads take: use it with --threads 1.")
    torch.set_num_threads(options.threads)
    rows = []
    for shape, block, density, tokens in cells(options.smoke):
        dtype = getattr(torch, options.dtype)
        found = measure(shape, block, density, tokens, dtype, options.seconds, options.clock)
        ms = {row["engine"]: row["ms"] for row in found}
        speed = "  ".join(f"{name} {ms['nn.Linear'] / value:.2f}x" for name, value in ms.items())
        print(f"{shape} {block} density {density} tokens {tokens}: {ms['nn.Linear']:.3f} ms  {speed}", flush=True)
        rows += found
    out = options.out or REPOSITORY / "benchmarks" / "results" / f"linear_cpu_{options.dtype}.json"
    command = shlex.join(["python", "benchmarks/linear.py", *(sys.argv[1:] if arguments is None else arguments)])
    result = {"command": command, **environment(REPOSITORY), "rows": rows}
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} rows in {out}")
    return out


if __name__ == "__main__":
    main()

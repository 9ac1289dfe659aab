"""Time the native CPU kernels layer by layer against the best dense engines, values checked first.

Dense engines: "eager" (`F.linear`) and "onednn" (the same weight packed beforehand, where the CPU allows it); "cpu" is
the native backend without the module around it. All rows of one weight, dtype and number of tokens are measured in one
process, call by call in turn, so that every call finds the caches as the others left them. Rows that lose are kept.
At the end stands the speed-up over the better dense engine, as geometric mean over the weights.

Usage: python benchmarks/cpu_linear.py [--smoke] [--dtype float32 bfloat16] [--threads 1] [--seconds 1] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse.core.packing import LayerFormat, pack_mask
from hf_sparse.inference.bench import check_close, time_interleaved
from hf_sparse.inference.environment import environment
from hf_sparse.inference.kernels import BlockIndex, to_dense
from hf_sparse.inference.kernels.cpu import CpuBackend, status

REPOSITORY = Path(__file__).resolve().parents[1]
SHAPES = [(384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072)]
BLOCKS = [(8, 1), (4, 1), (32, 1), (32, 32), (1, 8), (1, 1), (8, 2)]
DENSITIES = [0.5, 0.2, 0.1, 0.05]
TOKENS = [1, 8, 16, 32, 128, 512, 4096]
DENSE = ("eager", "onednn")


@torch.inference_mode()
def measure(
    shape: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    cells: list[tuple[tuple[int, int], float]],
    seconds: float,
) -> list[dict[str, Any]]:
    """Measure one weight for one number of tokens.

    Args:
        shape: (O, I).
        tokens: rows of x.
        dtype: of weight and x.
        cells: (block shape, density) of each sparse weight.
        seconds: for all engines together.

    Returns:
        One row per dense engine and per cell.

    Raises:
        MismatchError: if an engine computes something else than float64 does; nothing is timed then.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    weight = torch.randn(shape, generator=generator).to(dtype)
    calls: dict[str, Callable[[], Tensor]] = dense_engines(x, weight, bias)
    facts: dict[str, dict[str, Any]] = {name: {"block_shape": None, "density": 1.0, "nominal": 1.0} for name in calls}
    errors = {name: check_close(_truth(x, weight, bias), call()) for name, call in calls.items()}
    backend = CpuBackend()
    for block, density in cells:
        values, index = random_blocks(shape, block, density, dtype, generator)
        name = f"cpu {block[0]}x{block[1]} {density}"
        calls[name] = _bind(backend, x, backend.prepare(values, index), bias)
        errors[name] = check_close(_truth(x, to_dense(values, index), bias), calls[name]())
        kept = index.layer.kept / index.layer.num_blocks
        facts[name] = {"block_shape": list(block), "density": round(kept, 4), "nominal": density}
    timings = time_interleaved(calls, seconds, rounds=7)
    best = min(timings[name].median_ms for name in calls if name in DENSE)
    return [
        {
            "engine": name.partition(" ")[0],
            "device": "cpu",
            "dtype": str(dtype).removeprefix("torch."),
            "out_features": shape[0],
            "in_features": shape[1],
            "tokens": tokens,
            **facts[name],
            "threads": torch.get_num_threads(),
            "ms": round(timing.median_ms, 5),
            "spread": [round(timing.low_ms, 5), round(timing.high_ms, 5)],
            "runs": timing.runs,
            "speedup": round(best / timing.median_ms, 3),
            "max_error": errors[name],
        }
        for name, timing in timings.items()
    ]


def dense_engines(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Give the dense engines that this CPU has for this dtype."""
    engines: dict[str, Callable[[], Tensor]] = {"eager": lambda: torch.nn.functional.linear(x, weight, bias)}
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    except RuntimeError as error:
        if "needs the cpu support" not in str(error):
            raise
        return engines
    engines["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return engines


def random_blocks(
    shape: tuple[int, int], block: tuple[int, int], density: float, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, BlockIndex]:
    """Draw the kept blocks of a weight: each with probability `density`, the first one always."""
    mask = torch.rand(shape[0] // block[0], shape[1] // block[1], generator=generator) < density
    mask[0, 0] = True
    layer = LayerFormat(block_shape=block, kept=int(mask.sum()), dense_shape=shape)
    values = torch.randn(layer.values_shape, generator=generator).to(dtype)
    return values, BlockIndex.from_bitmap(pack_mask(mask), layer)


def _truth(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.linear(x.double(), weight.double(), bias.double())


def _bind(backend: CpuBackend, x: Tensor, state: Any, bias: Tensor) -> Callable[[], Tensor]:
    return lambda: backend.run(x, state, bias, None)


def summary(rows: list[dict[str, Any]]) -> str:
    """Lay out the geometric mean over the weights of the speed-up over the better dense engine."""
    speedups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        if row["engine"] == "cpu":
            key = (row["dtype"], row["nominal"], "x".join(map(str, row["block_shape"])))
            speedups[(*key, row["tokens"])].append(row["speedup"])
    tokens = sorted({key[-1] for key in speedups})
    lines = ["dtype     density block  " + "".join(f"{f'M={m}':>8}" for m in tokens)]
    for key in dict.fromkeys(key[:-1] for key in speedups):
        found = [speedups[(*key, m)] for m in tokens]
        means = [math.exp(sum(map(math.log, values)) / len(values)) for values in found]
        lines.append(f"{key[0]:9} {key[1]:<7} {key[2]:6} " + "".join(f"{mean:7.2f}x" for mean in means))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> Path:
    """Measure everything asked for and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two tiny weights, to see that it runs")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="per weight, dtype and number of tokens")
    parser.add_argument("--shape", nargs="+", help="OxI, default: those of MiniLM and BERT-base")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "cpu_linear.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    shapes = SHAPES
    if options.shape:
        shapes = [(int(rows), int(columns)) for rows, _, columns in (text.partition("x") for text in options.shape)]
    cells, tokens = [(block, density) for density in DENSITIES for block in BLOCKS], options.tokens
    if options.smoke:
        shapes, tokens, cells = [(64, 32), (32, 64)], [1, 20], [((8, 1), 0.5), ((32, 32), 0.5), ((1, 8), 0.1)]
    rows = []
    for dtype in options.dtype:
        for shape in shapes:
            for count in tokens:
                rows += measure(shape, count, getattr(torch, dtype), cells, options.seconds)
                print(f"{dtype} {shape[0]}x{shape[1]} tokens {count} done", flush=True)
    print(summary(rows))
    command = shlex.join(["python", "benchmarks/cpu_linear.py", *(sys.argv[1:] if arguments is None else arguments)])
    result = {"command": command, "kernels": status()[2], **environment(REPOSITORY), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} rows in {options.out}")
    return options.out


if __name__ == "__main__":
    main()

"""One linear layer: `BlockSparseLinear` against the dense engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import engines as make
from benchmarks.record import Cell
from benchmarks.timing import time_in_turns
from hf_sparse import BlockSparseLinear
from hf_sparse.core.blocks import BlockShape, grid_shape, scale_blocks_
from hf_sparse.inference.kernels import backend_status
from hf_sparse.inference.kernels.registry import ENV_BACKEND

# Of MiniLM and BERT-base.
SHAPES = [(384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072)]
BLOCKS = [(8, 1), (4, 1), (32, 1), (8, 2), (16, 16), (32, 32), (1, 16)]
DENSITIES = [0.5, 0.2, 0.1, 0.05]
TOKENS = [1, 8, 16, 32, 128, 512, 4096]
DTYPES = ["float32", "bfloat16"]
LARGEST = max(TOKENS) * 3072 * 768


def cells(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    dtypes: Sequence[str],
    threads: int,
    settings: Mapping[str, Any],
    without: Mapping[str, str],
) -> list[Cell]:
    """List the cells: one per dtype, shape and number of tokens.

    Args:
        shapes: (O, I) of the weights.
        tokens: rows of x.
        dtypes: of weight and x.
        threads: of every engine.
        settings: see `measure`.
        without: {engine: why it is left out}.
    """
    return [
        Cell(
            name=f"{dtype} {shape[0]}x{shape[1]} tokens {count} threads {threads}",
            weight=3 * settings["seconds"] + 60 * count * shape[0] * shape[1] / LARGEST / threads,
            measure=partial(measure, shape, count, dtype, threads, settings, without),
        )
        for dtype in dtypes
        for shape in shapes
        for count in tokens
    ]


@torch.inference_mode()
def measure(
    shape: tuple[int, int],
    tokens: int,
    dtype: str,
    threads: int,
    settings: Mapping[str, Any],
    without: Mapping[str, str],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure one weight for one number of tokens.

    Args:
        shape: (O, I).
        tokens: rows of x.
        dtype: of weight and x.
        threads: of every engine.
        settings: "blocks" and "densities" of the sparse weights; "seconds", "rounds" and "clock" of `time_in_turns`.
        without: {engine: why it is left out}.

    Returns:
        (a row per engine and sparse weight, {engine: why it has no row}).

    Raises:
        MismatchError: if a sparse layer computes something else than the pruned dense one; nothing is timed then.
    """
    kind, generator = getattr(torch, dtype), torch.Generator().manual_seed(0)
    x = torch.randn(tokens, shape[1], generator=generator).to(kind)
    layer = nn.Linear(shape[1], shape[0], dtype=kind).eval().requires_grad_(False)
    builders: dict[make.Key, Any] = {
        ("eager", dtype): lambda: partial(layer, x),
        ("compile", dtype): lambda: make.compiled(layer, x),
        ("onednn", dtype): lambda: make.onednn(x, layer.weight, layer.bias),
        ("onnxruntime", dtype): lambda: _onnxruntime(layer, x, threads),
        ("openvino", dtype): lambda: make.openvino(make.export_onnx(*_float(layer, x)), x.float(), threads, dtype),
    }
    able, reason = backend_status()["cpu"]
    without = without if able else {**without, "cpu": reason}
    truths = {key: _truth(layer, x) for key in builders}
    facts: dict[make.Key, dict[str, Any]] = {}
    for height, width in settings["blocks"]:
        block = (height, width)
        if shape[0] % height or shape[1] % width:
            raise ValueError(f"blocks of {block} do not divide a weight of {shape}.")
        for density in settings["densities"]:
            pruned, mask = prune(layer, block, density, generator)
            kept = {"block_shape": list(block), "density": round(float(mask.float().mean()), 4), "nominal": density}
            truth = _truth(pruned, x)
            for engine in ("cpu", "auto"):
                key = (engine, dtype, f"{height}x{width}", density)
                builders[key] = partial(_sparse, pruned, mask, block, engine, x)
                truths[key], facts[key] = truth, kept
    torch.compiler.reset()
    engines, skipped = make.build(builders, without)
    errors = make.check(engines, truths, skipped)
    timings = time_in_turns(
        {"/".join(map(str, key)): engine for key, engine in engines.items()},
        seconds=settings["seconds"],
        rounds=settings["rounds"],
        threads=threads,
        clock=settings["clock"],
    )
    rows = [
        {
            "engine": key[0],
            "device": "cpu",
            "dtype": dtype,
            "out_features": shape[0],
            "in_features": shape[1],
            "tokens": tokens,
            **facts.get(key, {"block_shape": None, "density": 1.0, "nominal": 1.0}),
            **({"backend": engines[key].func.backend()} if key in facts else {}),  # type: ignore[attr-defined]
            "threads": threads,
            **timing.row(),
            "max_error": errors[key],
        }
        for key, timing in zip(engines, timings.values(), strict=True)
    ]
    return rows, skipped


def prune(layer: nn.Linear, block: BlockShape, density: float, generator: torch.Generator) -> tuple[nn.Linear, Tensor]:
    """Give a copy of a layer whose blocks are kept with a probability of `density`, the first one always; its mask."""
    mask = torch.rand(grid_shape((layer.out_features, layer.in_features), block), generator=generator) < density
    mask[0, 0] = True
    pruned = nn.Linear(layer.in_features, layer.out_features, dtype=layer.weight.dtype).eval().requires_grad_(False)
    pruned.load_state_dict(layer.state_dict())
    scale_blocks_(pruned.weight, mask, block)
    return pruned, mask


def _sparse(pruned: nn.Linear, mask: Tensor, block: BlockShape, backend: str, x: Tensor) -> make.Engine:
    layer = BlockSparseLinear.from_dense(pruned.weight, mask, block, bias=pruned.bias).eval()
    with make.variable(ENV_BACKEND, backend):
        layer(x)
    return partial(layer, x)


def _onnxruntime(layer: nn.Linear, x: Tensor, threads: int) -> make.Engine:
    if x.dtype != torch.float32:
        raise make.Unavailable("onnxruntime has no bfloat16 matrix product on the CPU")
    return make.onnxruntime(make.export_onnx(layer, x), x, threads)


def _float(layer: nn.Linear, x: Tensor) -> tuple[nn.Linear, Tensor]:
    single = nn.Linear(layer.in_features, layer.out_features).eval().requires_grad_(False)
    single.load_state_dict(layer.state_dict())
    return single, x.float()


def _truth(layer: nn.Linear, x: Tensor) -> Tensor:
    # The errors of sums in another order grow with the numbers summed, so what is right is computed with more digits.
    return nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())


def headline(rows: list[dict[str, Any]]) -> str:
    """Put a cell in a few words: the best dense engine, and how much faster the sparse layers are at each density."""
    best = min((row for row in rows if row["engine"] in make.DENSE), key=lambda row: row["ms"])
    words = [f"{best['engine']} {best['ms']:.3f} ms"]
    for engine in ("cpu", "auto"):
        for density in dict.fromkeys(row["nominal"] for row in rows if row["engine"] == engine):
            found = [r["ms"] for r in rows if r["engine"] == engine and r["nominal"] == density]
            words.append(f"{engine} {density:g} {best['ms'] / max(found):.2f}-{best['ms'] / min(found):.2f}x")
    return ", ".join(words)

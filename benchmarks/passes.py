"""Time what masks and the group lasso do to all weights in a training step: the native pass and plain torch, in turns.

The weights are those of the 72 pruned linears of BERT-base, 85 million in float32. Before a time counts, both ways do
the same to the same numbers; the largest difference is kept.

Usage: python benchmarks/passes.py [--smoke] [--threads 1 2] [--seconds 5] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.timing import time_in_turns  # noqa: E402
from hf_sparse.core.bits import Bitmap  # noqa: E402
from hf_sparse.core.blocks import BlockShape, grid_shape  # noqa: E402
from hf_sparse.inference.kernels import cpu, prune  # noqa: E402
from hf_sparse.inference.kernels.registry import ENV_BACKEND  # noqa: E402
from hf_sparse.inference.measuring.environment import environment  # noqa: E402
from hf_sparse.training.pruning.passes import add_penalty_gradient_, mask_blocks_, shrink_blocks_  # noqa: E402

SHAPES: tuple[BlockShape, ...] = ((8, 1), (4, 1), (1, 1), (1, 8), (32, 32))
BERT_BASE = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
ENGINES = {"native": "cpu", "torch": "reference"}
DENSITY, LIMIT = 0.2, 1e-5


class Layers:
    """Weights, gradients, masks and coefficients of all layers, and the three passes over them."""

    def __init__(self, sizes: Sequence[tuple[int, int]], block_shape: BlockShape) -> None:
        generator = torch.Generator().manual_seed(0)
        names = [str(number) for number in range(len(sizes))]
        drawn = [torch.randn(2, *size, generator=generator) for size in sizes]
        self.weights, self.grads = ({name: pair[at] for name, pair in zip(names, drawn, strict=True)} for at in (0, 1))
        grids = {name: grid_shape(size, block_shape) for name, size in zip(names, sizes, strict=True)}
        self.shapes = dict.fromkeys(names, block_shape)
        self.bitmaps = {n: Bitmap(torch.rand(grid, generator=generator) < DENSITY) for n, grid in grids.items()}
        self.coefs = {n: torch.rand(grid, generator=generator) + 0.1 for n, grid in grids.items()}
        mask_blocks_(self.weights, self.shapes, self.bitmaps)

    def tasks(self, size: float) -> dict[str, Callable[[], Tensor | None]]:
        """Give {name: pass}. size: of the penalty; tiny, and a pass may be run again and again."""
        return {
            "masks": lambda: mask_blocks_(self.grads, self.shapes, self.bitmaps),
            "penalty's gradient, masks": lambda: add_penalty_gradient_(
                self.grads, self.weights, self.shapes, self.coefs, amount=size, scale=None, bitmaps=self.bitmaps
            ),
            "proximal step, masks": lambda: shrink_blocks_(
                self.weights, self.shapes, self.coefs, dict.fromkeys(self.weights, size), moved=None,
                bitmaps=self.bitmaps,
            ),
        }  # fmt: skip


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend for a while."""
    before = os.environ.get(ENV_BACKEND)
    os.environ[ENV_BACKEND] = name
    try:
        yield
    finally:
        os.environ.pop(ENV_BACKEND)
        if before is not None:
            os.environ[ENV_BACKEND] = before


def difference(sizes: Sequence[tuple[int, int]], block_shape: BlockShape, task: str) -> float:
    """Run a pass both ways on the same numbers, and give the largest difference of a weight or gradient.

    Raises:
        RuntimeError: if it is above 1e-5, or the penalties differ by as much of their size.
    """
    found = []
    for name in ENGINES.values():
        layers = Layers(sizes, block_shape)
        with backend(name):
            value = layers.tasks(0.1)[task]()
        found.append((layers, value))
    (first, one), (second, two) = found
    pairs = [(tensor, getattr(second, kind)[name]) for kind in ("weights", "grads")
             for name, tensor in getattr(first, kind).items()]  # fmt: skip
    worst = max(float((a - b).abs().max()) for a, b in pairs)
    if not worst <= LIMIT or (one is not None and two is not None and not abs(one - two) <= LIMIT * two):
        raise RuntimeError(
            f"{task} in blocks of {block_shape}: weights differ by {worst}, penalties are {one}, {two}."
        )
    return worst


def measure(sizes: Sequence[tuple[int, int]], block_shape: BlockShape, threads: int, seconds: float) -> list[Any]:
    """Time all passes over blocks of one shape."""
    torch.set_num_threads(threads)
    layers, rows = Layers(sizes, block_shape), []
    for task, run in layers.tasks(1e-12).items():
        error = difference(sizes, block_shape, task)
        calls = {engine: partial(_forced, name, run) for engine, name in ENGINES.items()}
        timed = time_in_turns(calls, seconds=seconds, rounds=5, threads=threads)
        for engine, timing in timed.items():
            row = {"task": task, "engine": engine, "block_shape": list(block_shape), "threads": threads}
            ratio = round(timed["torch"].ms / timing.ms, 2)
            rows.append({**row, **timing.row(), "ratio": ratio, "max_error": error})
    return rows


def _forced(name: str, run: Callable[[], Tensor | None]) -> None:
    with backend(name):
        run()


def main(arguments: Sequence[str]) -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few small weights, to see that all of it runs")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each pass and number of threads")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "passes.json")
    given = parser.parse_args(arguments)
    if not prune.fits(torch.ones(1, 1)):
        raise SystemExit(f"the native pass is not live here: {cpu.status()[1]}")
    sizes = [(64, 48), (16, 32)] if given.smoke else BERT_BASE * 12
    shapes = SHAPES[:1] if given.smoke else SHAPES
    rows = []
    for threads in given.threads:
        for shape in shapes:
            for row in measure(sizes, shape, threads, given.seconds):
                print(json.dumps(row), flush=True)
                rows.append(row)
    facts = environment(REPOSITORY)
    facts["hardware"].pop("threads")
    settings = {"weights": sum(rows_ * cols for rows_, cols in sizes), "layers": len(sizes), "density": DENSITY}
    content = {
        "command": shlex.join(["python", "benchmarks/passes.py", *arguments]), **facts, "kernels": cpu.status()[2],
        "settings": settings, "load": round(os.getloadavg()[0], 1), "rows": rows,
    }  # fmt: skip
    given.out.parent.mkdir(parents=True, exist_ok=True)
    half = given.out.with_suffix(".part")
    half.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(half, given.out)


if __name__ == "__main__":
    main(sys.argv[1:])

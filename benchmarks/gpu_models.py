"""Whole models on the GPU, dense and compressed: BERT-large, and a decoder in prefill and decoding."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_cases import DEVICE, ceilings, record, wait
from benchmarks.gpu_decoder import Decoder, Size
from benchmarks.gpu_record import Record
from hf_sparse import BlockSparseLinear
from hf_sparse.core.blocks import BlockShape, grid_shape
from hf_sparse.core.stored.packing import LayerFormat, pack_mask

DTYPE = torch.bfloat16
# Rounding in bfloat16 adds up over layers, in dense models alike.
TOLERANCE = 5e-2
MODES = ("compile", "graph", "eager")


@dataclass(frozen=True)
class Job:
    """One model, one input, one block shape."""

    model: str
    batch: int
    length: int
    block: BlockShape
    density: float

    @property
    def name(self) -> str:
        """Name it, for the file."""
        return f"{self.model} {self.batch}x{self.length} {self.block[0]}x{self.block[1]} density {self.density:g}"


def jobs() -> Iterator[Job]:
    """List the jobs, what matters most first."""
    tile, bands = (64, 64), (64, 1)
    yield Job("decode", 1, 1024, tile, 0.1)
    yield Job("bert-large", 32, 128, tile, 0.1)
    yield Job("prefill", 1, 4096, tile, 0.1)
    yield Job("bert-large", 32, 384, tile, 0.1)
    yield Job("bert-large", 32, 128, (128, 128), 0.1)
    yield Job("decode", 1, 1024, bands, 0.1)
    yield Job("bert-large", 32, 128, bands, 0.1)
    yield Job("prefill", 1, 4096, bands, 0.1)
    yield Job("decode", 16, 1024, tile, 0.1)
    yield Job("bert-large", 32, 384, bands, 0.1)
    yield Job("bert-large", 32, 128, tile, 0.5)
    yield Job("decode", 1, 1024, tile, 0.5)
    yield Job("bert-large", 32, 128, (32, 32), 0.1)


def random_linear(
    out_features: int, in_features: int, bias: bool, block: BlockShape, density: float
) -> BlockSparseLinear:
    """Give a layer with random blocks kept and weights drawn so that activations keep their size."""
    grid = grid_shape((out_features, in_features), block)
    mask = torch.rand(grid) < density
    mask[0, 0] = True
    layer = LayerFormat(block_shape=block, kept=int(mask.sum()), dense_shape=(out_features, in_features))
    made: Any = BlockSparseLinear(layer, bias=bias, device=DEVICE, dtype=DTYPE)
    with torch.no_grad():
        made.weight.normal_(std=(density * in_features) ** -0.5)
        made.weight_block_mask.copy_(pack_mask(mask))
        if made.bias is not None:
            made.bias.zero_()
    return made.eval().requires_grad_(False)


def densified(model: Any) -> None:
    """Put plain linears in the place of compressed ones, with the same weights."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BlockSparseLinear):
                plain: Any = nn.Linear(1, 1, bias=child.bias is not None)
                plain.weight, plain.bias = nn.Parameter(child.dense_weight().detach(), requires_grad=False), child.bias
                plain.in_features, plain.out_features = child.in_features, child.out_features
                setattr(parent, name, plain)


def bert_large(block: BlockShape, density: float) -> Any:
    """Give an encoder with random weights whose linears are compressed."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model: Any = BertModel(config, add_pooling_layer=False)
        model.to(DTYPE)
    for parent in list(model.encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, random_linear(child.out_features, child.in_features, True, block, density))
    return model.eval().requires_grad_(False)


def decoder(job: Job) -> Decoder:
    """Give a decoder whose linears are compressed."""
    torch.manual_seed(0)
    make = lambda o, i: random_linear(o, i, False, job.block, job.density)  # noqa: E731
    batch, context = (job.batch, job.length + 64) if job.model == "decode" else (1, job.length)
    return Decoder(Size(), make, batch, context, DTYPE).eval().requires_grad_(False)


def _runs(model: Any, job: Job) -> tuple[Callable[[], Tensor], Any]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    draw = partial(torch.randint, 30000, generator=generator, device=DEVICE)
    if job.model == "bert-large":
        ids = draw((job.batch, job.length))
        return lambda: model(input_ids=ids).last_hidden_state, model.encoder.layer
    if job.model == "prefill":
        ids = draw((job.batch, job.length))
        return lambda: model.prefill(ids), model.layers
    ids, place = draw((job.batch, 1)), torch.tensor([job.length], device=DEVICE)
    return lambda: model.decode(ids, place), model.layers


def _weight_bytes() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    if DEVICE == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


@torch.no_grad()
def measure(job: Job, modes: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure a model compressed, then the same model dense, in every mode.

    Returns:
        (a row per engine and mode, {mode: why it has no row}).
    """
    before = _weight_bytes()
    skipped: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    model = bert_large(job.block, job.density) if job.model == "bert-large" else decoder(job)
    truth: Tensor | None = None
    for engine in ("hf_sparse", "dense"):
        if engine == "dense":
            densified(model)
        run, layers = _runs(model, job)
        loaded = _weight_bytes() - before
        y = run()
        wait()
        peak = torch.cuda.max_memory_allocated() - before if DEVICE == "cuda" else 0
        if truth is None:
            truth = y.float()
            share = 0.0
        else:
            share = float((y.float() - truth).abs().max() / truth.abs().max())
            if not share <= TOLERANCE:
                raise ValueError(f"the compressed model computes something else: {share:.3g} of the largest value")
            for row in rows:
                row["max_error"] = share
        for mode in modes:
            begin = time.monotonic()
            try:
                timing = _time(run, layers, mode)
            except Exception as problem:  # noqa: BLE001
                skipped[f"{engine} {mode}"] = f"{type(problem).__name__}: {str(problem)[:200]}"
                continue
            rows.append(
                {
                    "engine": engine, "mode": mode, "model": job.model, "device": "cuda", "dtype": "bfloat16",
                    "batch": job.batch, "length": job.length, "threads": 1,
                    "block_shape": list(job.block) if engine == "hf_sparse" else None,
                    "density": job.density if engine == "hf_sparse" else 1.0, "max_error": 0.0,
                    "loaded_mb": round(loaded / 2**20, 1), "peak_mb": round(peak / 2**20, 1), **timing,
                    "took_s": round(time.monotonic() - begin, 1),
                }
            )  # fmt: skip
    best = min((row["ms"] for row in rows if row["engine"] == "dense"), default=None)
    for row in rows:
        same = [other["ms"] for other in rows if other["engine"] == "dense" and other["mode"] == row["mode"]]
        row["speedup_same_mode"] = round(same[0] / row["ms"], 3) if same else None
        row["speedup"] = round(best / row["ms"], 3) if best else None
    return rows, skipped


def _time(run: Callable[[], Tensor], layers: nn.ModuleList, mode: str) -> dict[str, Any]:
    if mode == "compile":
        # Layer by layer: one compilation serves all of them.
        torch.compiler.reset()
        for layer in layers:
            layer.compile()
        try:
            run()
            return _replays(record(lambda _: run(), 1))
        finally:
            for layer in layers:
                layer._compiled_call_impl = None
    if mode == "graph":
        return _replays(record(lambda _: run(), 1))
    return _samples(run)


def _replays(graph: Any) -> dict[str, Any]:
    return _samples(graph.replay)


def _samples(call: Callable[[], Any], runs: int = 8) -> dict[str, Any]:
    call()
    wait()
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        wait()
        taken.append(1e3 * (time.perf_counter() - start))
    low, median, high = statistics.quantiles(taken, method="inclusive")
    return {"ms": round(median, 4), "spread": [round(low, 4), round(high, 4)], "runs": runs}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure until the time is up, and write the file after every job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--warm", type=int, help="call this job once in every mode, so that caches have its programs")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    if options.warm is not None:
        measure(list(jobs())[options.warm], options.modes)
        return
    kept = Record(options.out, "models", ceilings())
    for job in jobs():
        left = options.seconds - (time.monotonic() - begin)
        if left < 0:
            kept.skip(job.name, "the time was up")
            continue
        started = time.monotonic()
        try:
            rows, skipped = measure(job, options.modes)
        except Exception as problem:  # noqa: BLE001
            kept.skip(job.name, f"{type(problem).__name__}: {str(problem)[:300]}")
            print(f"{job.name}: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
            continue
        kept.add(job.name, rows, skipped, time.monotonic() - started)
        words = [f"{r['engine']} {r['mode']} {r['ms']:.2f} ms ({r['speedup']}x)" for r in rows]
        print(f"{job.name}: {'; '.join(words)} {skipped or ''}", flush=True)
    kept.finish()


if __name__ == "__main__":
    main()

"""Whole models: the encoder (hidden states in, hidden states out) and the classifier (ids in, logits out).

"hf_sparse" is a compressed folder as `from_pretrained` loads it; "hf_sparse_layers" is the same with the fused encoder
switched off, so that transformers' own code runs around `BlockSparseLinear`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import engines as make
from benchmarks.models import BLOCKS, FUSED, Contenders, Scope
from benchmarks.record import Cell
from benchmarks.timing import time_in_turns
from hf_sparse.inference.encoders.fused import ENV_ENCODER

SCOPES = ["encoder", "model"]
BATCHES = [1, 8]
LENGTHS = [16, 32, 128, 384]


def cells(
    models: Sequence[str],
    scopes: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    threads: int,
    settings: Mapping[str, Any],
    without: Mapping[str, str],
    folder: Path,
) -> list[Cell]:
    """List the cells: one per model, scope, batch and length.

    Args:
        models: names, see `models.load`.
        scopes: "encoder", "model".
        sizes: (batch, length).
        threads: of every engine.
        settings: see `measure`.
        without: {engine: why it is left out}.
        folder: for models and ONNX files.
    """
    listed = []
    for name in models:
        contenders = Contenders(name, settings["densities"], folder)
        for scope in scopes:
            for batch, length in sizes:
                size = {"bert-base": 8.0}.get(name, 1.0) * batch * length
                listed.append(
                    Cell(
                        name=f"{name} {scope} {batch}x{length} threads {threads}",
                        weight=settings["seconds"] + 6.0 + size / 128 * settings["rounds"] / 5 / threads,
                        measure=partial(measure, contenders, scope, batch, length, threads, settings, without),
                    )
                )
    return listed


def measure(
    contenders: Contenders,
    scope: str,
    batch: int,
    length: int,
    threads: int,
    settings: Mapping[str, Any],
    without: Mapping[str, str],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure one model on one input.

    Args:
        contenders: the model.
        scope: "encoder" or "model".
        batch, length: of the input; no padding.
        threads: of every engine.
        settings: "densities", and "seconds", "rounds" and "clock" of `time_in_turns`.
        without: {engine: why it is left out}.

    Returns:
        (a row per engine, dtype and density, {engine: why it has no row}).

    Raises:
        MismatchError: if a compressed model does not compute what the pruned dense one does; nothing is timed then.
    """
    contenders.ready(scope, batch, length, without)
    # Outside of it everything was made as a user makes it; inside it is called as a user calls it.
    with torch.inference_mode():
        inputs = contenders.inputs(scope, batch, length)
        builders = _builders(contenders, scope, inputs, threads)
        right = {key: Scope(model, scope)(inputs["float32"]) for key, model in contenders.dense.items()}
        plain = Scope(contenders.plain["float32"], scope)(inputs["float32"])
        truths = {key: right[key[1], key[2]] if len(key) > 2 else plain for key in builders}
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
    rows = []
    for key, timing in zip(engines, timings.values(), strict=True):
        density = key[2] if len(key) > 2 else 1.0
        rows.append(
            {
                "engine": key[0],
                "device": "cpu",
                "dtype": key[1],
                "model": contenders.name,
                "scope": scope,
                "batch": batch,
                "length": length,
                "block_shape": list(BLOCKS[key[1]]) if len(key) > 2 else None,
                "density": density,
                **({"backend": contenders.backends[key]} if len(key) > 2 else {}),
                "threads": threads,
                **timing.row(),
                "max_error": errors[key],
            }
        )
    return rows, skipped


def _builders(contenders: Contenders, scope: str, inputs: dict[str, Tensor], threads: int) -> dict[make.Key, Any]:
    builders: dict[make.Key, Any] = {}
    single = inputs["float32"]
    for dtype, x in inputs.items():
        whole = Scope(contenders.plain[dtype], scope)
        builders["eager", dtype] = partial(partial, whole, x)
        builders["compile", dtype] = partial(make.compiled, whole, x)
        builders["onnxruntime", dtype] = partial(_onnxruntime, contenders, scope, single, threads, dtype)
        builders["openvino", dtype] = partial(_openvino, contenders, scope, single, threads, dtype)
    for (engine, dtype, density), model in contenders.compressed.items():
        whole = Scope(model, scope)
        builders[engine, dtype, density] = partial(partial, _switched, whole, inputs[dtype], FUSED[engine])
    return builders


def _switched(whole: Scope, x: Tensor, fused: str) -> Tensor:
    # Each model always sees the value that it was loaded under, whenever it is that it looks.
    if os.environ.get(ENV_ENCODER) != fused:
        os.environ[ENV_ENCODER] = fused
    return whole(x)


def _onnxruntime(contenders: Contenders, scope: str, x: Tensor, threads: int, dtype: str) -> make.Engine:
    if dtype != "float32":
        raise make.Unavailable("onnxruntime has no bfloat16 matrix product on the CPU")
    return make.onnxruntime(contenders.onnx(scope, x), x, threads)


def _openvino(contenders: Contenders, scope: str, x: Tensor, threads: int, dtype: str) -> make.Engine:
    return make.openvino(contenders.onnx(scope, x), x, threads, dtype)


def headline(rows: list[dict[str, Any]]) -> str:
    """Put a cell in a few words: eager, the best dense engine of each dtype, and how much faster hf_sparse is."""
    words = []
    for dtype in BLOCKS:
        mine = [row for row in rows if row["dtype"] == dtype]
        dense = [row for row in mine if row["engine"] in make.DENSE]
        if not dense:
            continue
        best = min(dense, key=lambda row: row["ms"])
        ratios = [f"{r['density']:g} {best['ms'] / r['ms']:.2f}x" for r in mine if r["engine"] == "hf_sparse"]
        words.append(f"{dtype} {best['engine']} {best['ms']:.2f} ms, {' '.join(ratios)}")
    return "; ".join(words)

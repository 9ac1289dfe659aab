"""DeepSparse on the very weights that hf_sparse runs, each in its own environment.

DeepSparse needs older packages, so it cannot share a process with hf_sparse. onnxruntime runs the same ONNX file in
turn with either of them, and what is compared is each one's time over that of onnxruntime beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoModelForSequenceClassification

from benchmarks import engines as make
from benchmarks import models
from benchmarks.record import Cell
from benchmarks.timing import time_in_turns
from hf_sparse import compress, load_dense
from hf_sparse.core.blocks import BlockShape
from hf_sparse.inference.measuring.bench import check_close, token_inputs

CHILD = Path(__file__).with_name("deepsparse_child.py")
BLOCKS: list[BlockShape] = [(1, 1), (8, 1)]


def cells(
    names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    threads: int,
    settings: Mapping[str, Any],
    folder: Path,
    python: Path,
) -> list[Cell]:
    """List the cells: one per model, block shape, density, batch and length.

    Args:
        names: of the models, see `models.load`.
        sizes: (batch, length).
        threads: of every engine.
        settings: "densities", and "seconds", "rounds" and "clock" of `time_in_turns`.
        folder: for models and ONNX files.
        python: of the environment that has deepsparse and onnxruntime.
    """
    return [
        Cell(
            name=f"{name} {block[0]}x{block[1]} density {density:g} {batch}x{length} threads {threads}",
            weight=10 + 2 * settings["seconds"] + {"bert-base": 20}.get(name, 1.0) * batch * length / 128 / 8,
            measure=partial(measure, name, block, density, batch, length, threads, settings, folder, python),
        )
        for name in names
        for block in BLOCKS
        for density in settings["densities"]
        for batch, length in sizes
    ]


def measure(
    name: str,
    block: BlockShape,
    density: float,
    batch: int,
    length: int,
    threads: int,
    settings: Mapping[str, Any],
    folder: Path,
    python: Path,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure the encoder of one pruned model on one input, float32.

    Args:
        name: of the model.
        block, density: of its pruned layers.
        batch, length: of the input.
        threads: of every engine.
        settings: "seconds", "rounds" and "clock" of `time_in_turns`.
        folder: for models and ONNX files.
        python: of the environment that has deepsparse and onnxruntime.

    Returns:
        (a row per engine and process, nothing skipped).

    Raises:
        MismatchError: if an engine does not compute what the pruned dense model does; nothing is told then.
        RuntimeError: if DeepSparse does not run; the message ends with what it said.
    """
    place = folder / f"deepsparse-{name}-{block[0]}x{block[1]}-{density}"
    if not place.is_dir():
        model = models.load(name).eval()
        compress(model, models.prune(model, block, density)).save_pretrained(place)
    with make.variable(models.ENV_ENCODER, "auto"):
        sparse = AutoModelForSequenceClassification.from_pretrained(place).eval()
        dense = load_dense(AutoModelForSequenceClassification, place).eval()
        ids = token_inputs([batch], [length], dense.config.vocab_size)[0]["input_ids"]
        with torch.no_grad():
            x = dense.bert.embeddings(input_ids=ids)
        onnx = place / f"{batch}x{length}.onnx"
        make.export_onnx(models.Scope(dense, "encoder"), x, onnx)
        with torch.inference_mode():
            truth = models.Scope(dense, "encoder")(x)
            engines: dict[make.Key, make.Engine] = {
                ("onnxruntime", "float32"): make.onnxruntime(onnx, x, threads),
                ("hf_sparse", "float32"): partial(models.Scope(sparse, "encoder"), x),
            }
            errors = {key[0]: check_close(truth, engine()) for key, engine in engines.items()}
            limits = {key: settings[key] for key in ("seconds", "rounds", "clock")}
            timings = time_in_turns({key[0]: call for key, call in engines.items()}, threads=threads, **limits)
    facts = {
        "device": "cpu",
        "dtype": "float32",
        "model": name,
        "scope": "encoder",
        "batch": batch,
        "length": length,
        "block_shape": list(block),
        "density": density,
        "threads": threads,
    }
    rows = [
        {"engine": engine, "beside": "hf_sparse", **facts, **timing.row(), "max_error": errors[engine]}
        for engine, timing in timings.items()
    ]
    said = run_child(python, onnx, x, threads, limits)
    values = torch.from_numpy(numpy.load(onnx.with_suffix(".values.npy")))
    error = check_close(truth, values)
    rows += [
        {
            "engine": engine,
            "beside": "deepsparse",
            **facts,
            **timing,
            "max_error": error if engine == "deepsparse" else None,
            "versions": said["versions"],
        }
        for engine, timing in said["timings"].items()
    ]
    onnx.unlink()
    return rows, {}


def run_child(python: Path, onnx: Path, x: torch.Tensor, threads: int, limits: dict[str, Any]) -> dict[str, Any]:
    """Run `deepsparse_child.py` in its environment; give what it printed. Its values lie beside the ONNX file."""
    given, values = onnx.with_suffix(".input.npy"), onnx.with_suffix(".values.npy")
    numpy.save(given, x.numpy())
    words = [str(python), str(CHILD), str(onnx), str(given), str(values), str(threads), json.dumps(limits)]
    # It inherits the cores of this process. DeepSparse calls home unless it is told not to.
    environment = {**os.environ, "NM_DISABLE_ANALYTICS": "1", "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"DeepSparse did not run ({python}): {done.stderr.strip()[-800:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ratio(rows: Sequence[Mapping[str, Any]]) -> float:
    """Say how much faster hf_sparse is than DeepSparse in one cell, each over the onnxruntime beside it."""
    ms = {(row["engine"], row["beside"]): row["ms"] for row in rows}
    theirs = ms["deepsparse", "deepsparse"] / ms["onnxruntime", "deepsparse"]
    return theirs / (ms["hf_sparse", "hf_sparse"] / ms["onnxruntime", "hf_sparse"])


def headline(rows: list[dict[str, Any]]) -> str:
    """Put a cell in a few words."""
    times = [f"{row['engine']} {row['ms']:.2f} ms" for row in rows]
    return f"{ratio(rows):.2f}x DeepSparse ({', '.join(times)})"

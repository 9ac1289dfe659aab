from __future__ import annotations

import itertools
from typing import Any

import pytest

from benchmarks.layouts import speed as speed_tables

HEAD = {
    "command": "python benchmarks/cpu.py encoder",
    "hardware": {"cpu": "A CPU"},
    "versions": {"torch": "2.13.0", "transformers": "5.23.0", "onnxruntime": None, "openvino": "2026.4"},
    "kernels": "avx512bf16",
    "settings": {"blocks": {"float32": [8, 1], "bfloat16": [8, 2]}},
    "cells": {
        "one": {"skipped": {"compile float32": "not asked for"}},
        "two": {"skipped": {"compile float32": "not asked for", "openvino float32": "wrong values: 1.0"}},
    },
}
# Milliseconds on one thread by engine, dtype and density; batch 8 takes eight times as long.
MS = {
    ("eager", "float32", 1.0): 20.0,
    ("openvino", "float32", 1.0): 10.0,
    ("eager", "bfloat16", 1.0): 6.0,
    ("openvino", "bfloat16", 1.0): 8.0,
    ("hf_sparse", "float32", 0.5): 8.0,
    ("hf_sparse", "float32", 0.1): 2.0,
    ("hf_sparse", "bfloat16", 0.5): 7.5,
    ("hf_sparse", "bfloat16", 0.1): 1.0,
    ("hf_sparse_layers", "float32", 0.1): 4.0,
}


@pytest.fixture
def encoders() -> dict[str, Any]:
    rows = [
        {
            "engine": engine,
            "dtype": dtype,
            "model": model,
            "scope": "encoder",
            "batch": batch,
            "length": 128,
            "block_shape": None,
            "density": density,
            "threads": threads,
            "ms": ms * batch / (1.6 if threads == 2 else 1),
        }
        for model, batch, threads in itertools.product(("minilm", "bert-base"), (1, 8), (1, 2))
        for (engine, dtype, density), ms in MS.items()
    ]
    return {**HEAD, "rows": rows}


def test_the_short_table(encoders: dict[str, Any]) -> None:
    lines = speed_tables.short_table(encoders).splitlines()
    assert lines[2] == "| MiniLM-L6, fp32 | 1 | 20 ms | 10 ms (openvino) | 2 ms | 10.0x | 5.00x |"
    assert lines[9] == "| BERT-base, bf16 | 8 | 160 ms | 48 ms (eager) | 8 ms | 20.0x | 6.00x |"
    assert len([line for line in lines if line.startswith("|")]) == 2 + 8
    text = "\n".join(lines)
    assert "fp32 engine: 1.25x to 1.25x in 8 cells of model, batch, length and threads; none of them slower." in text
    assert "bf16 engine: 0.80x to 0.80x in 8 cells of model, batch, length and threads; 8 of them slower." in text
    assert "- Two threads over one, 10% kept, fp32: 1.60x to 1.60x." in text
    assert "the fastest of eager, openvino in the same dtype" in text
    versions = "torch 2.13.0, transformers 5.23.0, openvino 2026.4"
    assert text.endswith(f"A CPU (avx512bf16); {versions}; `python benchmarks/cpu.py encoder`.")


def test_a_short_table_with_a_hole_is_refused(encoders: dict[str, Any]) -> None:
    encoders["rows"] = [row for row in encoders["rows"] if row["model"] == "minilm" or row["batch"] == 1]
    with pytest.raises(ValueError, match=r"no float32 times of bert-base, batch 8, 128 tokens"):
        speed_tables.short_table(encoders)


def test_the_long_table_has_every_engine_and_says_what_is_missing(encoders: dict[str, Any]) -> None:
    lines = speed_tables.encoder_table(encoders, "float32").splitlines()
    assert lines[0] == "| | batch x tokens | threads | eager | openvino | 50% | 10% | 10%, layers only |"
    assert lines[2] == (
        "| MiniLM-L6 encoder | 1 x 128 | 1 | 20 ms | 10 ms | 8 ms (1.25x) | 2 ms (5.00x) | 4 ms (2.50x) |"
    )
    assert lines[-2:] == [
        "- Not here: compile float32: not asked for.",
        "- Not here: openvino float32 in 1 of 2 cells: wrong values.",
    ]
    half = speed_tables.encoder_table(encoders, "bfloat16").splitlines()[2]
    assert half == "| MiniLM-L6 encoder | 1 x 128 | 1 | 6 ms | 8 ms | 7.5 ms (0.80x) | 1 ms (6.00x) |  |"


def test_the_linear_table_is_a_geometric_mean_and_keeps_the_worst() -> None:
    shared = {"dtype": "float32", "in_features": 8, "tokens": 4, "threads": 1}
    sparse = {**shared, "block_shape": [8, 1], "nominal": 0.1}
    dense = {**shared, "block_shape": None, "nominal": 1.0}
    rows = [
        {**dense, "engine": "eager", "out_features": 8, "ms": 16.0},
        {**dense, "engine": "onednn", "out_features": 8, "ms": 8.0},
        {**sparse, "engine": "cpu", "out_features": 8, "ms": 1.0},
        {**sparse, "engine": "auto", "out_features": 8, "ms": 10.0},
        {**dense, "engine": "eager", "out_features": 16, "ms": 8.0},
        {**sparse, "engine": "cpu", "out_features": 16, "ms": 4.0},
        {**sparse, "engine": "auto", "out_features": 16, "ms": 4.0},
    ]
    lines = speed_tables.linear_table({**HEAD, "rows": rows}).splitlines()
    assert lines[0] == "| dtype | kept | block | threads | 4 | auto, worst |"
    assert lines[2] == "| fp32 | 10% | 8x1 | 1 | 4.00x | 0.80x |"


def test_the_deepsparse_table() -> None:
    facts = {"model": "minilm", "scope": "encoder", "batch": 1, "length": 128, "threads": 1, "block_shape": [8, 1]}
    rows = [
        {**facts, "density": 0.1, "engine": engine, "beside": beside, "ms": ms, "versions": {"deepsparse": "1.8.0"}}
        for engine, beside, ms in (
            ("onnxruntime", "hf_sparse", 10.0),
            ("hf_sparse", "hf_sparse", 2.0),
            ("onnxruntime", "deepsparse", 20.0),
            ("deepsparse", "deepsparse", 12.0),
        )
    ]
    lines = speed_tables.deepsparse_table({**HEAD, "rows": rows}).splitlines()
    assert lines[2] == "| MiniLM-L6 | 8x1 | 10% | 1 x 128 | 1 | 12 ms | 2 ms | 3.00x |"
    assert lines[-1].endswith("DeepSparse's environment: deepsparse 1.8.0.")

"""The tables of the GPU: what wins, what the rule does, what is missing."""

from __future__ import annotations

from typing import Any

from benchmarks.layouts.gpu import densities_table, models_table, rivals_table, shapes_table


def layer(engine: str, ms: float, block: list[int] | None = None, nominal: float = 0.1, **more: Any) -> dict[str, Any]:
    row = {"engine": engine, "dtype": "bfloat16", "out_features": 4096, "in_features": 4096, "tokens": 4096}
    shares = {"share_memory": 0.5, "share_matmul": 0.25}
    gain = {"ms": ms, "speedup": round(0.04 / ms, 3)}
    return {**row, "block_shape": block, "nominal": nominal, "density": nominal, **gain, **shares, **more}


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "command": "python benchmarks/gpu.py linear",
        "hardware": {"gpu": "A CHIP"},
        "versions": {"torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0"},
        "ceilings": {"memory_gbs": 4000.0, "matmul_tflops": 800.0},
        "not_run": {"another": "the time was up", "torchao": "torchao is not installed"},
        "rows": rows,
    }


ROWS = [
    layer("dense", 0.04, nominal=1.0),
    layer("2:4", 0.02, [1, 4], nominal=0.5),
    layer("gpu", 0.01, [64, 64]),
    layer("gpu", 0.05, [8, 1]),
    layer("torch_bsr", 0.03, [64, 64]),
    layer("gpu", 0.05, [64, 64], nominal=0.5),
    layer("gpu", 0.05, [8, 1], nominal=0.5),
]


def test_shapes() -> None:
    lines = shapes_table(result(ROWS)).splitlines()
    assert lines[0] == "| weight | tokens | cuBLAS | 64x64 | 8x1 | 2:4 |"
    assert lines[2] == "| 4096 x 4096 | 4,096 | 40 us | 4.00x | 0.80x\\* | 2.00x |"
    assert "- \\*: the rule runs this dense, 1 of 2 cells; 0 of them won." in lines
    assert "- Where the rule takes the kernels, the worst cell is 4.00x; none of 1 below 0.97x." in lines
    assert "- A CHIP; torch 2.11.0, triton 3.6.0, CUDA 13.0; `python benchmarks/gpu.py linear`." in lines
    assert lines[-2:] == [
        "- Not measured: 1 more cells, because the time was up.",
        "- Not measured: torchao: torchao is not installed.",
    ]


def test_densities_keep_what_loses() -> None:
    lines = densities_table(result(ROWS)).splitlines()
    assert lines[0] == "| weight | tokens | block | 50% | 10% |"
    assert lines[2:4] == [
        "| 4096 x 4096 | 4,096 | 64x64 | 0.80x\\* | 4.00x |",
        "| 4096 x 4096 | 4,096 | 8x1 | 0.80x\\* | 0.80x\\* |",
    ]
    assert "- \\*: the rule runs this dense, 3 of 4 cells; 0 of them won." in lines


def test_rivals() -> None:
    lines = rivals_table(result(ROWS)).splitlines()
    assert lines[2] == "| 4096 x 4096 | 4,096 | 64x64 | 10 us | 30 us | 3.0x | 50% | 25% |"
    assert lines[4] == "- Over torch's own: 3.0x to 3.0x in 1 cells; none of them below 2x."


def test_models() -> None:
    one = {"model": "bert-large", "batch": 32, "length": 128, "mode": "graph", "density": 0.1, "block_shape": [64, 64]}
    rows = [
        {**one, "engine": "hf_sparse", "ms": 2.0, "speedup": 1.5, "speedup_same_mode": 2.0, "loaded_mb": 100.0},
        {**one, "engine": "dense", "ms": 4.0, "speedup": 0.75, "speedup_same_mode": 1.0, "loaded_mb": 1000.0},
    ]
    lines = models_table(result(rows)).splitlines()
    assert lines[2] == (
        "| BERT-large | 32 x 128 | 64x64 | 10% | CUDA graph | 4.00 ms | 2.00 ms | 2.00x | 1.50x | 100 / 1,000 MB |"
    )

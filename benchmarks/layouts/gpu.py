"""Lay out what gpu.py measured, for docs/kernels.md: layers, torch's own product beside ours, whole models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_sparse.core.stored.packing import LayerFormat
from hf_sparse.inference.kernels import LayerSpec
from hf_sparse.inference.kernels.gpu.limits import takes

Row = Mapping[str, Any]
_MODELS = {"bert-large": "BERT-large", "prefill": "decoder, prefill", "decode": "decoder, decoding"}
_MODES = {"eager": "launched by the CPU", "graph": "CUDA graph", "compile": "torch.compile and CUDA graph"}


def shapes_table(result: Mapping[str, Any]) -> str:
    """Lay out the gain over cuBLAS at 10 % density in bfloat16, by shape, tokens and block shape."""
    rows = [row for row in result["rows"] if row["dtype"] == "bfloat16"]
    ours = [row for row in rows if row["engine"] == "gpu" and row["nominal"] == 0.1]
    blocks = _blocks(ours)
    lines = [
        f"| weight | tokens | cuBLAS | {' | '.join(blocks)} | 2:4 |",
        "|---|--:|--:|" + "--:|" * (len(blocks) + 1),
    ]
    for place in dict.fromkeys(map(_place, ours)):
        here = {_block(row): row for row in ours if _place(row) == place}
        found = {row["engine"]: row for row in rows if _place(row) == place and row["engine"] in ("dense", "2:4")}
        gains = [_gain(here[block]) if block in here else "" for block in blocks]
        half = f"{found['2:4']['speedup']:.2f}x" if "2:4" in found else ""
        out_features, in_features, tokens, _ = place
        lines.append(
            f"| {out_features} x {in_features} | {tokens:,} | {_us(found['dense'])} | {' | '.join(gains)} | {half} |"
        )
    return "\n".join([*lines, "", *_choices(ours), f"- {source(result)}", *_missing(result)])


def densities_table(result: Mapping[str, Any]) -> str:
    """Lay out the gain over cuBLAS of every density, for the shape that has them all."""
    ours = [row for row in result["rows"] if row["engine"] == "gpu" and row["dtype"] == "bfloat16"]
    densities = sorted({row["nominal"] for row in ours}, reverse=True)
    by_place: dict[tuple[Any, ...], set[float]] = {}
    for row in ours:
        by_place.setdefault(_place(row), set()).add(row["nominal"])
    full = [place for place, found in by_place.items() if len(found) == len(densities)]
    kept = [row for row in ours if _place(row) in full]
    lines = [
        f"| weight | tokens | block | {' | '.join(f'{density:.0%}' for density in densities)} |",
        "|---|--:|---|" + "--:|" * len(densities),
    ]
    for place in full:
        for block in _blocks(kept):
            cells = {row["nominal"]: row for row in kept if _place(row) == place and _block(row) == block}
            gains = " | ".join(_gain(cells[density]) if density in cells else "" for density in densities)
            lines.append(f"| {place[0]} x {place[1]} | {place[2]:,} | {block} | {gains} |")
    return "\n".join([*lines, "", *_choices(kept), f"- {source(result)}"])


def rivals_table(result: Mapping[str, Any]) -> str:
    """Lay out torch's block-sparse product beside ours, and how near ours is to what the chip can do."""
    rows = [row for row in result["rows"] if row["nominal"] == 0.1 and row["dtype"] == "bfloat16"]
    ours = {(_place(row), _block(row)): row for row in rows if row["engine"] == "gpu"}
    theirs = {(_place(row), _block(row)): row for row in rows if row["engine"] == "torch_bsr"}
    lines = [
        "| weight | tokens | block | ours | torch BSR | ratio | of the memory's speed | of the tensor cores' |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    ratios = []
    for key, row in ours.items():
        if key not in theirs:
            continue
        place, block = key
        ratios.append(theirs[key]["ms"] / row["ms"])
        lines.append(
            f"| {place[0]} x {place[1]} | {place[2]:,} | {block} | "
            f"{_us(row)} | {_us(theirs[key])} | {ratios[-1]:.1f}x | {row['share_memory']:.0%} | "
            f"{row['share_matmul']:.0%} |"
        )
    ceilings = result["ceilings"]
    notes = [
        f"- Over torch's own: {min(ratios):.1f}x to {max(ratios):.1f}x in {len(ratios)} cells; "
        f"{sum(ratio < 2 for ratio in ratios) or 'none'} of them below 2x.",
        f"- Ceilings measured in the same run: {ceilings['memory_gbs'] / 1e3:.2f} TB/s read and written, "
        f"{ceilings['matmul_tflops']:.0f} TFLOP/s of a bfloat16 product of 8192.",
    ]
    return "\n".join([*lines, "", *notes])


def models_table(result: Mapping[str, Any]) -> str:
    """Lay out the models: every mode dense and compressed, and the memory they take."""
    lines = [
        "| model | batch x tokens | block | kept | mode | dense | hf_sparse | same mode | over best dense | loaded |",
        "|---|--:|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    rows = result["rows"]
    for at, row in enumerate(rows):
        if row["engine"] != "hf_sparse":
            continue
        # The dense rows of a job come after its compressed ones.
        dense = next((r for r in rows[at:] if r["engine"] == "dense" and r["mode"] == row["mode"]), None)
        name = f"{_MODELS[row['model']]}"
        same = f"{row['speedup_same_mode']:.2f}x" if row["speedup_same_mode"] else ""
        best = f"{row['speedup']:.2f}x" if row["speedup"] else ""
        before = f"{dense['ms']:.2f} ms" if dense else ""
        memory = f"{row['loaded_mb']:,.0f} / {dense['loaded_mb']:,.0f} MB" if dense else f"{row['loaded_mb']:,.0f} MB"
        lines.append(
            f"| {name} | {row['batch']} x {row['length']:,} | {_block(row)} | {row['density']:.0%} | "
            f"{_MODES[row['mode']]} | {before} | {row['ms']:.2f} ms | {same} | {best} | {memory} |"
        )
    return "\n".join([*lines, "", f"- {source(result)}", *_missing(result)])


def source(result: Mapping[str, Any]) -> str:
    """Say where numbers come from."""
    versions = ", ".join(
        f"{name} {result['versions'][name]}" for name in ("torch", "triton") if result["versions"][name]
    )
    return f"{result['hardware']['gpu']}; {versions}, CUDA {result['versions']['cuda']}; `{result['command']}`."


def _place(row: Row) -> tuple[Any, ...]:
    return row["out_features"], row["in_features"], row["tokens"], row["dtype"]


def _block(row: Row) -> str:
    return "x".join(map(str, row["block_shape"]))


def _blocks(rows: Sequence[Row]) -> list[str]:
    shapes = {tuple(row["block_shape"]) for row in rows}
    return [
        "x".join(map(str, shape)) for shape in sorted(shapes, key=lambda shape: (shape[1] == 1, shape[0], shape[1]))
    ]


def _us(row: Row) -> str:
    spent = 1e3 * row["ms"]
    return f"{spent:,.0f} us" if spent >= 100 else f"{spent:.3g} us"


def runs_dense(row: Row) -> bool:
    """Tell whether the rule, as it stands now, runs a measured cell dense on the chip that was measured."""
    height, width = row["block_shape"]
    shape = (row["out_features"], row["in_features"])
    kept = round(row["density"] * shape[0] * shape[1] / (height * width))
    layer = LayerFormat(block_shape=(height, width), kept=kept, dense_shape=shape)
    return not takes(LayerSpec(layer, torch.device("cuda"), getattr(torch, row["dtype"])), row["tokens"])


def _gain(row: Row) -> str:
    return f"{row['speedup']:.2f}x" + ("\\*" if runs_dense(row) else "")


def _choices(rows: Sequence[Row]) -> list[str]:
    taken = [row["speedup"] for row in rows if not runs_dense(row)]
    lost = [row for row in rows if runs_dense(row) and row["speedup"] > 1.03]
    notes = [
        f"- \\*: the rule runs this dense, {len(rows) - len(taken)} of {len(rows)} cells; {len(lost)} of them won."
    ]
    if taken:
        under = sum(gain < 0.97 for gain in taken)
        notes.append(
            f"- Where the rule takes the kernels, the worst cell is {min(taken):.2f}x; {under or 'none'} of "
            f"{len(taken)} below 0.97x."
        )
    return notes


def _missing(result: Mapping[str, Any]) -> list[str]:
    late = sum(reason == "the time was up" for reason in result["not_run"].values())
    notes = [f"- Not measured: {late} more cells, because the time was up."] if late else []
    return notes + [f"- Not measured: {name}: {why}." for name, why in result["not_run"].items() if "time" not in why]

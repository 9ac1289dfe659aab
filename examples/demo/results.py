"""What the demo found: the rows of its table with their ratios, what to know about them, the table on the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def table_rows(results: dict[str, Any]) -> list[Row]:
    """Lay out dense against pruned.

    Args:
        results: of the run; "measured_accuracy", "bytes", "layer_bytes", "load", "speed" and the test rows are read.

    Returns:
        Rows {"what", "dense", "pruned", "ratio"}, all text. The ratio of a score is pruned / dense; that of a size or
        a time says how many times smaller, larger, faster or slower the pruned model is.
    """
    score = results["measured_accuracy"]
    rows = [
        {
            "what": f"accuracy, {results['corpus']['rows']['test']:,} test sentences",
            "dense": f"{score['dense']:.1%}",
            "pruned": f"{score['pruned']:.1%}",
            "ratio": f"{score['pruned'] / score['dense']:.3f}" if score["dense"] else "-",
        },
        _size("weights file", results["bytes"]),
        _size("of it, the pruned layers", results["layer_bytes"]),
    ]
    for dense, pruned in _pairs(results["load"]):
        rows.append(_time(dense["what"], dense, pruned))
    for dense, pruned in _pairs(results["speed"]):
        rows.append(_time(f"latency, batch {dense['batch']} x {dense['length']} tokens", dense, pruned))
    return rows


def _pairs(rows: list[Row]) -> Iterator[tuple[Row, Row]]:
    return zip(rows[::2], rows[1::2], strict=True)


def _size(what: str, found: dict[str, int]) -> Row:
    return {"what": what, "dense": f"{found['dense'] / 1e6:.1f} MB", "pruned": f"{found['pruned'] / 1e6:.1f} MB",
            "ratio": _times(found["dense"], found["pruned"], "smaller", "larger")}  # fmt: skip


def _time(what: str, dense: Row, pruned: Row) -> Row:
    cells = {name: f"{row['ms']:.1f} ms ({row['spread'][0]:.1f}-{row['spread'][1]:.1f})"
             for name, row in (("dense", dense), ("pruned", pruned))}  # fmt: skip
    return {"what": what, **cells, "ratio": _times(dense["ms"], pruned["ms"], "faster", "slower")}


def _times(dense: float, pruned: float, better: str, worse: str) -> str:
    return f"{dense / pruned:.2f}x {better}" if dense >= pruned else f"{pruned / dense:.2f}x {worse}"


def notes(results: dict[str, Any]) -> list[str]:
    """Say what a reader of the table has to know, in sentences."""
    last, settings = results["accuracy"][-1], results["settings"]
    height, width = last["block_shape"]
    rows = results["corpus"]["rows"]["test"]
    error = math.sqrt(last["dense_score"] * (1 - last["dense_score"]) / rows)
    hardware, fall = results["hardware"], last["dense_score"] - last["score"]
    said = [
        f"{last['sparsity']:.0%} of the encoder's {height}x{width} blocks are gone; embeddings and head are dense.",
        f"Chance is {1 / len(results['corpus']['versions']):.1%}; word embeddings without an encoder reach "
        f"{last['floor_score']:.1%}. Standard error of an accuracy: {error:.1%}; one seed ({last['seed']}).",
        f"The dense model was trained for {_epochs(settings['dense_epochs'])}, the pruned one for "
        f"{_epochs(settings['sparse_epochs'])} more: where its score is higher, longer training is why.",
        f"Times are medians (first to third quartile) on {hardware['cpu']}, {hardware['threads']} threads, both "
        f"models in turn in one process; dense is {results['dense_engine']}.",
    ]
    for tried in results["accuracy"][:-1]:
        said.append(
            f"At {tried['sparsity']:.0%} the accuracy fell to {tried['score']:.1%}, more than the "
            f"{settings['allowed_fall']:.0%} allowed, so less was pruned."
        )
    if fall > settings["allowed_fall"]:
        said.append(
            f"The accuracy fell by {fall:.1%}, more than the {settings['allowed_fall']:.0%} allowed; "
            f"there was no time left to try less."
        )
    return said


def _epochs(count: float) -> str:
    return f"{count:g} epoch{'' if count == 1 else 's'}"


def print_table(results: dict[str, Any], console: Console) -> None:
    """Print the table and its notes."""
    table = Table(title="dense against pruned")
    table.add_column("")
    for name in ("dense", "pruned", "ratio"):
        table.add_column(name, justify="right")
    for row in results["table"]:
        table.add_row(row["what"], row["dense"], row["pruned"], row["ratio"])
    console.print(table)
    for note in results["notes"]:
        console.print(note, highlight=False)

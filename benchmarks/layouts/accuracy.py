"""Tables of the accuracy grid: scores, and what is kept of dense - floor."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TASKS, LEAD = ("qnli", "mnli", "mrpc"), ("qnli", "mnli")
TRAINED, LAST = ("qnli", "sst2"), "sst2"  # tasks of the cells that the trainer itself ran, and the one of them alone
ROWS = ("sst2", "sst2-40k")  # one task with few rows and with many, pruned in as many steps
DEFAULT = "default"
DENSE = ("dense", "dense, as long")  # the second for as many epochs as the pruning takes
KIN = ("default", "recipe", "fisher")  # how names begin of methods that choose blocks by Fisher information
NO_KIN = ("by magnitude", "by activation")  # how names end of those that do not, for all that
RECIPE, CONTROL, SLOWER, SHAPE = "recipe", "agp+kd", "agp+kd, half the learning rate", (8, 1)
PLAIN = "default, no hidden states"
LONGER = "passes"  # how names end of cells that took longer than others of their task: not compared with them
# Follows a name where the trainer took as long as the grid of stacks; its other cells of QNLI have one pass.
LONG = {"qnli": ", four passes", "mnli": "", "mrpc": "", "sst2": ""}
# What the short names of the exploration stand for; the rest of a name is a change to the base.
_PAIRS = "re-paired sentences"
_ALONE = "KD alone (T = 4), hidden states x 10"
NAMES = {
    "base": "base: activation, each layer its budget, KD, hidden states, learning rate 4e-4",
    "agp+kd": "magnitude, no hidden states (AGP + KD)", "fisher": "fisher", "globalfisher": "fisher, global budget",
    "factored": "fisher, factored into rows and columns", "globalrel": "global budget, relative to each layer",
    "comp": "least squares: kept weights make up for those removed", "lr8": "learning rate 8e-4",
    "h10": "hidden states x 10", "kd h10 lr8": f"{_ALONE}, 8e-4", "rep h10": f"{_ALONE}, {_PAIRS}",
    "rep h10 lr8": f"{_ALONE}, {_PAIRS}, 8e-4", "rep h10 lr8 comp": f"{_ALONE}, {_PAIRS}, 8e-4, least squares",
    "rep h10 lr8 factored": f"{_ALONE}, {_PAIRS}, 8e-4, factored fisher",
}  # fmt: skip

Results = Mapping[str, Any]
Cells = list[dict[str, Any]]


def dense_score(task: str, results: Results) -> float:
    """Give the score at the last step of the model that the pruned ones started from."""
    return float(select(results, task=task, method="dense")[0]["last"])


def share(cell: Mapping[str, Any], results: Results, score: str = "last") -> float:
    """Give the part of (dense - floor) that a cell keeps; below 0 where it is worse than a bag of embeddings."""
    floor, dense = results["floors"][cell["task"]]["accuracy"], dense_score(cell["task"], results)
    return (cell[score] - floor) / (dense - floor)


def select(results: Results, **wanted: Any) -> Cells:
    """Give the finished cells with these values; block as (h, w)."""
    return [
        cell for cell in results["cells"]
        if "last" in cell and all(
            (tuple(cell["block"]) if key == "block" else cell[key]) == value for key, value in wanted.items()
        )
    ]  # fmt: skip


def as_long(trained: Results) -> Results:
    """Give the trainer's cells that took as many passes as those of the grid of stacks, under their plain names."""
    cells: Cells = []
    for cell in trained["cells"]:
        plain = str(cell.get("method", "")).removesuffix(LONG.get(cell["task"], ""))
        # Dense models have one length each.
        longer = LONG.get(cell["task"], "") == "" or plain != cell.get("method") or plain in DENSE
        if cell["task"] in LONG and longer and not plain.endswith(LONGER):
            cells.append({**cell, "method": plain})
    return {**trained, "cells": cells}


def is_kin(method: str) -> bool:
    """Tell whether a method chooses blocks as the default does, and is a variant of it."""
    return method.startswith(KIN) and not method.endswith(NO_KIN)


def methods_of(results: Results, **wanted: Any) -> list[str]:
    """Give the methods of the finished cells with these values that were trained for as long as each other."""
    return [m for m in dict.fromkeys(cell["method"] for cell in select(results, **wanted)) if not m.endswith(LONGER)]


def mean_share(results: Results, tasks: Sequence[str], **wanted: Any) -> float | None:
    """Give the mean over tasks of the mean over seeds of what is kept; None where a task has no such cell."""
    found = [select(results, task=task, **wanted) for task in tasks]
    if not all(found):
        return None
    return mean(mean(share(cell, results) for cell in cells) for cells in found)


def compare(results: Results, rows: Iterable[tuple[str, Mapping[str, Any]]], tasks: Sequence[str], first: str) -> str:
    """Lay rows out with a column per task (score, spread over seeds, what is kept) and the mean of what is kept.

    Args:
        results: as `accuracy.collect` gives them.
        rows: (label, what selects the row's cells); rows without any cell are left out.
        tasks: the columns, of those that have a dense model.
        first: heading of the labels.
    """
    tasks = [task for task in tasks if select(results, task=task, method="dense")]
    rows_of = [(label, [select(results, task=task, **wanted) for task in tasks]) for label, wanted in rows]
    table = [[first, *(task.upper() for task in tasks), "kept, mean"], ["---", *["--:"] * len(tasks), "--:"]]
    for label, columns in rows_of:
        texts = [score_of(cells, results) if cells else "" for cells in columns]
        kept = [mean(share(cell, results) for cell in cells) for cells in columns if cells]
        if kept:
            table.append([label, *texts, f"{mean(kept):.0%}" if len(kept) == len(tasks) else ""])
    for label, scores, kept_text in (
        ("*dense*", [dense_score(task, results) for task in tasks], "100%"),
        ("*floor*", [results["floors"][task]["accuracy"] for task in tasks], "0%"),
    ):
        table.append([label, *(f"{100 * score:.1f}" for score in scores), kept_text])
    # Of one task the mean says nothing new.
    return "\n".join(_row(row if len(tasks) > 1 else row[:-1]) for row in table)


def _row(cells: Sequence[str]) -> str:
    return f"|{'|'.join(cells)}|" if cells[0] == "---" else f"| {' | '.join(cells)} |"


def methods_table(results: Results, tasks: Sequence[str] = LEAD, sparsity: float = 0.9) -> str:
    """Compare all methods at one sparsity in the default blocks, best first; those last that miss tasks."""
    methods = [
        method for method in methods_of(results, block=SHAPE, sparsity=sparsity)
        if any(select(results, task=task, method=method, block=SHAPE, sparsity=sparsity) for task in tasks)
    ]  # fmt: skip
    chosen = {m: {"method": m, "block": SHAPE, "sparsity": sparsity} for m in methods}

    def rank(method: str) -> tuple[int, float]:
        known = [kept for task in tasks if (kept := mean_share(results, [task], **chosen[method])) is not None]
        return -len(known), -mean(known) if known else 0.0

    rows = [(method, chosen[method]) for method in sorted(methods, key=rank)]
    return compare(results, rows, tasks, f"method, {sparsity:.0%}, 8 x 1")


def sparsity_table(
    results: Results, tasks: Sequence[str] = TASKS, methods: Sequence[str] = (RECIPE, CONTROL),
    sparsities: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
) -> str:  # fmt: skip
    """Compare methods over sparsities."""
    rows = [
        (f"{method}, {sparsity:.0%}", {"method": method, "block": SHAPE, "sparsity": sparsity})
        for sparsity in sparsities for method in methods
    ]  # fmt: skip
    return compare(results, rows, tasks, "method, sparsity (8 x 1)")


def blocks_table(results: Results, tasks: Sequence[str] = LEAD) -> str:
    """Compare block shapes under the recipe, and the hybrid: tiles in attention, whole units of feed-forward parts."""
    shapes = [(1, 1), (4, 1), (8, 1), (32, 1), (1, 8), (16, 16), (32, 32)]
    rows = [
        (f"{h} x {w}, {sparsity:.0%}", {"method": RECIPE, "block": (h, w), "sparsity": sparsity})
        for sparsity in (0.8, 0.9) for h, w in shapes
    ]  # fmt: skip
    rows.append(("hybrid, 90%", {"method": "hybrid", "sparsity": 0.9}))
    return compare(results, rows, tasks, "blocks, sparsity")


def gap_table(results: Results, tasks: Sequence[str] = LEAD, sparsity: float = 0.9) -> str:
    """Lay out scores on training and dev rows, their gap and the best dev score, per task and method."""
    lines = [
        "| task | method | train | dev | train - dev | best dev | dev loss | seeds |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for task in tasks:
        dense = [select(results, task=task, method=method) for method in DENSE]
        groups = [cells for cells in dense if cells]
        methods = methods_of(results, task=task, block=SHAPE, sparsity=sparsity)
        groups += [select(results, task=task, method=m, block=SHAPE, sparsity=sparsity) for m in methods]
        for cells in sorted(groups, key=lambda cells: -mean(c["last"] for c in cells)):
            columns = [spread_of(cells, key) for key in ("train_last", "last", "gap", "best")]
            loss = mean(c["dev_loss"] for c in cells)
            lines.append(f"| {task} | {cells[0]['method']} | {' | '.join(columns)} | {loss:.3f} | {len(cells)} |")
    return "\n".join(lines)


def energy_table(results: Results) -> str:
    """Lay out how much of the dense outputs survives each kind of importance, by kind of linear."""
    lines = ["| linear | task | rms of its input features | magnitude | activation |", "|---|---|--:|--:|--:|"]
    for task in sorted(set(TRAINED) & set(results["energy"])):
        kinds = results["energy"][task]
        for kind, row in kinds.items():
            spread = f"{row['input_rms_low']:.2f} to {row['input_rms_high']:.2f}"
            lines.append(f"| {kind} | {task} | {spread} | {row['magnitude']:.0%} | {row['activation']:.0%} |")
    return "\n".join(lines)


def short_table(results: Results, task: str = "qnli") -> str:
    """Lay out the first cells, which were trained one at a time on a CPU: one row per method."""
    lines = ["| method | seeds | dev | kept of dense - floor | train |", "|---|--:|--:|--:|--:|"]
    methods = dict.fromkeys(c["method"] for c in select(results, task=task) if c["sparsity"])
    groups = [select(results, task=task, method=m) for m in methods]
    for cells in sorted(groups, key=lambda cells: -mean(c["last"] for c in cells)):
        kept = mean(share(c, results) for c in cells)
        columns = f"{spread_of(cells, 'last')} | {kept:.0%} | {spread_of(cells, 'train_last')}"
        lines.append(f"| {cells[0]['method']} | {len(cells)} | {columns} |")
    return "\n".join(lines)


def tried_table(results: Results) -> str:
    """Lay out what was tried on MNLI before the grid: one change to one base each."""
    methods = [c["method"] for c in select(results, task="mnli") if c["sparsity"] == 0.9]
    lines = ["| MNLI, 90 %, 8 x 1 | dev | kept of dense - floor | train |", "|---|--:|--:|--:|"]
    for cells in sorted((select(results, method=m, sparsity=0.9) for m in methods), key=lambda c: -c[0]["last"]):
        cell = cells[0]
        label = NAMES.get(cell["method"], cell["method"])
        lines.append(
            f"| {label} | {100 * cell['last']:.1f} | {share(cell, results):.0%} | {100 * cell['train_last']:.1f} |"
        )
    return "\n".join(lines)


def mean(values: Iterable[float]) -> float:
    """Give the mean."""
    return statistics.mean(values)


def score_of(cells: Cells, results: Results) -> str:
    """Lay out mean and spread of the last score, and what is kept of dense - floor."""
    return f"{spread_of(cells, 'last')} ({mean(share(cell, results) for cell in cells):.0%})"


def spread_of(cells: Cells, key: str) -> str:
    """Lay out mean and standard deviation over seeds of a score, in points."""
    values = [100 * cell[key] for cell in cells]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"

"""Pictures of the accuracy grid: kept against density, all methods beside each other, losses over the steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.layouts.accuracy import (
    DEFAULT,
    SHAPE,
    Cells,
    Results,
    dense_score,
    is_kin,
    mean,
    methods_of,
    select,
    share,
)

OURS, OTHERS, MUTED = "#1f6f8b", "#d1603d", "0.45"
LOWEST = -45.0  # percent: below, a method has lost the task, and how far does not matter


def plot_shares(panels: Sequence[tuple[str, Results, str]], file: Path) -> None:
    """Draw what is kept of dense - floor against density, a line per method; single cells are points.

    Args:
        panels: (title, results, task).
        file: a PNG.
    """
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.6), sharey=True, squeeze=False)
    colours: dict[str, str] = {}  # a method's, in all panels
    for axes, (title, results, task) in zip(all_axes[0], panels, strict=True):
        cells = [cell for cell in select(results, task=task, block=SHAPE) if cell["sparsity"]]
        lines = {m: _kept_by_density(m, cells, results) for m in dict.fromkeys(cell["method"] for cell in cells)}
        drawn = {method: line for method, line in lines.items() if len(line) > 1}
        for method, line in drawn.items():
            colour = colours.setdefault(method, f"C{len(colours)}")
            axes.plot(*zip(*line, strict=True), "-o", color=colour, label=method, alpha=0.9)
        single = [line[0] for method, line in lines.items() if method not in drawn and line[0][1] > LOWEST]
        if single:
            axes.plot(*zip(*single, strict=True), "x", color=MUTED, label="other methods, one sparsity each")
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.axhline(100, color="0.3", linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel="density", xscale="log", xlim=(0.045, 0.56), ylim=(LOWEST, 108))
        axes.set_xticks([0.05, 0.1, 0.2, 0.5], ["5%", "10%", "20%", "50%"])
        axes.minorticks_off()
        axes.legend(fontsize=7, loc="lower right")
    all_axes[0][0].set_ylabel("kept of dense - floor (%), 8 x 1 blocks")
    _save(figure, file)


def plot_methods(panels: Sequence[tuple[str, Results, str]], file: Path, sparsity: float = 0.9) -> None:
    """Draw the score of every method at one sparsity, best first, between the floor and the dense model.

    Args:
        panels: (title, results, task).
        file: a PNG.
        sparsity: of all cells.
    """
    import matplotlib.pyplot as plt

    found = [_scores_of_methods(results, task, sparsity) for _, results, task in panels]
    rows = max(len(scores) for scores in found)
    size = (8.0 * len(panels), 1.1 + 0.24 * rows)
    figure, all_axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for axes, scores, (title, results, task) in zip(all_axes[0], found, panels, strict=True):
        for row, (method, values) in enumerate(scores):
            colour = OURS if is_kin(method) else OTHERS
            axes.hlines(row, min(values), max(values), color=colour, linewidth=2)
            axes.plot(mean(values), row, "D" if method == DEFAULT else "o", color=colour, markersize=6)
        dense = 100 * dense_score(task, results)
        for text, at in (("dense", dense), ("floor", 100 * results["floors"][task]["accuracy"])):
            axes.axvline(at, color="0.3", linewidth=0.8, linestyle=":" if text == "dense" else "-")
            axes.text(at, -0.9, text, ha="center", va="bottom", fontsize=8, color="0.3")
        axes.set_yticks(
            range(len(scores)), [f"{m}, {len(v)} seeds" if len(v) > 1 else m for m, v in scores], fontsize=8
        )
        axes.set(ylim=(rows - 0.4, -1), xlabel="accuracy on all dev rows (%)")
        axes.set_title(title, pad=14, fontsize=11)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    _save(figure, file)


def plot_courses(panels: Sequence[tuple[str, Results, str, Sequence[str]]], file: Path, sparsity: float = 0.9) -> None:
    """Draw the loss on dev rows and on known training rows over the steps, of the first seed.

    Args:
        panels: (title, results, task, methods); methods without a cell are left out.
        file: a PNG.
        sparsity: of all cells.
    """
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 5.0), squeeze=False)
    colours: dict[str, str] = {}
    for axes, (title, results, task, methods) in zip(all_axes[0], panels, strict=True):
        groups = [(m, select(results, task=task, method=m, block=SHAPE, sparsity=sparsity)) for m in methods]
        for method, cells in ((m, cells) for m, cells in groups if cells):
            at, colour = cells[0]["dev"], colours.setdefault(method, f"C{len(colours)}")
            steps = [entry["step"] for entry in at]
            axes.plot(steps, [e["dev_loss"] for e in at], marker="o", color=colour, label=method)
            axes.plot(steps, [e["train_loss"] for e in at], marker=".", linestyle="--", color=colour)
        axes.set(title=title, xlabel="steps", ylim=(0, None))
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    all_axes[0][0].set_ylabel("task loss: dev (solid), training rows (dashed)")
    _save(figure, file)


def _kept_by_density(method: str, cells: Cells, results: Results) -> list[tuple[float, float]]:
    points: dict[float, list[float]] = {}
    for cell in cells:
        if cell["method"] == method:
            points.setdefault(1.0 - cell["sparsity"], []).append(100 * share(cell, results))
    return sorted((density, mean(kept)) for density, kept in points.items())


def _scores_of_methods(results: Results, task: str, sparsity: float) -> list[tuple[str, list[float]]]:
    at = {"task": task, "block": SHAPE, "sparsity": sparsity}
    found = {m: [100 * cell["last"] for cell in select(results, method=m, **at)] for m in methods_of(results, **at)}
    return sorted(found.items(), key=lambda item: -statistics.mean(item[1]))


def _save(figure: Any, file: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)

"""Pictures of the accuracy grid: kept against density, all methods beside each other, losses over the steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.layouts.accuracy import (
    DEFAULT,
    DENSE,
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
HIGHEST = 130.0


def plot_shares(panels: Sequence[tuple[str, Results, str, Sequence[str]]], file: Path) -> None:
    """Draw what is kept of dense - floor against density, a line per named method; all others are small crosses.

    Args:
        panels: (title, results, task, methods to name); those without a cell are left out.
        file: a PNG.
    """
    import matplotlib.pyplot as plt

    columns = min(len(panels), 3)
    size = (4.6 * columns, 4.4 * -(-len(panels) // columns))
    figure, all_axes = plt.subplots(-(-len(panels) // columns), columns, figsize=size, sharey=True, squeeze=False)
    colours: dict[str, str] = {}  # a method's, in all panels
    for axes in all_axes.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, results, task, named) in zip(all_axes.flat, panels, strict=False):
        cells = [cell for cell in select(results, task=task, block=SHAPE) if cell["sparsity"]]
        methods = dict.fromkeys(cell["method"] for cell in cells)
        for method in [name for name in named if name in methods]:
            line = [(x, max(y, LOWEST)) for x, y in _kept_by_density(method, cells, results)]
            colour = colours.setdefault(method, f"C{len(colours)}")
            axes.plot(*zip(*line, strict=True), "-o", color=colour, label=method, alpha=0.9)
            lost = [point for point in line if point[1] == LOWEST]
            if lost:
                axes.plot(*zip(*lost, strict=True), "v", color=colour, markersize=11, clip_on=False)
        rest = [_kept_by_density(m, cells, results) for m in methods_of(results, task=task) if m not in named]
        single = [point for line in rest for point in line if point[1] > LOWEST]
        if single:
            axes.plot(*zip(*single, strict=True), "x", color=MUTED, markersize=4, label="other methods")
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.axhline(100, color="0.3", linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel="density", xscale="log", xlim=(0.045, 0.56), ylim=(LOWEST, HIGHEST))
        axes.set_xticks([0.05, 0.1, 0.2, 0.5], ["5%", "10%", "20%", "50%"])
        axes.minorticks_off()
        axes.legend(fontsize=7, loc="lower right")
    for axes in all_axes[:, 0]:
        axes.set_ylabel("kept of dense - floor (%), 8 x 1 blocks\ntriangles: below the axis")
    _save(figure, file)


def plot_methods(panels: Sequence[tuple[str, Results, str]], file: Path, sparsity: float = 0.9) -> None:
    """Draw the score of every method at one sparsity, best first, between the floor and the dense model.

    Args:
        panels: (title, results, task).
        file: a PNG.
        sparsity: of all cells.
    """
    import matplotlib.pyplot as plt

    found = [(*panel, _scores_of_methods(*panel[1:], sparsity)) for panel in panels]
    found = [panel for panel in found if panel[3]]
    rows = [len(scores) + 4 for *_, scores in found]
    figure, all_axes = plt.subplots(
        len(found), 1, figsize=(9.0, 0.22 * sum(rows)), squeeze=False, height_ratios=rows
    )  # fmt: skip
    for axes, (title, results, task, scores) in zip(all_axes[:, 0], found, strict=True):
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
        axes.set(ylim=(len(scores) - 0.4, -1), xlabel="accuracy on all dev rows (%)")
        axes.set_title(title, pad=14, fontsize=11)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    _save(figure, file)


def plot_courses(panels: Sequence[tuple[str, Results, str, Sequence[str]]], file: Path, sparsity: float = 0.9) -> None:
    """Draw the loss on dev rows and on known training rows over the steps, mean over seeds.

    Args:
        panels: (title, results, task, methods); those without a cell are left out, dense ones have no sparsity.
        file: a PNG.
        sparsity: of all cells.
    """
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 5.0), squeeze=False)
    colours: dict[str, str] = {}
    for axes, (title, results, task, methods) in zip(all_axes[0], panels, strict=True):
        for method in methods:
            wanted = {} if method in DENSE else {"block": SHAPE, "sparsity": sparsity}
            courses = [cell["dev"] for cell in select(results, task=task, method=method, **wanted)]
            if not courses:
                continue
            dense = method in DENSE
            colour = "black" if dense else colours.setdefault(method, f"C{len(colours)}")
            steps = [entry["step"] for entry in courses[0]]
            for key, style in (("dev_loss", "-o"), ("train_loss", "--")):
                losses = [mean(entry[key] for entry in at) for at in zip(*courses, strict=True)]
                label = f"{method}, {len(courses)} seeds" if len(courses) > 1 else method
                axes.plot(steps, losses, style, markersize=5, color=colour, label=label if style == "-o" else None)
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

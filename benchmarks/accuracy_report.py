"""Write the tables and plots of docs/accuracy.md from results/accuracy.json.

Usage: python benchmarks/accuracy_report.py [--check]

--check only tells, by exit status 1, that tables are out of date.

Plots need matplotlib: docs/accuracy-share.png (what each method keeps of dense minus floor) and
docs/accuracy-course.png (train and dev loss over the steps).
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/accuracy.json", ROOT / "docs/accuracy.md"
_MARKED = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n)(.*?)(<!-- /table:(?P=name) -->)", re.DOTALL)
_CURVES = 4


def share(cell: Mapping[str, Any], results: Mapping[str, Any], score: str = "last") -> float:
    """Give the part of (dense - floor) that a cell keeps; below 0 where it is worse than a bag of embeddings."""
    floor, dense = results["floors"][cell["task"]]["accuracy"], dense_score(cell["task"], results)
    return (cell[score] - floor) / (dense - floor)


def dense_score(task: str, results: Mapping[str, Any]) -> float:
    """Give the score at the last step of the model that the pruned ones started from."""
    return next(c["last"] for c in results["cells"] if (c["task"], c["method"]) == (task, "dense"))


def groups(task: str, results: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Sort the finished cells of a task into those that differ by seed alone, best group first, dense on top."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in results["cells"]:
        if cell["task"] == task and "failed" not in cell:
            found.setdefault((cell["method"], *cell["block"], cell["sparsity"]), []).append(cell)
    return sorted(found.values(), key=lambda cells: (cells[0]["sparsity"], -_mean(c["last"] for c in cells)))


def table(task: str, results: Mapping[str, Any]) -> str:
    """Lay out the cells of a task: one row for each method, block shape and sparsity; failed ones at the end."""
    floor = results["floors"][task]
    lines = [
        "| method | blocks | sparsity | seeds | last step | best dev | kept of dense - floor | train | train - dev |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for cells in groups(task, results):
        first = cells[0]
        kept = "" if not first["sparsity"] else f"{_mean(share(c, results) for c in cells):.0%}"
        shape = "" if not first["sparsity"] else "x".join(map(str, first["block"]))
        columns = [_spread(cells, key) for key in ("last", "best")]
        columns += [kept, _spread(cells, "train_last"), _spread(cells, "gap")]
        lines.append(
            f"| {first['method']} | {shape} | {first['sparsity']:.0%} | {len(cells)} | {' | '.join(columns)} |"
        )
    lines.append(f"| *floor* (mean word embeddings) | | | | {100 * floor['accuracy']:.1f} | | 0% | | |")
    lines.append(f"| *commonest answer* | | | | {100 * floor['commonest']:.1f} | | | | |")
    lines += [
        f"| {c['name']} | failed: {c['failed']} |" for c in results["cells"] if "failed" in c and c["task"] == task
    ]
    return "\n".join(lines)


def energy_table(results: Mapping[str, Any]) -> str:
    """Lay out how much of the dense outputs survives each kind of importance, by kind of linear."""
    lines = ["| linear | task | rms of its input features | magnitude | activation |", "|---|---|--:|--:|--:|"]
    for task, kinds in results["energy"].items():
        for kind, row in kinds.items():
            spread = f"{row['input_rms_low']:.2f} to {row['input_rms_high']:.2f}"
            lines.append(f"| {kind} | {task} | {spread} | {row['magnitude']:.0%} | {row['activation']:.0%} |")
    return "\n".join(lines)


def fill(text: str, results: Mapping[str, Any]) -> str:
    """Renew every table of a page that stands between `<!-- table:accuracy-TASK -->` marks.

    Raises:
        ValueError: if a task that was measured has no table, or a table no task.
    """
    made = {f"accuracy-{task}": table(task, results) for task in results["floors"] if groups(task, results)}
    if results["energy"]:
        made["accuracy-energy"] = energy_table(results)
    marked = [match["name"] for match in _MARKED.finditer(text)]
    if sorted(made) != sorted(marked):
        raise ValueError(f"{PAGE.name} has the tables {sorted(marked)}, results are there for {sorted(made)}.")
    return _MARKED.sub(lambda match: f"{match[1]}{made[match['name']]}\n{match[4]}", text)


def plot_shares(results: Mapping[str, Any], file: Path) -> None:
    """Draw what is kept of dense - floor: a line over density per method and block shape, bars where there is one."""
    import matplotlib.pyplot as plt

    tasks = [task for task in results["floors"] if groups(task, results)]
    figure, all_axes = plt.subplots(len(tasks), 1, figsize=(7.5, 3.2 * len(tasks)), squeeze=False)
    for axes, task in zip(all_axes[:, 0], tasks, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for cells in groups(task, results):
            if cells[0]["sparsity"]:
                label = f"{cells[0]['method']}, {'x'.join(map(str, cells[0]['block']))}"
                kept = _mean(share(c, results) for c in cells)
                lines.setdefault(label, []).append((1.0 - cells[0]["sparsity"], 100 * kept))
        densities = {density for points in lines.values() for density, _ in points}
        if len(densities) == 1:
            names = list(lines)[::-1]
            axes.barh(names, [lines[name][0][1] for name in names], color="C0")
            axes.axvline(0, color="0.3", linewidth=0.8)
            axes.set(title=f"{task.upper()}, density {densities.pop():.0%}", xlabel="kept of dense - floor (%)")
            axes.tick_params(axis="y", labelsize=8)
            continue
        for label, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.set(title=task.upper(), xlabel="density", ylabel="kept of dense - floor (%)")
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def plot_courses(results: Mapping[str, Any], task: str, file: Path) -> None:
    """Draw dev loss and the loss on known training rows over the epochs, for the longest runs of a task."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4.2))
    pruned = [cells[0] for cells in groups(task, results) if cells[0]["sparsity"]]
    longest = max(cell["epochs"] for cell in pruned)
    for i, cell in enumerate([cell for cell in pruned if cell["epochs"] == longest][:_CURVES]):
        steps = [at["step"] / cell["steps"] * cell["epochs"] for at in cell["dev"]]
        label = f"{cell['method']}, {'x'.join(map(str, cell['block']))}, {cell['sparsity']:.0%}"
        axes.plot(steps, [at["dev_loss"] for at in cell["dev"]], marker="o", color=f"C{i}", label=label)
        axes.plot(steps, [at["train_loss"] for at in cell["dev"]], marker=".", linestyle="--", color=f"C{i}")
    axes.set(xlabel="epochs", ylabel="task loss: dev (solid), training rows (dashed)", title=task.upper())
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _mean(values: Iterable[float]) -> float:
    return statistics.mean(values)


def _spread(cells: list[dict[str, Any]], key: str) -> str:
    values = [100 * cell[key] for cell in cells]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{_mean(values):.1f}{spread}"


def main(arguments: list[str]) -> int:
    """Renew page and plots, or with --check only tell whether the tables are up to date."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    old = PAGE.read_text(encoding="utf-8")
    new = fill(old, results)
    if "--check" in arguments:
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    plot_shares(results, PAGE.with_name("accuracy-share.png"))
    longest = max(results["floors"], key=lambda task: len(groups(task, results)))
    plot_courses(results, longest, PAGE.with_name("accuracy-course.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

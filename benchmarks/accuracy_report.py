"""Write the tables and plots of docs/accuracy.md from the JSON files results/accuracy*.json.

Usage: python benchmarks/accuracy_report.py [--check]

--check only tells, by exit status 1, that tables are out of date.

Plots need matplotlib: docs/accuracy-share.png (what is kept of dense minus floor against density, per method) and
docs/accuracy-course.png (train and dev loss over the steps).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.layouts.accuracy import (
    CONTROL,
    FASTER,
    LEAD,
    RECIPE,
    SHAPE,
    SLOWER,
    TRAINED,
    Results,
    blocks_table,
    energy_table,
    gap_table,
    goals_table,
    mean,
    methods_table,
    select,
    share,
    short_table,
    sparsity_table,
    tried_table,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/accuracy.json", ROOT / "docs/accuracy.md"
CPU_RESULTS = ROOT / "benchmarks/results/accuracy_cpu.json"
TRAINER_RESULTS = ROOT / "benchmarks/results/accuracy_trainer.json"
TRIED = ROOT / "benchmarks/results/accuracy_exploration.json"
_MARKED = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n)(.*?)(<!-- /table:(?P=name) -->)", re.DOTALL)


def tables(results: Results, trained: Results, cpu: Results, tried: Results) -> dict[str, str]:
    """Make every table of the page; block shapes of the grid only if they were run."""
    made: dict[str, Callable[[], str]] = {
        "goals": lambda: goals_table(results, trained), "methods": lambda: methods_table(results),
        "sparsity": lambda: sparsity_table(results), "blocks": lambda: blocks_table(results),
        "gap": lambda: gap_table(results), "energy": lambda: energy_table(cpu), "cpu": lambda: short_table(cpu),
        "tried": lambda: tried_table(tried), "trainer-methods": lambda: methods_table(trained, TRAINED),
        "trainer-sparsity": lambda: sparsity_table(trained, TRAINED, (RECIPE, FASTER, CONTROL)),
        "trainer-blocks": lambda: blocks_table(trained, ["qnli"]), "trainer-gap": lambda: gap_table(trained, TRAINED),
    }  # fmt: skip
    if not any(tuple(cell["block"]) != SHAPE for cell in select(results)):
        del made["blocks"]
    return {f"accuracy-{name}": make() for name, make in made.items()}


def fill(text: str, made: Mapping[str, str]) -> str:
    """Renew every table of a page that stands between `<!-- table:NAME -->` marks.

    Raises:
        ValueError: if a table has no place on the page, or a place no table.
    """
    marked = [match["name"] for match in _MARKED.finditer(text)]
    if sorted(made) != sorted(marked):
        raise ValueError(f"{PAGE.name} has places for {sorted(marked)}, there are {sorted(made)}.")
    return _MARKED.sub(lambda match: f"{match[1]}{made[match['name']]}\n{match[4]}", text)


def plot_shares(results: Results, file: Path) -> None:
    """Draw what is kept of dense - floor against density, a line per method; single cells are points."""
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, len(LEAD), figsize=(6.2 * len(LEAD), 5.2), sharey=True)
    for axes, task in zip(all_axes, LEAD, strict=True):
        cells = [cell for cell in select(results, task=task, block=SHAPE) if cell["sparsity"]]
        for i, method in enumerate(dict.fromkeys(cell["method"] for cell in cells)):
            points: dict[float, list[float]] = {}
            for cell in cells:
                if cell["method"] == method:
                    points.setdefault(1.0 - cell["sparsity"], []).append(100 * share(cell, results))
            line = sorted((density, mean(kept)) for density, kept in points.items())
            style = "-o" if len(line) > 1 else "x"
            axes.plot(*zip(*line, strict=True), style, color=f"C{i % 10}", label=method, alpha=0.9)
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.axhline(100, color="0.3", linewidth=0.8, linestyle=":")
        axes.set(title=task.upper(), xlabel="density", xscale="log", ylim=(-45, 108))
        axes.set_xticks([0.05, 0.1, 0.2, 0.5], ["5%", "10%", "20%", "50%"])
        axes.minorticks_off()
    all_axes[0].set_ylabel("kept of dense - floor (%), 8 x 1 blocks")
    all_axes[-1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def plot_courses(results: Results, task: str, file: Path, methods: Sequence[str], sparsity: float = 0.9) -> None:
    """Draw the loss on dev rows and on known training rows over the steps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4.2))
    groups = [(m, select(results, task=task, method=m, block=SHAPE, sparsity=sparsity)) for m in methods]
    for i, (method, cells) in enumerate((m, cells) for m, cells in groups if cells):
        at = cells[0]["dev"]
        steps = [entry["step"] for entry in at]
        axes.plot(steps, [e["dev_loss"] for e in at], marker="o", color=f"C{i}", label=method)
        axes.plot(steps, [e["train_loss"] for e in at], marker=".", linestyle="--", color=f"C{i}")
    title = f"{task.upper()}, {sparsity:.0%}, 8 x 1"
    axes.set(xlabel="steps", ylabel="task loss: dev (solid), training rows (dashed)", title=title)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(arguments: list[str]) -> int:
    """Renew page and plots, or with --check only tell whether the tables are up to date."""
    files = (RESULTS, TRAINER_RESULTS, CPU_RESULTS, TRIED)
    results, trained, cpu, tried = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    old = PAGE.read_text(encoding="utf-8")
    new = fill(old, tables(results, trained, cpu, tried))
    if "--check" in arguments:
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    plot_shares(results, PAGE.with_name("accuracy-share.png"))
    plot_courses(results, "qnli", PAGE.with_name("accuracy-course.png"), (RECIPE, CONTROL, SLOWER))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

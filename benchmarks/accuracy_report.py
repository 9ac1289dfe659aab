"""Write the tables and plots of docs/accuracy.md from the JSON files results/accuracy*.json, and regrouping.json.

Usage: python benchmarks/accuracy_report.py [--check]

--check only tells, by exit status 1, that tables are out of date.

Plots need matplotlib: docs/accuracy-share.png (what is kept of dense minus floor against density, per method),
docs/accuracy-methods.png (all methods at 90 %) and docs/accuracy-course.png (train and dev loss over the steps).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.layouts.accuracy import (
    CONTROL,
    DEFAULT,
    DENSE,
    LAST,
    LEAD,
    LONG,
    PLAIN,
    RECIPE,
    ROWS,
    SHAPE,
    SLOWER,
    TRAINED,
    Results,
    as_long,
    blocks_table,
    energy_table,
    gap_table,
    methods_table,
    select,
    short_table,
    sparsity_table,
    tried_table,
)
from benchmarks.layouts.accuracy_goals import goals_table
from benchmarks.layouts.accuracy_plots import plot_courses, plot_methods, plot_shares
from benchmarks.layouts.regrouping import regrouping_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/accuracy.json", ROOT / "docs/accuracy.md"
CPU_RESULTS = ROOT / "benchmarks/results/accuracy_cpu.json"
TRAINER_RESULTS = ROOT / "benchmarks/results/accuracy_trainer.json"
TRIED = ROOT / "benchmarks/results/accuracy_exploration.json"
REGROUPING = ROOT / "benchmarks/results/regrouping.json"
PASSES = {"qnli": "one pass", "sst2": "four passes"}  # of the cells by the trainer
PAPERS = (
    "agp+kd",
    "preset spd",
    "agp+kd, grafting",
    "reweighted lasso, proximal, kd",
    "grafting, reweighted lasso, kd",
)
_MARKED = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n)(.*?)(<!-- /table:(?P=name) -->)", re.DOTALL)


def tables(
    results: Results, trained: Results, cpu: Results, tried: Results, regrouping: Results | None = None
) -> dict[str, str]:
    """Make every table of the page; block shapes of the grid, more rows and regrouped ones, only if they were run."""
    long = as_long(trained)
    made: dict[str, Callable[[], str]] = {
        "goals": lambda: goals_table(results, trained), "methods": lambda: methods_table(results),
        "sparsity": lambda: sparsity_table(results), "blocks": lambda: blocks_table(results),
        "gap": lambda: gap_table(results), "energy": lambda: energy_table(cpu), "cpu": lambda: short_table(cpu),
        "tried": lambda: tried_table(tried),
        "trainer-long": lambda: methods_table(long, tuple(LONG)),
        "trainer-pass": lambda: methods_table(trained, ("qnli",)),
        "trainer-sparsity": lambda: sparsity_table(long, tuple(LONG), (DEFAULT, PLAIN, RECIPE, CONTROL)),
        "trainer-hidden": lambda: methods_table(trained, (LAST,), 0.8),
        "trainer-rows": lambda: sparsity_table(trained, ROWS, (DEFAULT, CONTROL), (0.9,)),
        "trainer-blocks": lambda: blocks_table(trained, ["qnli"]),
        "trainer-gap": lambda: gap_table(long, ("qnli", "mnli", LAST)),
    }  # fmt: skip
    if not any(tuple(cell["block"]) != SHAPE for cell in select(results)):
        del made["blocks"]
    if not select(trained, task=ROWS[1], method="dense"):
        del made["trainer-rows"]
    if regrouping is not None:
        made["regrouping"] = lambda: regrouping_table(regrouping)
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


def main(arguments: list[str]) -> int:
    """Renew page and plots, or with --check only tell whether the tables are up to date."""
    files = (RESULTS, TRAINER_RESULTS, CPU_RESULTS, TRIED, REGROUPING)
    results, trained, cpu, tried, regrouping = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    old = PAGE.read_text(encoding="utf-8")
    new = fill(old, tables(results, trained, cpu, tried, regrouping))
    if "--check" in arguments:
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    long = as_long(trained)
    grid = [(f"{task.upper()}, four passes (grid)", results, task) for task in LEAD]
    alone = [(f"{task.upper()}, {PASSES[task]} (trainer)", trained, task) for task in TRAINED]
    own = [(f"{task.upper()} (trainer)", long, task, (DEFAULT, PLAIN, RECIPE, CONTROL)) for task in LONG]
    theirs = [(f"{task.upper()} (grid)", results, task, (RECIPE, SLOWER, CONTROL)) for task in LEAD]
    plot_shares([*own, *theirs], PAGE.with_name("accuracy-share.png"))
    methods = [(f"{title}, 90%, 8 x 1", *of) for title, *of in alone]
    methods.insert(1, ("QNLI, four passes (trainer), 90%, 8 x 1", long, "qnli"))
    plot_methods(methods, PAGE.with_name("accuracy-methods.png"))
    courses = [(*panel, (RECIPE, SLOWER, CONTROL, DENSE[1])) for panel in grid]
    plot_courses([*courses, (*alone[1], (DEFAULT, *PAPERS, DENSE[1]))], PAGE.with_name("accuracy-course.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

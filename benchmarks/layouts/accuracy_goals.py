"""Goals of the accuracy grid beside what was reached."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.layouts.accuracy import (
    CONTROL,
    DEFAULT,
    LAST,
    LEAD,
    LONG,
    RECIPE,
    SHAPE,
    SLOWER,
    TASKS,
    TRAINED,
    Results,
    as_long,
    is_kin,
    mean,
    mean_share,
    methods_of,
    select,
)

Values = Mapping[str, float | None]


def goals_table(results: Results, trained: Results) -> str:
    """Set every goal beside what was reached: by the default first, then by the recipe of the grid.

    Args:
        results: the grid of stacks: QNLI, MNLI, MRPC.
        trained: the cells of the trainer itself, SST-2 among them.
    """
    long = as_long(trained)
    at = {s: {"block": SHAPE, "sparsity": s} for s in (0.5, 0.8, 0.9)}
    dense = {"method": "dense"}
    lines = ["| goal | by | reached | met |", "|---|---|---|---|"]

    def add(goal: str, by: str, of_tasks: Values, unit: str, least: float, note: str = "", few: bool = False) -> None:
        known = {task: value for task, value in of_tasks.items() if value is not None}
        if not known:
            lines.append(f"| {goal} | {by} |  | not run |")
            return
        each = ", ".join(f"{task.upper()} {value:{unit}}" for task, value in known.items())
        whole = f"{mean(known.values()):{unit}}, mean of {each}" if len(known) > 1 else each
        met = "yes" if mean(known.values()) >= least else "no"
        lines.append(f"| {goal} | {by} | {whole}{note} | {met}{', one seed on a side' if few else ''} |")

    def source_of(task: str) -> Results:
        return trained if task == LAST else results

    unlost, kept = "50 %: within 0.5 point of dense", "{:.0%}, 8 x 1: at least {:.0%} of dense - floor"
    over = "90 %: at least 1 point above AGP + KD"
    lost = {task: points(long, [task], {**at[0.5], "method": DEFAULT}, dense) for task in LONG}
    add(unlost, "default", lost, "+.1f", -0.5)
    for sparsity, goal in ((0.8, 0.95), (0.9, 0.85)):
        shares = {task: mean_share(long, [task], **at[sparsity], method=DEFAULT) for task in LONG}
        add(kept.format(sparsity, goal), "default", shares, ".0%", goal)
    sides = {task: [{**at[0.9], "method": name} for name in (DEFAULT, CONTROL)] for task in LONG}
    _add_control(add, over, "default", "", dict.fromkeys(LONG, long), sides)
    for source, task, passes in ((long, "qnli", ""), (trained, "qnli", ", one pass"), (long, LAST, "")):
        found = rivals(source, task, {**at[0.9], "method": DEFAULT})
        if found is not None:
            text, met = found
            lines.append(f"| 90 %: above every other method, {task.upper()}{passes} | default | {text} | {met} |")
    for sparsity in (0.8, 0.9):
        narrow, single = ({**at[sparsity], "method": RECIPE, "block": block} for block in ((4, 1), (1, 1)))
        apart = {task: points(trained, [task], narrow, single) for task in TRAINED}
        goal_of = f"{sparsity:.0%}: 4 x 1 within 1 point of 1 x 1"
        add(goal_of, "recipe, the trainer", apart, "+.1f", -1.0, few=any(apart.values()))
    four = (*TASKS, LAST)
    lost = {task: points(source_of(task), [task], {**at[0.5], "method": RECIPE}, dense) for task in four}
    add(unlost, "recipe", lost, "+.1f", -0.5)
    for sparsity, goal in ((0.8, 0.95), (0.9, 0.85)):
        wanted = {**at[sparsity], "method": RECIPE}
        shares = {task: mean_share(source_of(task), [task], **wanted) for task in four}
        add(kept.format(sparsity, goal), "recipe", shares, ".0%", goal)
    for tasks, control, note in ((TASKS, CONTROL, ", both at 8e-4"), (LEAD, SLOWER, ", AGP + KD at 4e-4")):
        pairs = {task: [{**at[0.9], "method": name} for name in (RECIPE, control)] for task in tasks}
        _add_control(add, over, "recipe, the grid", note, dict.fromkeys(tasks, results), pairs)
    return "\n".join(lines)


def _add_control(
    add: Callable[..., None], goal: str, by: str, note: str, sources: Mapping[str, Results],
    sides: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:  # fmt: skip
    ahead = {task: points(sources[task], [task], *pair) for task, pair in sides.items()}
    errors = [error_of(sources[task], task, sides[task]) for task, value in ahead.items() if value is not None]
    known = [error for error in errors if error is not None]
    whole = len(known) == len(errors) > 0
    # A difference counts where it is a point and more than two standard errors.
    error = sum(error**2 for error in known) ** 0.5 / len(errors) if whole else 0.0
    text = f"; standard error over seeds {error:.1f}" if whole else ""
    add(f"{goal}{note}", by, ahead, "+.1f", max(1.0, 2 * error), text, few=not whole)


def rivals(results: Results, task: str, ours: Mapping[str, Any]) -> tuple[str, str] | None:
    """Set a method beside all others of a task: the best of all, and the best of those that choose blocks otherwise.

    Returns:
        (text, whether ours is above all); None without others.
    """
    names = methods_of(results, block=ours["block"], sparsity=ours["sparsity"], task=task)
    ahead = {
        name: apart for name in names
        if name != ours["method"]
        and (apart := points(results, [task], ours, {**ours, "method": name})) is not None
    }  # fmt: skip
    if not ahead:
        return None
    best, far = min(ahead, key=lambda name: ahead[name]), [name for name in ahead if not is_kin(name)]
    text = f"{_beside(results, task, ours, best, ahead)}, the best of {len(ahead)} others"
    if far and best not in far:
        other = min(far, key=lambda name: ahead[name])
        text += f"; {_beside(results, task, ours, other, ahead)}, the best that does not choose blocks by Fisher"
    error = error_of(results, task, [ours, {**ours, "method": best}])
    if ahead[best] <= 0:
        return text, "no"
    return text, "yes, one seed on a side" if error is None else "yes" if ahead[best] > 2 * error else "within noise"


def _beside(results: Results, task: str, ours: Mapping[str, Any], name: str, ahead: Mapping[str, float]) -> str:
    error = error_of(results, task, [ours, {**ours, "method": name}])
    return f"{ahead[name]:+.1f} ({'one seed on a side' if error is None else f'± {error:.1f}'}) against *{name}*"


def points(results: Results, tasks: Sequence[str], one: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """Give how many points of accuracy one is above another, mean over tasks; None where a task has no such cells."""
    apart = []
    for task in tasks:
        found = [select(results, task=task, **wanted) for wanted in (one, other)]
        if not all(found):
            return None
        first, second = (mean(cell["last"] for cell in cells) for cells in found)
        apart.append(100 * (first - second))
    return mean(apart)


def error_of(results: Results, task: str, sides: Iterable[Mapping[str, Any]]) -> float | None:
    """Give the standard error of the difference of two means over seeds, in points; None where one has one seed."""
    variance = 0.0
    for wanted in sides:
        values = [100 * cell["last"] for cell in select(results, task=task, **wanted)]
        if len(values) < 2:
            return None
        variance += statistics.variance(values) / len(values)
    return float(variance**0.5)

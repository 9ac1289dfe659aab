"""Goals of the accuracy grid beside what was reached."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
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
    Results,
    as_long,
    is_kin,
    mean,
    mean_share,
    methods_of,
    select,
)

DENSE_ONES: Mapping[str, Any] = {"method": "dense"}
SMALL = "mrpc"  # its 408 dev rows say so little that means are given without it as well


def goals_table(results: Results, trained: Results) -> str:
    """Set every goal beside what was reached: by the default first, then by the recipe of the grid.

    Args:
        results: the grid of stacks: QNLI, MNLI, MRPC.
        trained: the cells of the trainer itself, SST-2 among them.
    """
    long = as_long(trained)
    own: Mapping[str, Results] = dict.fromkeys(LONG, long)
    grid: Mapping[str, Results] = dict.fromkeys(TASKS, results)
    four: Mapping[str, Results] = {**grid, LAST: trained}
    lines = ["| goal | by | reached | met |", "|---|---|---|---|"]

    def at(sparsity: float, method: str, block: tuple[int, int] = SHAPE) -> dict[str, Any]:
        return {"method": method, "block": block, "sparsity": sparsity}

    def three(by: str, method: str, sources: Mapping[str, Results]) -> None:
        lines.append(_row("50 %: within 0.5 point of dense", by, sources, at(0.5, method), DENSE_ONES, -0.5))
        for sparsity, goal in ((0.8, 0.95), (0.9, 0.85)):
            name = f"{sparsity:.0%}, 8 x 1: at least {goal:.0%} of dense - floor"
            lines.append(_row(name, by, sources, at(sparsity, method), None, goal))

    over = "90 %: at least 1 point above AGP + KD"
    three("default", DEFAULT, own)
    lines.append(_row(over, "default", own, at(0.9, DEFAULT), at(0.9, CONTROL), 1.0, noisy=True))
    for source, task, passes in ((long, "qnli", ""), (trained, "qnli", ", one pass"), (long, LAST, "")):
        found = rivals(source, task, at(0.9, DEFAULT))
        if found is not None:
            text, met = found
            lines.append(f"| 90 %: above every other method, {task.upper()}{passes} | default | {text} | {met} |")
    for sparsity in (0.8, 0.9):
        narrow, single = (at(sparsity, RECIPE, block) for block in ((4, 1), (1, 1)))
        name = f"{sparsity:.0%}: 4 x 1 within 1 point of 1 x 1"
        lines.append(_row(name, "recipe, the trainer", {"qnli": trained}, narrow, single, -1.0))
    three("recipe", RECIPE, four)
    for sources, control, note in (
        (grid, CONTROL, "both at 8e-4"), (dict.fromkeys(LEAD, results), SLOWER, "AGP + KD at 4e-4"),
    ):  # fmt: skip
        ours, other = at(0.9, RECIPE), at(0.9, control)
        lines.append(_row(f"{over}, {note}", "recipe, the grid", sources, ours, other, 1.0, noisy=True))
    return "\n".join(lines)


def _row(
    goal: str, by: str, sources: Mapping[str, Results], ours: Mapping[str, Any], other: Mapping[str, Any] | None,
    least: float, noisy: bool = False,
) -> str:  # fmt: skip
    """Lay out one goal that is a mean over tasks.

    Args:
        goal, by: what is said.
        sources: per task, where its cells are.
        ours: selects the cells.
        other: selects those that they are compared with, in points; None = with dense and floor, as a share.
        least: that the mean has to reach.
        noisy: whether it has to be more than two standard errors as well.
    """
    values: dict[str, float] = {}
    for task, source in sources.items():
        value = mean_share(source, [task], **ours) if other is None else points(source, [task], ours, other)
        if value is not None:
            values[task] = value
    if not values:
        return f"| {goal} | {by} |  | not run |"
    # Of the dense model there is one.
    sides = [side for side in (ours, other) if side is not None and side != DENSE_ONES]
    errors = [error_of(sources[task], task, sides) for task in values]
    known = [error for error in errors if error is not None]
    text, digits = _figure(mean(values.values()), other), 2 if other is None else 1
    if len(values) > 1:
        text += f", mean of {', '.join(f'{task.upper()} {_figure(value, other)}' for task, value in values.items())}"
        rest = [value for task, value in values.items() if task != SMALL]
        text += f"; without {SMALL.upper()} {_figure(mean(rest), other)}" if len(rest) < len(values) else ""
    else:
        text = f"{next(iter(values)).upper()} {text}"
    if noisy and len(known) == len(errors):
        error = sum(error**2 for error in known) ** 0.5 / len(errors)
        text, least = f"{text}; standard error over seeds {error:.1f}", max(least, 2 * error)
    met = ["yes" if round(mean(values.values()), digits + 6) >= least else "no"]
    met += [f"{len(values)} of {len(sources)} tasks"] if len(values) < len(sources) else []
    alone = len(errors) - len(known)
    met += ["one seed" if alone == len(errors) else f"one seed in {alone} of {len(errors)}"] if alone else []
    return f"| {goal} | {by} | {text} | {', '.join(met)} |"


def _figure(value: float, other: object) -> str:
    # + 0.0, so that no zero has a minus.
    return f"{round(value, 2) + 0.0:.0%}" if other is None else f"{round(value, 1) + 0.0:+.1f}"


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
    errors = {name: error_of(results, task, [ours, {**ours, "method": name}]) for name in ahead}
    text = f"{_beside(best, ahead[best], errors[best])}, the best of {len(ahead)} others"
    if far and best not in far:
        other = min(far, key=lambda name: ahead[name])
        text += f"; {_beside(other, ahead[other], errors[other])}, the best that does not choose blocks by Fisher"
    if ahead[best] <= 0:
        return text, "no"
    if any(error is not None and ahead[name] <= 2 * error for name, error in errors.items()):
        return text, "within noise"
    alone = sum(error is None for error in errors.values())
    return text, f"yes, one seed in {alone} of {len(errors)}" if alone else "yes"


def _beside(name: str, ahead: float, error: float | None) -> str:
    return f"{ahead:+.1f} ({'one seed' if error is None else f'± {error:.1f}'}) against *{name}*"


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
    """Give the standard error of the difference of two means over seeds, in points; None if a side has one seed."""
    variance = 0.0
    for wanted in sides:
        values = [100 * cell["last"] for cell in select(results, task=task, **wanted)]
        if len(values) < 2:
            return None
        variance += statistics.variance(values) / len(values)
    return float(variance**0.5)

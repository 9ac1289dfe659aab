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
    is_kin,
    mean,
    mean_share,
    methods_of,
    select,
)


def goals_table(results: Results, trained: Results) -> str:
    """Set every goal beside what was reached.

    Args:
        results: the grid of stacks: QNLI, MNLI, MRPC.
        trained: the cells of the trainer itself: SST-2, and what the grid lacks.
    """
    at = {s: {"method": RECIPE, "block": SHAPE, "sparsity": s} for s in (0.5, 0.8, 0.9)}
    lines = ["| goal | reached | met |", "|---|---|---|"]

    def add(goal: str, text: str, met: bool | str | None) -> None:
        said = met if isinstance(met, str) else "not run" if met is None else "yes" if met else "no"
        lines.append(f"| {goal} | {text} | {said} |")

    def over_all(of_task: Callable[[Results, str], float | None]) -> tuple[str, float] | None:
        found = {task: of_task(results, task) for task in TASKS} | {LAST: of_task(trained, LAST)}
        known = {task: value for task, value in found.items() if value is not None}
        return (f"mean of {_named(known)}", mean(known.values())) if known else None

    lost = over_all(lambda source, task: points(source, [task], at[0.5], {"method": "dense"}))
    add("50 %: recipe within 0.5 point of dense", f"{lost[1]:+.1f} points, {lost[0]}" if lost else "",
        lost[1] >= -0.5 if lost else None)  # fmt: skip
    fell = {task: points(trained, [task], {**at[0.5], "method": DEFAULT + long}, {"method": "dense"})
            for task, long in LONG.items()}  # fmt: skip
    apart_from = {task: value for task, value in fell.items() if value is not None}
    text = f"{mean(apart_from.values()):+.1f} points, mean of {_named(apart_from)}" if apart_from else ""
    add("50 %: default within 0.5 point of dense (by the trainer)", text,
        mean(apart_from.values()) >= -0.5 if apart_from else None)  # fmt: skip
    for sparsity, goal in ((0.8, 0.95), (0.9, 0.85)):
        kept = over_all(lambda source, task, of=at[sparsity]: mean_share(source, [task], **of))  # type: ignore[misc]
        text = f"{kept[1]:.0%}, {kept[0]}" if kept else ""
        add(f"{sparsity:.0%}, 8 x 1: recipe keeps at least {goal:.0%} of dense - floor", text,
            kept[1] >= goal if kept else None)  # fmt: skip
        mine = {
            task: mean_share(trained, [task], block=SHAPE, sparsity=sparsity, method=DEFAULT + long)
            for task, long in LONG.items()
        }
        own = {task: value for task, value in mine.items() if value is not None}
        text = f"{mean(own.values()):.0%}, mean of {_named(own)}" if own else ""
        add(f"{sparsity:.0%}, 8 x 1: default keeps at least {goal:.0%} of dense - floor (by the trainer)", text,
            mean(own.values()) >= goal if own else None)  # fmt: skip
    for sparsity in (0.8, 0.9):
        narrow, single = ({"method": RECIPE, "block": block, "sparsity": sparsity} for block in ((4, 1), (1, 1)))
        known = [task for task in TRAINED if points(trained, [task], narrow, single) is not None]
        apart = points(trained, known, narrow, single) if known else None
        text = "" if apart is None else f"{apart:+.1f} points, {_named(known)}"
        add(f"{sparsity:.0%}: 4 x 1 within 1 point of 1 x 1", text, None if apart is None else apart >= -1.0)
    for source, tasks, method, control, note in (
        (results, TASKS, RECIPE, CONTROL, "same learning rate, 8e-4"),
        (results, LEAD, RECIPE, SLOWER, "AGP + KD at 4e-4"),
        (trained, TRAINED, RECIPE, CONTROL, "both at 4e-4, by the trainer"),
        (trained, TRAINED, DEFAULT, CONTROL, "both at 4e-4, by the trainer"),
    ):
        sides = [{**at[0.9], "method": name} for name in (method, control)]
        over = [task for task in tasks if points(source, [task], *sides) is not None]
        ahead, spread = (points(source, over, *sides) if over else None), seed_spread(source, over, sides)
        text = f"{ahead:+.1f} points, {_named(over)}" if ahead is not None else ""
        text += f"; standard error over seeds {spread:.1f}" if spread else "; one seed" if text else ""
        add(f"90 %: {method} at least 1 point above AGP + KD ({note})", text,
            None if ahead is None else ahead >= 1.0 and ahead > 2 * spread)  # fmt: skip
    for source, ours, task, where in (
        (results, RECIPE, "qnli", "the grid"), *((trained, DEFAULT, task, "the trainer") for task in TRAINED),
    ):  # fmt: skip
        if (found := against(source, task, {**at[0.9], "method": ours}, kin=False)) is not None:
            text, ahead, error = found
            told = apart_by_noise(ahead, error) or ahead > 0
            add(f"90 %: {ours} above every other method ({task.upper()}, {where})", text, told)
    for task in TRAINED:
        if (found := against(trained, task, {**at[0.9], "method": DEFAULT}, kin=True)) is not None:
            rivalry = f"90 %: no variant of the default ahead of it by two standard errors ({task.upper()})"
            add(rivalry, found[0], found[1] >= -2 * found[2])
    return "\n".join(lines)


def _named(tasks: Iterable[str]) -> str:
    return ", ".join(task.upper() for task in tasks)


def apart_by_noise(ahead: float, error: float) -> str:
    """Say so where a difference is less than two standard errors; "" where it is more."""
    return "within noise" if abs(ahead) < 2 * error else ""


def against(results: Results, task: str, ours: Mapping[str, Any], kin: bool) -> tuple[str, float, float] | None:
    """Set a method beside the best of its rivals: of its variants (`kin`), or of all other methods.

    Returns:
        (text, points that ours is ahead, standard error of these over seeds); None without rivals.
    """
    names = methods_of(results, block=ours["block"], sparsity=ours["sparsity"], task=task)
    ahead: dict[str, float] = {}
    for name in names:
        apart = points(results, [task], ours, {**ours, "method": name})
        if apart is not None and name != ours["method"] and is_kin(name) == kin:
            ahead[name] = apart
    if not ahead:
        return None
    best = min(ahead, key=lambda name: ahead[name])
    error = seed_spread(results, [task], [ours, {**ours, "method": best}])
    text = f"{ahead[best]:+.1f} points against the best of {len(ahead)}, {best}"
    return f"{text}; {f'standard error over seeds {error:.1f}' if error else 'one seed'}", ahead[best], error


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


def seed_spread(results: Results, tasks: Sequence[str], sides: Iterable[Mapping[str, Any]]) -> float:
    """Give the standard error of the difference of two means over tasks and seeds, in points; 0 for single seeds."""
    variance = 0.0
    for wanted in sides:
        for task in tasks:
            values = [100 * cell["last"] for cell in select(results, task=task, **wanted)]
            if len(values) > 1:
                variance += statistics.variance(values) / len(values) / len(tasks) ** 2
    return float(variance**0.5)

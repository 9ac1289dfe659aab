"""Tables of the accuracy grid: scores, what is kept of dense - floor, goals beside what was reached."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

TASKS, LEAD = ("qnli", "mnli", "mrpc"), ("qnli", "mnli")
TRAINED, LAST = ("qnli", "sst2"), "sst2"  # tasks of the cells that the trainer itself ran, and the one of them alone
DEFAULT = "default"
KIN = ("default", "recipe", "fisher")  # what blocks chosen by Fisher information have in common
RECIPE, CONTROL, SLOWER, SHAPE = "recipe", "agp+kd", "agp+kd, half the learning rate", (8, 1)
FASTER = "recipe, 8e-4"  # among the trainer's cells, whose rate is 4e-4
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
        tasks: the columns.
        first: heading of the labels.
    """
    lines = [f"| {first} | {' | '.join(task.upper() for task in tasks)} | kept, mean |"]
    lines.append(f"|---|{'--:|' * len(tasks)}--:|")
    made = []
    for label, wanted in rows:
        columns = [select(results, task=task, **wanted) for task in tasks]
        if any(columns):
            kept = mean_share(results, tasks, **wanted)
            texts = [score_of(cells, results) if cells else "" for cells in columns]
            made.append((kept, f"| {label} | {' | '.join(texts)} | {'' if kept is None else f'{kept:.0%}'} |"))
    lines += [text for _, text in made]
    dense = [f"{100 * dense_score(task, results):.1f}" for task in tasks]
    floors = [f"{100 * results['floors'][task]['accuracy']:.1f}" for task in tasks]
    return "\n".join([*lines, f"| *dense* | {' | '.join(dense)} | 100% |", f"| *floor* | {' | '.join(floors)} | 0% |"])


def methods_table(results: Results, tasks: Sequence[str] = LEAD, sparsity: float = 0.9) -> str:
    """Compare all methods at one sparsity in the default blocks, best first; those last that miss a task."""
    methods = list(dict.fromkeys(c["method"] for c in select(results, block=SHAPE, sparsity=sparsity)))
    chosen = {m: {"method": m, "block": SHAPE, "sparsity": sparsity} for m in methods}

    def rank(method: str) -> tuple[bool, float]:
        known = [kept for task in tasks if (kept := mean_share(results, [task], **chosen[method])) is not None]
        return len(known) < len(tasks), -mean(known) if known else 0.0

    rows = [(method, chosen[method]) for method in sorted(methods, key=rank)]
    return compare(results, rows, tasks, f"method, {sparsity:.0%}, 8 x 1")


def sparsity_table(results: Results, tasks: Sequence[str] = TASKS, methods: Sequence[str] = (RECIPE, CONTROL)) -> str:
    """Compare the recipe with the control over sparsities, on all tasks."""
    rows = [
        (f"{method}, {sparsity:.0%}", {"method": method, "block": SHAPE, "sparsity": sparsity})
        for sparsity in (0.5, 0.8, 0.9, 0.95) for method in methods
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
        groups = [[c for c in select(results, task=task) if c["method"] == "dense"]]
        methods = dict.fromkeys(c["method"] for c in select(results, task=task, block=SHAPE, sparsity=sparsity))
        groups += [select(results, task=task, method=m, block=SHAPE, sparsity=sparsity) for m in methods]
        for cells in sorted(groups, key=lambda cells: -mean(c["last"] for c in cells)):
            columns = [spread_of(cells, key) for key in ("train_last", "last", "gap", "best")]
            loss = mean(c["dev_loss"] for c in cells)
            lines.append(f"| {task} | {cells[0]['method']} | {' | '.join(columns)} | {loss:.3f} | {len(cells)} |")
    return "\n".join(lines)


def goals_table(results: Results, trained: Results) -> str:
    """Set every goal beside what was reached.

    Args:
        results: the grid of stacks: QNLI, MNLI, MRPC.
        trained: the cells of the trainer itself: SST-2, and what the grid lacks.
    """
    at = {s: {"method": RECIPE, "block": SHAPE, "sparsity": s} for s in (0.5, 0.8, 0.9)}
    lines = ["| goal | reached | met |", "|---|---|---|"]

    def add(goal: str, text: str, met: bool | None) -> None:
        lines.append(f"| {goal} | {text} | {'not run' if met is None else 'yes' if met else 'no'} |")

    def over_all(of_task: Callable[[Results, str], float | None]) -> tuple[str, float] | None:
        found = {task: of_task(results, task) for task in TASKS} | {LAST: of_task(trained, LAST)}
        known = {task: value for task, value in found.items() if value is not None}
        return (f"mean of {', '.join(task.upper() for task in known)}", mean(known.values())) if known else None

    lost = over_all(lambda source, task: points(source, [task], at[0.5], {"method": "dense"}))
    add("50 %: within 0.5 point of dense", f"{lost[1]:+.1f} points, {lost[0]}" if lost else "",
        lost[1] >= -0.5 if lost else None)  # fmt: skip
    for sparsity, goal in ((0.8, 0.95), (0.9, 0.85)):
        kept = over_all(lambda source, task, of=at[sparsity]: mean_share(source, [task], **of))  # type: ignore[misc]
        text = f"{kept[1]:.0%}, {kept[0]}" if kept else ""
        add(f"{sparsity:.0%}, 8 x 1: at least {goal:.0%} of dense - floor", text, kept[1] >= goal if kept else None)
    for sparsity in (0.8, 0.9):
        narrow, single = ({"method": RECIPE, "block": block, "sparsity": sparsity} for block in ((4, 1), (1, 1)))
        known = [task for task in TRAINED if points(trained, [task], narrow, single) is not None]
        apart = points(trained, known, narrow, single) if known else None
        text = "" if apart is None else f"{apart:+.1f} points, {', '.join(task.upper() for task in known)}"
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
        text = f"{ahead:+.1f} points, {', '.join(task.upper() for task in over)}" if ahead is not None else ""
        text += f"; standard error over seeds {spread:.1f}" if spread else "; one seed" if text else ""
        add(f"90 %: {method} at least 1 point above AGP + KD ({note})", text,
            None if ahead is None else ahead >= 1.0 and ahead > 2 * spread)  # fmt: skip
    for source, ours, task, where in (
        (results, RECIPE, "qnli", "the grid"), *((trained, DEFAULT, task, "the trainer") for task in TRAINED),
    ):  # fmt: skip
        if (found := against(source, task, {**at[0.9], "method": ours}, kin=False)) is not None:
            add(f"90 %: {ours} above every other method ({task.upper()}, {where})", found[0], found[1] > 0)
    for task in TRAINED:
        if (found := against(trained, task, {**at[0.9], "method": DEFAULT}, kin=True)) is not None:
            rivalry = f"90 %: no variant of the default ahead of it by two standard errors ({task.upper()})"
            add(rivalry, found[0], found[1] >= -2 * found[2])
    return "\n".join(lines)


def against(results: Results, task: str, ours: Mapping[str, Any], kin: bool) -> tuple[str, float, float] | None:
    """Set a method beside the best of its rivals: of its variants (`kin`), or of all other methods.

    Returns:
        (text, points that ours is ahead, standard error of these over seeds); None without rivals.
    """
    names = dict.fromkeys(
        c["method"] for c in select(results, block=ours["block"], sparsity=ours["sparsity"], task=task)
    )
    ahead: dict[str, float] = {}
    for name in names:
        apart = points(results, [task], ours, {**ours, "method": name})
        if apart is not None and name != ours["method"] and name.startswith(KIN) == kin:
            ahead[name] = apart
    if not ahead:
        return None
    best = min(ahead, key=lambda name: ahead[name])
    error = seed_spread(results, [task], [ours, {**ours, "method": best}])
    text = f"{ahead[best]:+.1f} points against the best of {len(ahead)}, {best}"
    return f"{text}; {f'standard error over seeds {error:.1f}' if error else 'one seed'}", ahead[best], error


def energy_table(results: Results) -> str:
    """Lay out how much of the dense outputs survives each kind of importance, by kind of linear."""
    lines = ["| linear | task | rms of its input features | magnitude | activation |", "|---|---|--:|--:|--:|"]
    for task, kinds in results["energy"].items():
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

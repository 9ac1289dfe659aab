"""What training logged, as facts of a card: the curves of its pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MAX_ROWS = 200

_SHARES = ("sparsity", "graft_prob")
# What an evaluation tells of itself and not of the model.
_SPEED_SUFFIXES = ("_runtime", "_per_second", "_preparation_time")

Curve = list[tuple[float, float]]


def history_facts(log_history: Iterable[Mapping[str, Any]], max_rows: int = MAX_ROWS) -> tuple[dict[str, float], ...]:
    """Take the curves out of what a `Trainer` logged: sparsity, graft_prob, penalty, losses and evaluations.

    Args:
        log_history: `trainer.state.log_history`. What was logged at one step becomes one row; numbers that are not
            finite are left out, which a curve shows as a gap.
        max_rows: rows to keep; of longer runs every n-th, the first, the last, and all evaluations that fit.

    Returns:
        One {"step": step, name: number} per row, in the order of the steps.

    Example:
        >>> history_facts([{"step": 5, "loss": 0.5, "epoch": 1.0}, {"step": 5, "eval_accuracy": 0.9}])
        ({'step': 5, 'loss': 0.5, 'eval_accuracy': 0.9},)
    """
    rows: dict[int, dict[str, float]] = {}
    for logs in log_history:
        numbers = {name: value for name, value in logs.items() if _is_curve(name) and _is_number(value)}
        if numbers and isinstance(logs.get("step"), int):
            rows.setdefault(logs["step"], {"step": logs["step"]}).update(numbers)
    ordered = [rows[step] for step in sorted(rows)]
    return tuple(_thinned(ordered, max_rows))


def curves(history: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Curve]]:
    """Sort recorded rows into charts.

    Returns:
        {title of a chart: {name of a curve: [(step, value)]}}; curves of fewer than two points or that are zero all
        the time, and charts without a curve, are left out.

    Example:
        >>> rows = [{"step": 1, "loss": 2.0, "penalty": 0.0}, {"step": 2, "loss": 1.0, "penalty": 0.0}]
        >>> curves(rows)
        {'losses': {'loss': [(1, 2.0), (2, 1.0)]}}
    """
    charts: dict[str, dict[str, Curve]] = {}
    names = list(dict.fromkeys(name for row in history for name in row if name != "step"))
    for name in sorted(names, key=lambda name: (name not in _SHARES, name)):
        curve = [(row["step"], row[name]) for row in history if name in row]
        if len(curve) > 1 and any(value for _, value in curve):
            title = _chart_of(name)
            # A chart of its own says of what kind its curves are; among the losses the name has to.
            charts.setdefault(title, {})[name.removeprefix("eval_") if title == "evaluation" else name] = curve
    order = ("sparsity and grafting", "losses", "penalty", "evaluation")
    return {title: charts[title] for title in order if title in charts}


def _chart_of(name: str) -> str:
    if name in _SHARES:
        return "sparsity and grafting"
    if name.startswith("eval_") and name != "eval_loss":
        return "evaluation"
    return "penalty" if name.startswith("penalty") else "losses"


def _is_curve(name: str) -> bool:
    own = name in (*_SHARES, "penalty", "loss") or name.startswith("loss_")
    return own or (name.startswith("eval_") and not name.endswith(_SPEED_SUFFIXES))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _thinned(rows: list[dict[str, float]], max_rows: int) -> list[dict[str, float]]:
    if len(rows) <= max_rows:
        return rows
    last = len(rows) - 1
    kept = {round(i * last / (max_rows - 1)) for i in range(max_rows)}
    evaluated = [i for i, row in enumerate(rows) if any(name.startswith("eval_") for name in row)]
    if len(evaluated) <= max_rows // 2:
        # Every second of the others makes room for them.
        spread = max_rows - len(evaluated)
        kept = {round(i * last / (spread - 1)) for i in range(spread)} | set(evaluated)
    return [rows[i] for i in sorted(kept)]

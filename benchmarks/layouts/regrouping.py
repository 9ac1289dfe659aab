"""Table of what blocks keep of the score with rows as they lie and regrouped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SHAPES = [(1, False), (8, False), (8, True), (32, False), (32, True)]


def regrouping_table(results: Mapping[str, Any], detailed: float = 0.9) -> str:
    """Lay out the share of the score kept: all linears at every sparsity, and at one of them each kind.

    Args:
        results: as regrouping.py writes them.
        detailed: the sparsity at which kinds have rows of their own.
    """
    kept: dict[tuple[str, float], dict[tuple[int, bool], dict[str, float]]] = {}
    for row in results["rows"]:
        kept.setdefault((row["task"], row["sparsity"]), {})[row["height"], row["regrouped"]] = row["kept"]
    heads = [f"{height} x 1{', regrouped' if regrouped else ''}" for height, regrouped in _SHAPES]
    lines = [f"| task, sparsity | linears | {' | '.join(heads)} |", f"|---|---|{'--:|' * len(heads)}"]
    for (task, sparsity), found in kept.items():
        for kind in found[_SHAPES[0]] if sparsity == detailed else ["all"]:
            shares = " | ".join(f"{found[shape][kind]:.1%}" for shape in _SHAPES)
            lines.append(f"| {task.upper()}, {sparsity:.0%} | {kind} | {shares} |")
    return "\n".join(lines)

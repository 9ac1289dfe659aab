"""Lay out what training.py measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def training_table(result: Mapping[str, Any]) -> str:
    """Lay out step times beside their baselines, and what is held in memory.

    Args:
        result: the file that training.py wrote.

    Returns:
        Markdown; rows above the goal of 1.05 are kept.
    """
    lines = [
        "| trainer | ms per step (quartiles) | beside | ratio | peak memory | masks | coefficients |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        low, high = row["spread"]
        ratio = f"{row['ratio']:.3f}" if "ratio" in row else ""
        held = [f"{row[key] / 1e6:.1f} MB" if row.get(key) else "" for key in ("mask_bytes", "coef_bytes")]
        peak = f"{row['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in row else ""
        lines.append(
            f"| {row['name']} | {row['ms']:.1f} ({low:.1f} to {high:.1f}) | {row.get('baseline', '')} | {ratio} | "
            f"{peak} | {held[0]} | {held[1]} |"
        )
    asked, found = result["settings"], result["hardware"]
    machine = f"{len(found['gpus'])} x {found['gpus'][0]}" if found["gpus"] else found["cpu"]
    source = (
        f"{asked['model']}, batches of {asked['batch']} x {asked['length']} tokens, {asked['precision']}, blocks of "
        f"{asked['block_shape'][0]} x {asked['block_shape'][1]}, {asked['steps']} steps of each, in turns; {machine}; "
        f"torch {result['versions']['torch']}, transformers {result['versions']['transformers']}; "
        f"`{result['command']}`. The ratio is the median over steps, each beside its neighbour; load of the machine "
        f"{result['load']:.1f}."
    )
    return "\n".join([*lines, "", source])

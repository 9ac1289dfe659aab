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
        "| trainer | ms per step | beside | ratio (quartiles) | adds | peak memory | masks | coefficients |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        beside = ["", "", ""]
        if "ratio" in row:
            low, high = row["ratio_spread"]
            beside = [row["baseline"], f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})", f"{row['adds_ms']:+.0f} ms"]
        held = [f"{row[key] / 1e6:.1f} MB" if row.get(key) else "" for key in ("mask_bytes", "coef_bytes")]
        peak = f"{row['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in row else ""
        lines.append("| " + " | ".join([row["name"], f"{row['ms']:.0f}", *beside, peak, *held]) + " |")
    asked, found = result["settings"], result["hardware"]
    machine = f"{len(found['gpus'])} x {found['gpus'][0]}" if found["gpus"] else found["cpu"]
    source = (
        f"{asked['model']}, batches of {asked['batch']} x {asked['length']} tokens, {asked['precision']}, blocks of "
        f"{asked['block_shape'][0]} x {asked['block_shape'][1]}, {asked['steps']} steps of each, in turns; {machine}; "
        f"torch {result['versions']['torch']}, transformers {result['versions']['transformers']}; "
        f"`{result['command']}`. Ratio and addition are medians over steps, each beside its neighbour in time; a "
        f"baseline that stands twice was timed with each group of trainers."
    )
    return "\n".join([*lines, "", source])


def passes_table(result: Mapping[str, Any]) -> str:
    """Lay out what masks and the group lasso cost in a step, natively and in plain torch.

    Args:
        result: the file that passes.py wrote.

    Returns:
        Markdown; rows in which the native pass loses are kept.
    """
    times = {(row["task"], tuple(row["block_shape"]), row["threads"], row["engine"]): row for row in result["rows"]}
    threads = sorted({row["threads"] for row in result["rows"]})
    head = [f"{kind}, {n} thread{'s' * (n > 1)}" for n in threads for kind in ("native", "torch", "ratio")]
    lines = ["| pass | blocks | " + " | ".join(head) + " |", "|---|---" + "|--:" * len(head) + "|"]
    for task, (height, width) in dict.fromkeys((task, shape) for task, shape, _, _ in times):
        cells = []
        for n in threads:
            native, plain = (times[task, (height, width), n, engine] for engine in ("native", "torch"))
            cells += [f"{native['ms']:.0f} ms", f"{plain['ms']:.0f} ms", f"{native['ratio']:.1f}"]
        lines.append(f"| {task} | {height} x {width} | " + " | ".join(cells) + " |")
    source = (
        f"All {result['settings']['layers']} pruned linears of BERT-base, {result['settings']['weights'] / 1e6:.0f} "
        f"million float32 weights, 20 % of blocks kept; medians, in turns; {result['hardware']['cpu']}, "
        f"{result['kernels']}; torch {result['versions']['torch']}; `{result['command']}`."
    )
    return "\n".join([*lines, "", source])

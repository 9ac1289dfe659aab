"""How the results of cropping, int8 values and the task runs are laid out in docs/."""

from __future__ import annotations

from typing import Any


def cropping_table(results: dict[str, Any]) -> str:
    """Lay out benchmarks/results/cropping.json: zeros beside cropped, engine by engine.

    Args:
        results: the file that benchmarks/cropping.py wrote.

    Returns:
        Markdown.
    """
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in results["rows"]:
        key = (row["model"], row["units_kept"], row["heads_kept"], row["engine"])
        times.setdefault(key, {})[row["variant"]] = row["ms"]
    lines = ["| encoder | units left | heads left | engine | zeros | cropped | |", "|---|--:|--:|---|--:|--:|--:|"]
    for (model, units, heads, engine), ms in times.items():
        cells = [model, f"{units:.0%}", f"{heads:.0%}", engine, f"{ms['zeros']:.3g} ms", f"{ms['cropped']:.3g} ms"]
        lines.append(f"| {' | '.join(cells)} | {ms['zeros'] / ms['cropped']:.2f}x |")
    row = results["rows"][0]
    versions = ", ".join(f"{name} {results['versions'][name]}" for name in ("torch", "transformers"))
    note = (
        f"- {row['batch']} x {row['length']} tokens, {row['dtype']}, {row['threads']} thread; medians of the "
        f"process's own time; {results['hardware']['cpu']}; {versions}."
    )
    return "\n".join([*lines, "", note, f"- `{results['command']}`."])


def int8_table(results: dict[str, Any]) -> str:
    """Lay out benchmarks/results/int8_values.json: bytes and perplexity of each way to store kept values.

    Args:
        results: the file that benchmarks/int8_values.py wrote.

    Returns:
        Markdown.
    """
    rows = results["rows"]
    lines = ["| kept values | pruned layers | whole model | perplexity |", "|---|--:|--:|--:|"]
    for row in rows:
        sizes = [f"{row[key] / 1e6:.3f} MB" for key in ("layer_bytes", "model_bytes")]
        lines.append(f"| {row['storage']} | {' | '.join(sizes)} | {row['perplexity']:.3f} |")
    note = f"- {rows[0]['sparsity']:.0%} of the blocks pruned; {rows[0]['tokens']:,} tokens; `{results['command']}`."
    return "\n".join([*lines, "", note])


def tasks_table(results: dict[str, Any]) -> str:
    """Lay out benchmarks/results/tasks.json: dense beside pruned, run by run.

    Args:
        results: the file that benchmarks/tasks.py wrote.

    Returns:
        Markdown.
    """
    names = {"qa": "question answering, F1", "clm": "language model, perplexity"}
    lines = ["| run | sparsity | method | floor | dense | pruned | dev loss, dense | dev loss, pruned | weights |"]
    lines.append("|---|--:|---|--:|--:|--:|--:|--:|--:|")
    for row in results["rows"]:
        digits = 1
        cells = [names[row["task"]], f"{row['sparsity']:.0%}", row["method"]]
        cells += [f"{row[key]:.{digits}f}" for key in ("floor_score", "dense_score", "score")]
        cells += [f"{row['dense_dev_loss']:.3f}", f"{row['dev_loss']:.3f}"]
        cells.append(f"{row['dense_bytes'] / 1e6:.2f} -> {row['bytes'] / 1e6:.2f} MB")
        lines.append(f"| {' | '.join(cells)} |")
    notes = [
        f"- {names[row['task']]}, {row['sparsity']:.0%}: {row['note']}" for row in results["rows"] if "note" in row
    ]
    return "\n".join([*lines, "", *notes, f"- `{results['command']}`; every command is in its JSON."])

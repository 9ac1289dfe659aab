"""Lay out what cpu.py measured: the short table of README.md and the long ones of docs/kernels.md."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.against_deepsparse import ratio
from benchmarks.engines import DENSE

NAMES = {"minilm": "MiniLM-L6", "bert-base": "BERT-base", "tiny": "toy"}
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
CELL = ("model", "scope", "batch", "length", "threads")

Row = Mapping[str, Any]


class Times:
    """The rows of one model on one input.

    Args:
        rows: of every engine, dtype and density.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.key = tuple(rows[0][name] for name in CELL)

    def ms(self, engine: str, dtype: str, density: float = 1.0) -> float | None:
        """Give the time of one engine, None where it was not measured."""
        found = [r["ms"] for r in self.rows if (r["engine"], r["dtype"], r["density"]) == (engine, dtype, density)]
        return found[0] if found else None

    def best(self, dtype: str) -> tuple[float, str]:
        """Give the time and the name of the fastest dense engine of a dtype."""
        return min((r["ms"], r["engine"]) for r in self.rows if r["engine"] in DENSE and r["dtype"] == dtype)

    def gain(self, engine: str, dtype: str, density: float) -> float | None:
        """Say how much faster an engine is than the fastest dense one of its dtype."""
        taken = self.ms(engine, dtype, density)
        return None if taken is None else self.best(dtype)[0] / taken


def cells_of(result: Mapping[str, Any]) -> list[Times]:
    """Gather rows by model, scope, input and threads, in the order of the file."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in result["rows"]:
        groups[tuple(row[name] for name in CELL)].append(row)
    return [Times(rows) for rows in groups.values()]


def short_table(result: Mapping[str, Any]) -> str:
    """Lay out the encoders at 10 % density and 128 tokens on one thread, and what is never slower.

    Raises:
        ValueError: if the file does not hold these cells.
    """
    cells, lines = cells_of(result), []
    for dtype, short in SHORT.items():
        for name in dict.fromkeys(cell.key[0] for cell in cells):
            for batch in (1, 8):
                found = [cell for cell in cells if cell.key == (name, "encoder", batch, 128, 1)]
                mine = found[0].ms("hf_sparse", dtype, 0.1) if found else None
                eager = found[0].ms("eager", "float32") if found else None
                if mine is None or eager is None:
                    raise ValueError(f"no {dtype} times of {name}, batch {batch}, 128 tokens, density 0.1, 1 thread.")
                best, engine = found[0].best(dtype)
                lines.append(
                    f"| {NAMES[name]}, {short} | {batch} | {_ms(eager)} | {_ms(best)} ({engine}) | {_ms(mine)} | "
                    f"{_x(eager / mine)} | {_x(best / mine)} |"
                )
    head = ["| encoder | batch | torch eager, fp32 | best dense engine | hf_sparse | over eager | over best |"]
    head += ["|---|--:|--:|--:|--:|--:|--:|"]
    return "\n".join([*head, *lines, "", *_notes(result, cells)])


def _notes(result: Mapping[str, Any], cells: Sequence[Times]) -> list[str]:
    height = {dtype: "x".join(map(str, block)) for dtype, block in result["settings"]["blocks"].items()}
    engines = [name for name in DENSE if any(row["engine"] == name for row in result["rows"])]
    notes = [
        f"- One sequence is 128 tokens; 10% of the encoder's blocks are kept ({height['float32']} in fp32, "
        f"{height['bfloat16']} in bf16, at random); one thread. The best dense engine is the fastest of "
        f"{', '.join(engines)} in the same dtype."
    ]
    for dtype, short in SHORT.items():
        gains = [gain for cell in cells if (gain := cell.gain("hf_sparse", dtype, 0.5)) is not None]
        if gains:
            notes.append(
                f"- With 50% kept, over the best dense {short} engine: {_x(min(gains))} to {_x(max(gains))} in "
                f"{len(gains)} cells of model, batch, length and threads; {_slower(gains)}."
            )
    for dtype, short in SHORT.items():
        scaled = _scaling(cells, dtype)
        if scaled:
            notes.append(f"- Two threads over one, 10% kept, {short}: {_x(min(scaled))} to {_x(max(scaled))}.")
    return [*notes, f"- {source(result)}"]


def _slower(gains: Sequence[float]) -> str:
    losing = sum(gain < 1 for gain in gains)
    return f"{losing or 'none'} of them slower"


def _scaling(cells: Sequence[Times], dtype: str) -> list[float]:
    taken = {cell.key: cell.ms("hf_sparse", dtype, 0.1) for cell in cells}
    pairs = ((ms, taken.get((*key[:-1], 2))) for key, ms in taken.items() if key[-1] == 1)
    return [one / two for one, two in pairs if one and two]


def encoder_table(result: Mapping[str, Any], dtype: str) -> str:
    """Lay out every cell of a dtype: dense engines in ms, hf_sparse in ms and over the best of them."""
    cells = cells_of(result)
    densities = sorted({r["density"] for r in result["rows"] if r["engine"] == "hf_sparse"}, reverse=True)
    engines = [name for name in DENSE if any(r["engine"] == name and r["dtype"] == dtype for r in result["rows"])]
    columns = [*engines, *(f"{density:.0%}" for density in densities), "10%, layers only"]
    lines = [f"| | batch x tokens | threads | {' | '.join(columns)} |", f"|---|--:|--:|{'--:|' * len(columns)}"]
    for cell in cells:
        name, scope, batch, length, threads = cell.key
        dense = [_ms(cell.ms(engine, dtype)) for engine in engines]
        ours = [(cell.ms("hf_sparse", dtype, d), cell.gain("hf_sparse", dtype, d)) for d in densities]
        ours.append((cell.ms("hf_sparse_layers", dtype, 0.1), cell.gain("hf_sparse_layers", dtype, 0.1)))
        words = [f"{_ms(ms)} ({_x(gain)})" if ms is not None and gain is not None else "" for ms, gain in ours]
        lines.append(f"| {NAMES[name]} {scope} | {batch} x {length} | {threads} | {' | '.join([*dense, *words])} |")
    return "\n".join([*lines, "", f"- {source(result)}", *_missing(result, dtype)])


def linear_table(result: Mapping[str, Any]) -> str:
    """Lay out the gain of the cpu backend over the best dense engine, as geometric mean over the shapes of weights.

    The last column is the worst cell of what the automatic choice gives.
    """
    rows = result["rows"]
    best: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row["engine"] in DENSE:
            best[_place(row)] = min(best.get(_place(row), math.inf), row["ms"])
    gains: dict[tuple[Any, ...], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    worst: dict[tuple[Any, ...], float] = {}
    for row in rows:
        kind = (row["threads"], row["dtype"], row["nominal"], "x".join(map(str, row["block_shape"] or [])))
        gain = best[_place(row)] / row["ms"]
        if row["engine"] == "cpu":
            gains[kind][row["tokens"]].append(gain)
        elif row["engine"] == "auto":
            worst[kind] = min(worst.get(kind, math.inf), gain)
    tokens = sorted({row["tokens"] for row in rows})
    titles = " | ".join(f"{count:,}" for count in tokens)
    lines = [
        f"| dtype | kept | block | threads | {titles} | auto, worst |",
        "|---|--:|---|--:|" + "--:|" * (len(tokens) + 1),
    ]
    for kind in gains or worst:
        threads, dtype, density, block = kind
        means = [_x(_mean(gains[kind][count])) if gains[kind][count] else "" for count in tokens]
        least = _x(worst[kind]) if kind in worst else ""
        lines.append(f"| {SHORT[dtype]} | {density:.0%} | {block} | {threads} | {' | '.join(means)} | {least} |")
    return "\n".join([*lines, "", f"- {source(result)}", *_missing(result)])


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("dtype", "out_features", "in_features", "tokens", "threads"))


def deepsparse_table(result: Mapping[str, Any]) -> str:
    """Lay out both packages on the same weights; the ratio is of times over the onnxruntime beside each."""
    lines = ["| | block | kept | batch x tokens | threads | DeepSparse | hf_sparse | ratio |"]
    lines += ["|---|---|--:|--:|--:|--:|--:|--:|"]
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in result["rows"]:
        groups[(*(row[name] for name in CELL), *row["block_shape"], row["density"])].append(row)
    for (name, _, batch, length, threads, height, width, density), rows in groups.items():
        ms = {row["engine"]: row["ms"] for row in rows}
        lines.append(
            f"| {NAMES[name]} | {height}x{width} | {density:.0%} | {batch} x {length} | {threads} | "
            f"{_ms(ms['deepsparse'])} | {_ms(ms['hf_sparse'])} | {_x(ratio(rows))} |"
        )
    versions = next(row["versions"] for row in result["rows"] if row["engine"] == "deepsparse")
    theirs = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "\n".join([*lines, "", f"- {source(result)} DeepSparse's environment: {theirs}."])


def source(result: Mapping[str, Any]) -> str:
    """Say what the numbers are and where they come from."""
    names = ("torch", "transformers", "onnxruntime", "openvino")
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in names if result["versions"].get(name))
    cpu = f"{result['hardware']['cpu']} ({result['kernels'] or 'no native kernels'})"
    return f"Medians, all engines in turn in one process, {cpu}; {versions}; `{result['command']}`."


def _missing(result: Mapping[str, Any], dtype: str = "") -> Iterable[str]:
    found: dict[tuple[str, str], int] = defaultdict(int)
    # A number that differs from cell to cell does not make another reason.
    for cell in result["cells"].values():
        for engine, reason in cell["skipped"].items():
            found[engine, reason.partition(":")[0]] += 1
    total = len(result["cells"])
    return [
        f"- Not here: {engine}{'' if count == total else f' in {count} of {total} cells'}: {reason}."
        for (engine, reason), count in found.items()
        if dtype in engine
    ]


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def _x(value: float) -> str:
    return f"{value:.2f}x" if value < 9.95 else f"{value:.1f}x"

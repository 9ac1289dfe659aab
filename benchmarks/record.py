"""A file of results that grows cell by cell, and is gone on with where it was left."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_sparse.inference.kernels.cpu import status
from hf_sparse.inference.measuring.environment import environment

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
ENGINE_PACKAGES = ("onnx", "onnxruntime", "openvino")
# What a time depends on: the code that is timed and the code that times it.
SOURCES = (
    "hf_sparse/core",
    "hf_sparse/inference",
    *(
        f"benchmarks/{name}.py"
        for name in ("timing", "engines", "linears", "models", "encoders", "against_deepsparse", "deepsparse_child")
    ),
)
SAME = ("sources", "settings", "hardware", "versions")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of engines in turn.

    Attributes:
        name: of the cell, unique in its file.
        weight: how long it will take, in any unit; for the estimate of the time that is left.
        measure: gives its rows, and {engine: why it has none}.
    """

    name: str
    weight: float
    measure: Callable[[], tuple[list[dict[str, Any]], dict[str, str]]]


class Record:
    """The results of one benchmark.

    Args:
        path: of the JSON file. One that is there is gone on with.
        command: that makes it.
        settings: what all its rows have in common.

    Raises:
        ValueError: if the file there comes from other sources, settings, versions or another machine.
    """

    def __init__(self, path: Path, command: str, settings: dict[str, Any]) -> None:
        self.path = path
        facts = environment(REPOSITORY)
        # Every row has its own number of threads.
        facts["hardware"].pop("threads")
        facts["versions"] |= {name: _version(name) for name in ENGINE_PACKAGES}
        head = {"command": command, **facts, "kernels": status()[2], "sources": digest(), "settings": settings}
        self.content: dict[str, Any] = {**head, "cells": {}, "rows": []}
        if path.is_file():
            old = json.loads(path.read_text(encoding="utf-8"))
            if changed := [name for name in SAME if old.get(name) != head[name]]:
                raise ValueError(
                    f"{path} was measured with other {', '.join(changed)}: --fresh begins anew, --out names another "
                    f"file."
                )
            self.content = {**old, "command": command}

    def has(self, name: str) -> bool:
        """Tell whether a cell has been measured."""
        return name in self.content["cells"]

    def add(self, name: str, rows: Sequence[dict[str, Any]], skipped: dict[str, str], seconds: float) -> None:
        """Add a cell and write the file, whole or not at all."""
        # Times of a machine that is busy with something else, above the threads of the cell itself, are to be doubted.
        load = round(os.getloadavg()[0], 1)
        self.content["cells"][name] = {"seconds": round(seconds, 1), "load": load, "skipped": skipped}
        self.content["rows"] += rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        half = self.path.with_suffix(".part")
        half.write_text(dumps(self.content), encoding="utf-8")
        os.replace(half, self.path)

    def run(self, cells: Sequence[Cell], headline: Callable[[list[dict[str, Any]]], str]) -> None:
        """Measure the cells that are missing, with a line for each.

        Args:
            cells: what the file is to hold.
            headline: puts the rows of a cell in a few words.
        """
        todo = [cell for cell in cells if not self.has(cell.name)]
        if len(todo) < len(cells):
            print(f"{len(cells) - len(todo)} of {len(cells)} cells are in {self.path}", flush=True)
        begin, ahead, behind = time.monotonic(), sum(cell.weight for cell in todo), 0.0
        for number, cell in enumerate(todo, 1):
            start = time.monotonic()
            rows, skipped = cell.measure()
            self.add(cell.name, rows, skipped, time.monotonic() - start)
            behind += cell.weight
            left = (time.monotonic() - begin) * (ahead - behind) / behind
            print(f"[{number}/{len(todo)}, {_minutes(left)} left] {cell.name}: {headline(rows)}", flush=True)
            if number == 1:
                for engine, reason in skipped.items():
                    print(f"  without {engine}: {reason}", flush=True)


def dumps(content: dict[str, Any]) -> str:
    """Lay a file of results out: a line for every row and cell, so that changes can be read."""
    lists = {
        "cells": [f"{json.dumps(name)}: {json.dumps(cell)}" for name, cell in content["cells"].items()],
        "rows": [json.dumps(row) for row in content["rows"]],
    }
    head = json.dumps({name: value for name, value in content.items() if name not in lists}, indent=1)
    cells, rows = (",\n  ".join(lines) for lines in lists.values())
    return f'{head[:-2]},\n "cells": {{\n  {cells}\n }},\n "rows": [\n  {rows}\n ]\n}}\n'


def digest() -> str:
    """Sum up the sources that a time depends on, committed or not."""
    found = hashlib.sha256()
    for name in SOURCES:
        place = REPOSITORY / name
        files = [place] if place.is_file() else sorted(place.rglob("*"))
        for file in (file for file in files if file.suffix in (".py", ".cpp", ".h")):
            found.update(file.relative_to(REPOSITORY).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"

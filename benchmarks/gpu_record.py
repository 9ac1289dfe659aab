"""The files that gpu.py writes: command, commit, hardware, versions, and a row per engine and cell."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import dumps
from hf_sparse.inference.measuring.environment import environment

REPOSITORY = Path(__file__).resolve().parents[1]


class Record:
    """The results of one part.

    Args:
        path: of the JSON file, begun anew.
        part: its name on the command line.
        ceilings: of the chip, measured in the same process.
    """

    def __init__(self, path: Path, part: str, ceilings: dict[str, float]) -> None:
        self.path = path
        facts = environment(REPOSITORY)
        facts["hardware"]["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        facts["versions"] |= {"triton": _version("triton"), "cuda": torch.version.cuda, "torchao": _version("torchao")}
        facts["commit"] = os.environ.get("HF_SPARSE_COMMIT") or facts["commit"]
        self.content: dict[str, Any] = {
            "command": f"python benchmarks/gpu.py {part}", **facts, "ceilings": ceilings, "not_run": {}, "cells": {},
            "rows": [],
        }  # fmt: skip
        if importlib.util.find_spec("torchao") is None:
            self.content["not_run"]["torchao"] = "torchao is not installed"

    def add(self, name: str, rows: Sequence[dict[str, Any]], skipped: dict[str, str], seconds: float) -> None:
        """Add a cell and write the file, whole or not at all."""
        self.content["cells"][name] = {"seconds": round(seconds, 1), "skipped": skipped}
        self.content["rows"] += rows
        self._write()

    def skip(self, name: str, reason: str) -> None:
        """Note a cell that was not measured."""
        self.content["not_run"][name] = reason

    def finish(self) -> None:
        """Write what is left."""
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        half = self.path.with_suffix(".part")
        half.write_text(dumps(self.content), encoding="utf-8")
        os.replace(half, self.path)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

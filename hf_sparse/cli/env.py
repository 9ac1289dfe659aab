"""`hf-sparse env`: what a bug report needs."""

from __future__ import annotations

import os
from typing import Any

import typer

from hf_sparse.cli.support import Debug, Json, guarded, print_json

# Those of docs/environment.md that change what runs. Tokens are not among them.
VARIABLES = (
    "HF_SPARSE_BACKEND",
    "HF_SPARSE_ISA",
    "OMP_NUM_THREADS",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "CXX",
)


@guarded
def env(as_json: Json = False, debug: Debug = False) -> None:
    """Tell versions, machine, and which kernels are live and why."""
    found = _collect()
    if as_json:
        print_json(found)
        return
    for title, lines in (
        ("versions", {name: version or "not installed" for name, version in found["versions"].items()}),
        ("hardware", found["hardware"]),
        ("kernels", {name: _status(**kernel) for name, kernel in found["kernels"].items()}),
        ("variables", {name: "not set" if value is None else value for name, value in found["variables"].items()}),
    ):
        typer.echo(title)
        for name, value in lines.items():
            typer.echo(f"  {name:<18} {', '.join(value) or 'none' if isinstance(value, list) else value}")


def _collect() -> dict[str, Any]:
    from hf_sparse.inference.environment import environment
    from hf_sparse.inference.kernels import backend_status

    found = environment()
    return {
        "versions": found["versions"],
        "hardware": found["hardware"],
        "kernels": {name: {"available": able, "reason": why} for name, (able, why) in backend_status().items()},
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }


def _status(available: bool, reason: str) -> str:
    return f"{'live' if available else 'not live'}: {reason}"

"""`hf-sparse env`: what a bug report needs."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from typing import Any

import typer

from hf_sparse.cli.support import Debug, Json, guarded, print_json

# Those of docs/environment.md. The token is not among them: what is printed goes into bug reports.
VARIABLES = (
    "HF_SPARSE_BACKEND",
    "HF_SPARSE_ENCODER",
    "HF_SPARSE_ISA",
    "HF_SPARSE_TUNE",
    "TRITON_INTERPRET",
    "CXX",
    "OMP_NUM_THREADS",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "XDG_CACHE_HOME",
    "FSDP_VERSION",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)
# One for each way to share out the work; accelerate knows which.
SIZES = "PARALLELISM_CONFIG_*_SIZE"


@guarded
def env(as_json: Json = False, debug: Debug = False) -> None:
    """Tell versions, machine, and which kernels are live and why."""
    found = _collect()
    if as_json:
        print_json(found)
        return
    native = found["native"]
    sections: dict[str, dict[str, Any]] = {
        "versions": {name: version or "not installed" for name, version in found["versions"].items()},
        "hardware": found["hardware"],
        "kernels": {name: _status(kernel["available"], kernel["reason"]) for name, kernel in found["kernels"].items()},
        "native CPU kernels": {
            "library": native["library"],
            "used": native["used"],
            "threads": native["threads"],
            "compiler": native["compiler"] or "none of $CXX, g++, clang++, c++ was found",
            **{name: _status(isa["live"], isa["reason"]) for name, isa in native["instruction_sets"].items()},
        },
        "variables": {name: value for name, value in found["variables"].items() if value is not None},
    }
    for title, lines in sections.items():
        typer.echo(title if lines else f"{title}\n  none of {', '.join(VARIABLES)} is set")
        for name, value in lines.items():
            typer.echo(f"  {name:<18} {', '.join(value) or 'none' if isinstance(value, list) else value}")


def _collect() -> dict[str, Any]:
    from hf_sparse.inference.kernels import backend_status
    from hf_sparse.inference.measuring.environment import ENGINE_PACKAGES, environment, native_kernels, package_version

    found = environment()
    sizes = {name: value for name, value in sorted(os.environ.items()) if fnmatchcase(name, SIZES)}
    return {
        "versions": {**found["versions"], **{name: package_version(name) for name in ENGINE_PACKAGES}},
        "hardware": found["hardware"],
        "kernels": {name: {"available": able, "reason": why} for name, (able, why) in backend_status().items()},
        "native": native_kernels(),
        "variables": {**{name: os.environ.get(name) for name in VARIABLES}, **sizes},
    }


def _status(live: bool, reason: str) -> str:
    return f"{'live' if live else 'not live'}: {reason}"

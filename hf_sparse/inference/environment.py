"""What a measured number depends on and its reader cannot see: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("hf-sparse", "torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers", "numpy")


def environment(root: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Collect what a measured number depends on and a reader cannot see.

    Args:
        root: a folder of the repository that did the measuring; None for an installed package, which has no commit.

    Returns:
        {"commit": hash, with "-dirty" where files differ from it, or None; "hardware": {"cpu", "cores", "threads",
        "memory_gib", "gpus", "system"}; "versions": {"python" and package: version, None where not installed}}.
    """
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpus": names,
        "system": f"{platform.system()} {platform.machine()}",
    }
    versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    return {"commit": _commit(Path(root)) if root is not None else None, "hardware": hardware, "versions": versions}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> str | None:
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("-dirty" if _git(root, "status", "--porcelain") else "")
    # No git on this machine, no repository here, or one without a commit: there is no commit to tell.
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

"""What a measured number depends on and its reader cannot see: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hf_sparse.inference.kernels.build import find_compiler
from hf_sparse.inference.kernels.library import ISAS, choose_isa, load_library

# Engines that `hf-sparse bench` compares with, where they are installed.
ENGINE_PACKAGES = ("onnx", "onnxruntime", "openvino")
PACKAGES = ("hf-sparse", "torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers", "numpy")

# What Linux calls the features that each instruction set of the native kernels needs.
_AVX512 = frozenset({"avx512f", "avx512vl", "avx512bw", "avx512dq", "fma"})
_CPU_FLAGS = {
    "avx2": frozenset({"avx2", "fma"}),
    "avx512": _AVX512,
    "avx512bf16": _AVX512 | {"avx512_bf16"},
    "amx": _AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"},
}


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
    versions = {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}}
    # Which CUDA it was built for, a wheel's metadata does not always tell.
    versions["torch"] = str(torch.__version__)
    return {"commit": _commit(Path(root)) if root is not None else None, "hardware": hardware, "versions": versions}


def native_kernels() -> dict[str, Any]:
    """Tell which native CPU kernels are live, and why the others are not.

    Returns:
        {"library": one line, "threads": of torch, which the kernels use, "compiler": path or None, "used": the
        instruction set that is taken or why there is none, "instruction_sets": {name: {"live": bool, "reason": one
        line}}}, slowest instruction set first.
    """
    library = load_library()
    flags = set(_cpu_info("flags").split())
    sets = {}
    for name in ISAS:
        missing = sorted(_CPU_FLAGS.get(name, frozenset()) - flags)
        if name in library.isas:
            reason = "the library and this CPU have it"
        elif library.handle is None:
            reason = "there is no library"
        elif missing:
            reason = f"this CPU lacks {', '.join(missing)}"
        else:
            reason = "the library was built without it, or the system keeps it from this process"
        sets[name] = {"live": name in library.isas, "reason": reason}
    return {
        "library": library.reason,
        "threads": torch.get_num_threads() if library.threaded else 1,
        "compiler": find_compiler(),
        "used": _used(),
        "instruction_sets": sets,
    }


def _used() -> str:
    try:
        return choose_isa()
    except ValueError as error:
        return str(error)


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(field: str) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def package_version(package: str) -> str | None:
    """Give the version of an installed package, None where it is not installed."""
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

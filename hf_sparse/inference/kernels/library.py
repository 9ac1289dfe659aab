"""The native library: found, loaded with ctypes, and asked what this CPU can run."""

from __future__ import annotations

import ctypes
import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

LIBRARY = Path(__file__).parent / "_native.so"
ENV_ISA = "HF_SPARSE_ISA"

# Mirrors of native/hf_sparse_kernels.h; HFS_ABI changes with it.
ABI = 3
ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")
LANES = {"portable": 4, "avx2": 8, "avx512": 16, "avx512bf16": 16, "amx": 16}
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "relu": 4}
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
KINDS = {"single": 0, "neighbours": 1, "couples": 2, "segments": 3}
FORMS = {"auto": 0, "rows": 1, "lanes": 2}
MODES = {"mask": 0, "gradient": 1, "shrink": 2}
STATUS = {
    1: "an argument is out of range",
    2: "the index points outside the weight",
    3: "the CPU or the library lacks the instruction set",
    4: "there is not enough memory",
}


class Weight(ctypes.Structure):
    """`hfs_weight`: a weight as the kernels see it. Holds addresses only: whoever fills it keeps the tensors alive."""

    _fields_ = [
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("steps", ctypes.c_int64),
        ("band_start", ctypes.c_void_p),
        ("column", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("form", ctypes.c_int32),
        ("chunk_start", ctypes.c_void_p),
        ("chunk_column", ctypes.c_void_p),
        ("chunk_values", ctypes.c_void_p),
    ]


class Prune(ctypes.Structure):
    """`hfs_prune`: one pass over the blocks of a weight in training."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("row_step", ctypes.c_int64),
        ("col_step", ctypes.c_int64),
        ("target", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bits", ctypes.c_void_p),
        ("coef", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("moved", ctypes.c_void_p),
        ("penalty", ctypes.c_void_p),
        ("amount", ctypes.c_float),
        ("mode", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Library:
    """What loading gave.

    Attributes:
        handle: the loaded library, None if there is none.
        isas: the instruction sets that both it and this CPU have, slowest first.
        threaded: whether it shares torch's OpenMP threads; without, every call runs on the calling thread.
        reason: one line for people.
    """

    handle: ctypes.CDLL | None
    isas: tuple[str, ...]
    threaded: bool
    reason: str


@cache
def load_library() -> Library:
    """Load the native library, once. Never raises: what is wrong is in `reason`, and in the log."""
    library = _load(LIBRARY)
    if library.handle is None:
        logger.warning("The native CPU kernels are not used, models run in plain torch: %s", library.reason)
    return library


def choose_isa() -> str:
    """Give the instruction set to use: the best there is, or what `HF_SPARSE_ISA` forces.

    Raises:
        ValueError: if it forces one that this CPU or the library does not have, or no library is live.
    """
    isas = load_library().isas
    if not isas:
        raise ValueError(f"the native CPU kernels are not live: {load_library().reason}")
    name = os.environ.get(ENV_ISA) or isas[-1]
    if name not in isas:
        raise ValueError(f"{ENV_ISA}={name!r} is not one of the instruction sets live here: {', '.join(isas)}.")
    return name


def _load(path: Path) -> Library:
    if not path.exists():
        return Library(
            None, (), False, f"{path.name} was not built; install g++ or clang++ and run pip install again."
        )
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        return Library(None, (), False, f"{path.name} does not load: {error}")
    if handle.hfs_abi() != ABI:
        return Library(
            None,
            (),
            False,
            f"{path.name} is of ABI {handle.hfs_abi()}, not {ABI}; run pip install again to rebuild it.",
        )
    for ask, kind, what in (("hfs_weight_size", Weight, "weights"), ("hfs_prune_size", Prune, "passes")):
        size_of = getattr(handle, ask)
        size_of.restype = ctypes.c_int64
        if size_of() != ctypes.sizeof(kind):
            return Library(
                None,
                (),
                False,
                f"{path.name} has {what} of {size_of()} bytes, not {ctypes.sizeof(kind)}; run pip install again to "
                f"rebuild it.",
            )
    handle.hfs_check.argtypes = handle.hfs_prune_blocks.argtypes = [ctypes.c_void_p]
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    handle.hfs_linear.argtypes = [pointer, pointer, pointer, size, pointer, size, number, number]
    handle.hfs_set_parallel.argtypes = [pointer]
    handle.hfs_set_parallel.restype = None
    gomp_parallel = _gomp_parallel()
    handle.hfs_set_parallel(gomp_parallel)
    isas = tuple(name for code, name in enumerate(ISAS) if handle.hfs_isa_available(code))
    threads = "torch's OpenMP threads" if gomp_parallel else "one thread: torch's OpenMP runtime has no GOMP_parallel"
    return Library(handle, isas, gomp_parallel is not None, f"{isas[-1]} kernels, {threads}")


def _gomp_parallel() -> int | None:
    # A runtime of our own would be a second pool of threads fighting torch's for the cores. Looking the entry point
    # up through torch's extension module finds the one that torch itself is linked to, under whatever file name.
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None

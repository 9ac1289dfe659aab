"""Finding, loading and refusing the native library; one OpenMP runtime in the process."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from hf_sparse.inference.kernels import library


def test_a_missing_library_is_said_once_and_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "_native.so")
    library.load_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            first, second = library.load_library(), library.load_library()
        assert first is second and first.handle is None and not first.isas
        assert "_native.so was not built" in first.reason
        assert [record.message for record in caplog.records] == [
            f"The native CPU kernels are not used, models run in plain torch: {first.reason}"
        ]
        with pytest.raises(ValueError, match="_native.so was not built"):
            library.choose_isa()
    finally:
        library.load_library.cache_clear()


def test_a_damaged_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "_native.so"
    path.write_bytes(b"not a library")
    assert library._load(path).handle is None
    assert "does not load" in library._load(path).reason


@pytest.mark.usefixtures("native_library")
def test_a_library_from_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI", 0)
    loaded = library._load(library.LIBRARY)
    assert loaded.handle is None and "not 0; run pip install again" in loaded.reason


@pytest.mark.usefixtures("native_library")
def test_a_library_with_another_struct_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Longer(library.Weight):
        _fields_ = [("more", ctypes.c_int64)]

    monkeypatch.setattr(library, "Weight", Longer)
    loaded = library._load(library.LIBRARY)
    assert loaded.handle is None
    assert f"has weights of {ctypes.sizeof(Longer) - 8} bytes, not {ctypes.sizeof(Longer)}" in loaded.reason


@pytest.mark.usefixtures("native_library")
def test_the_portable_kernels_are_always_there() -> None:
    assert library.load_library().isas[0] == "portable"


SCRIPT = """
import os, torch
from hf_sparse.inference.kernels.cpu import CpuBackend
from tests.inference.kernels.conftest import random_layer
torch.set_num_threads(1)
values, index = random_layer((512, 512), (8, 1), 0.5, seed=0, dtype=torch.float32)
backend = CpuBackend()
state, x = backend.prepare(values, index), torch.randn(256, 512)
count = lambda: len(os.listdir("/proc/self/task"))
start = count()
backend.run(x, state, None, None)
assert count() == start, "one thread asked for, others started"
torch.set_num_threads(2)
ours = backend.run(x, state, None, None)
assert count() == start + 1, f"{count() - start} threads started, not 1"
torch.mm(torch.randn(512, 512), torch.randn(512, 512))
assert count() == start + 1, "torch started threads of its own: two pools"
names = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
runtimes = [n for n in names if any(part in os.path.basename(n) for part in ("libgomp", "libomp", "libiomp"))]
assert len(runtimes) == 1, runtimes
"""


@pytest.mark.usefixtures("native_library")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_one_openmp_runtime_with_the_threads_that_torch_was_told() -> None:
    assert library.load_library().threaded, library.load_library().reason
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

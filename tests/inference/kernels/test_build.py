"""Building the native library: what happens without a compiler, with an old one, with a broken one."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hf_sparse.inference.kernels import build

# Writes its arguments where -o says; knows no AVX-512-BF16; fails on what the test forbids.
COMPILER = """#!/bin/sh
for word in "$@"; do
  case "$word" in
    -mavx512bf16|{forbidden}) echo "unknown option $word" >&2; exit 1;;
  esac
  [ "$last" = "-o" ] && output="$word"
  last="$word"
done
echo "$@" > "$output"
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cxx"
    path.write_text(COMPILER.format(forbidden="-none"))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(path))
    return path


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert build.find_compiler() is None
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler"):
        build.build(tmp_path / "out.so")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("compiler")
def test_an_instruction_set_that_the_compiler_does_not_know_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sets = {"portable": (4, []), "avx2": (8, ["-mavx2"]), "avx512bf16": (16, ["-mavx512bf16"])}
    monkeypatch.setattr(build, "INSTRUCTION_SETS", sets)
    with caplog.at_level(logging.WARNING):
        assert build.build(tmp_path / "out.so") == ["portable", "avx2"]
    assert "cannot compile the avx512bf16 kernels; they are left out" in caplog.text
    linked = (tmp_path / "out.so").read_text()
    assert "-DHFS_WITH_AVX2" in linked and "BF16" not in linked and "-shared" in linked
    assert "march=native" not in linked and "fast-math" not in linked


def test_a_failed_build_leaves_the_old_library(tmp_path: Path, compiler: Path) -> None:
    output = tmp_path / "out.so"
    output.write_text("old")
    compiler.write_text(COMPILER.format(forbidden="-shared"))
    with pytest.raises(build.BuildError, match="unknown option -shared"):
        build.build(output)
    compiler.write_text(COMPILER.format(forbidden="-DHFS_ISA=portable"))
    with pytest.raises(build.BuildError, match="HFS_ISA=portable"):
        build.build(output)
    assert output.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["cxx", "out.so"]


def test_the_sources_are_where_the_build_looks() -> None:
    assert (build.SOURCES / "kernel.cpp").exists() and (build.SOURCES / "dispatch.cpp").exists()


def build_extension(output: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(output), "--build-temp", str(output)]
    root = Path(build.__file__).parents[3]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=dict(os.environ))


@pytest.mark.usefixtures("compiler")
def test_installing_builds_the_library(tmp_path: Path) -> None:
    done = build_extension(tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "-shared" in (tmp_path / "out/hf_sparse/inference/kernels/_native.so").read_text()


def test_installing_without_a_compiler_only_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    done = build_extension(tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "models will run in plain torch: no C++ compiler" in done.stderr
    assert not list(tmp_path.rglob("*.so"))

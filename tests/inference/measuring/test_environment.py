"""The facts beside a number: machine, versions, commit."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from pathlib import Path

import pytest
import torch

from hf_sparse.inference.kernels.library import Library, load_library
from hf_sparse.inference.measuring.environment import environment, native_kernels


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=folder, check=True)


def test_facts_are_plain_json_and_true() -> None:
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["commit"] is None
    assert facts["versions"]["torch"] == torch.__version__ and facts["versions"]["python"] == platform.python_version()
    assert facts["hardware"]["threads"] == torch.get_num_threads()
    assert facts["hardware"]["cpu"] and facts["hardware"]["cores"] >= 1


def test_a_package_that_is_missing_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sparse.inference.measuring.environment.PACKAGES", ("no-such-package",))
    assert environment()["versions"]["no-such-package"] is None


def test_the_commit_says_whether_files_differ_from_it(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert environment(tmp_path)["commit"] is None
    (tmp_path / "a.txt").write_text("a")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    clean = environment(tmp_path)["commit"]
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "a.txt").write_text("b")
    assert environment(tmp_path)["commit"] == clean + "-dirty"


def test_a_machine_without_git_has_no_commit_to_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(tmp_path)["commit"] is None


def library(handle: object, *isas: str) -> Library:
    return Library(handle, isas, True, "so it is")  # type: ignore[arg-type]


def test_every_instruction_set_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "fpu fma avx2 avx512f avx512vl avx512bw avx512dq"
    monkeypatch.setattr("hf_sparse.inference.measuring.environment._cpu_info", lambda field: flags)
    monkeypatch.setattr(
        "hf_sparse.inference.measuring.environment.load_library", lambda: library(object(), "portable", "avx2")
    )
    sets = native_kernels()["instruction_sets"]
    assert [name for name, isa in sets.items() if isa["live"]] == ["portable", "avx2"]
    assert sets["avx2"]["reason"] == "the library and this CPU have it"
    assert sets["avx512"]["reason"].startswith("the library was built without it")
    assert sets["avx512bf16"]["reason"] == "this CPU lacks avx512_bf16"


def test_without_a_library_nothing_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sparse.inference.measuring.environment.load_library", lambda: library(None))
    monkeypatch.setattr("hf_sparse.inference.kernels.library.load_library", lambda: library(None))
    monkeypatch.setattr("hf_sparse.inference.measuring.environment.find_compiler", lambda: None)
    found = native_kernels()
    assert found["compiler"] is None and found["used"] == "the native CPU kernels are not live: so it is"
    assert {isa["reason"] for isa in found["instruction_sets"].values()} == {"there is no library"}


@pytest.mark.skipif(not load_library().isas, reason=load_library().reason)
def test_the_forced_instruction_set_is_the_one_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_kernels()["used"] == load_library().isas[-1]
    monkeypatch.setenv("HF_SPARSE_ISA", "portable")
    assert native_kernels()["used"] == "portable"
    monkeypatch.setenv("HF_SPARSE_ISA", "mmx")
    assert "HF_SPARSE_ISA='mmx' is not one of" in native_kernels()["used"]

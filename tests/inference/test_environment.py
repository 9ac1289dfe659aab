"""The facts beside a number: machine, versions, commit."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from pathlib import Path

import pytest
import torch

from hf_sparse.inference.environment import environment


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
    monkeypatch.setattr("hf_sparse.inference.environment.PACKAGES", ("no-such-package",))
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

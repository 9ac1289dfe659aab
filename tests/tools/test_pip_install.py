"""The installer passes pip's verdict on and shows why when it is bad."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "pip_install.py"


def install(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "pip.log"), "--no-index", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_failure_shows_the_reason_and_the_log(tmp_path: Path) -> None:
    done = install(tmp_path, "no-such-package-anywhere")
    assert done.returncode == 1
    assert "No matching distribution found for no-such-package-anywhere" in done.stderr
    assert f"the whole log is in {tmp_path / 'pip.log'}" in done.stderr
    assert "no-such-package-anywhere" in (tmp_path / "pip.log").read_text()


def test_success_is_one_line(tmp_path: Path) -> None:
    done = install(tmp_path, "pip")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("installed --no-index pip in ") and done.stdout.count("\n") == 1

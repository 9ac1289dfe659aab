"""What gets installed: the package with its data and nothing else, under one version, with a command that runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from importlib import metadata
from pathlib import Path

import pytest

import hf_sparse

REPOSITORY = Path(__file__).resolve().parents[1]
NEEDED = ("setup.cfg", "pyproject.toml", "setup.py", "README.md", "LICENSE", "hf_sparse")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A wheel, and what was said while it was built.

    Built from a copy, since setuptools leaves files where it works, and without a compiler: the kernels have tests of
    their own, and an installation has to do without one.
    """
    top = tmp_path_factory.mktemp("wheel")
    source = top / "source"
    source.mkdir()
    for name in NEEDED:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif path.is_file():
            shutil.copy(path, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-v"]
    done = subprocess.run(
        [*command, "-w", str(top), str(source)],
        env={**os.environ, "CXX": shutil.which("false") or "false"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(top.glob("*.whl")), done.stdout + done.stderr


@pytest.fixture(scope="module")
def names(built: tuple[Path, str]) -> list[str]:
    with zipfile.ZipFile(built[0]) as wheel:
        return wheel.namelist()


def read_metadata(wheel: Path) -> tuple[dict[str, str], list[str]]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        message = message_from_bytes(archive.read(name))
    return dict(message.items()), message.get_all("Requires-Dist") or []


def test_the_wheel_holds_every_module_and_data_file(names: list[str]) -> None:
    wanted = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "hf_sparse").rglob("*")
        if path.suffix in (".py", ".md", ".html", ".cpp", ".h") or path.name == "py.typed"
        if path.parent.name != "tests"
    }
    assert "hf_sparse/py.typed" in wanted and any("/templates/" in name for name in wanted)
    assert not wanted - set(names)


def test_the_wheel_holds_nothing_else(names: list[str]) -> None:
    strangers = [name for name in names if name.split("/")[0] != "hf_sparse" and ".dist-info/" not in name]
    assert not strangers
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_building_warns_of_nothing(built: tuple[Path, str]) -> None:
    said = [line for line in built[1].splitlines() if "Warning:" in line or "deprecated" in line.lower()]
    assert not said


def test_version_and_requirements_are_those_of_the_source(built: tuple[Path, str]) -> None:
    fields, requirements = read_metadata(built[0])
    assert fields["Version"] == hf_sparse.__version__ == metadata.version("hf-sparse")
    assert fields["Requires-Python"] == ">=3.11"
    # torch is the user's own where one is installed: no pin, no upper cap.
    assert "torch>=2.6" in requirements
    assert not [line for line in requirements if "==" in line.split(";")[0] or "<" in line.split(";")[0]]


def test_the_console_script_runs() -> None:
    script = Path(sys.executable).with_name("hf-sparse")
    done = subprocess.run([str(script), "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for command in ("report", "plan", "compress", "decompress", "bench", "card", "push", "env"):
        assert command in done.stdout

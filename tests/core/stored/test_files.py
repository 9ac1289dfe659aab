from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_sparse.core.stored.files import atomic_folder, finish_interrupted_save, interrupted_save


def listing(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_files_appear_together(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    with atomic_folder(target) as staging:
        (staging / "a.txt").write_text("1")
        (staging / "sub").mkdir()
        (staging / "sub" / "b.txt").write_text("2")
        assert listing(target) == {f"{staging.name}/a.txt": "1", f"{staging.name}/sub/b.txt": "2"}
    assert listing(target) == {"a.txt": "1", "sub/b.txt": "2"}


def test_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "a.txt").write_text("old")
    with atomic_folder(tmp_path) as staging:
        (staging / "a.txt").write_text("new")
    assert listing(tmp_path) == {"a.txt": "new", "mine.txt": "mine"}


def test_an_error_leaves_everything_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError, match="half way"), atomic_folder(tmp_path, stale=lambda name: True) as staging:
        (staging / "a.txt").write_text("new")
        (staging / "b.txt").write_text("new")
        raise RuntimeError("half way")
    assert listing(tmp_path) == {"a.txt": "old"}
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


def test_stale_files_are_removed(tmp_path: Path) -> None:
    for name in ("shard-1", "shard-2", "notes"):
        (tmp_path / name).write_text("old")
    seen = []

    def stale(name: str) -> bool:
        seen.append(name)
        return name.startswith("shard")

    with atomic_folder(tmp_path, stale=stale) as staging:
        (staging / "shard-1").write_text("new")
    assert listing(tmp_path) == {"shard-1": "new", "notes": "old"}
    assert seen == ["notes", "shard-2"]


def test_a_kill_in_the_middle_leaves_the_earlier_files_whole(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("old")
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from hf_sparse.core.stored.files import atomic_folder, finish_interrupted_save, interrupted_save\n"
        "with atomic_folder(sys.argv[1]) as staging:\n"
        "    (staging / 'model.safetensors').write_text('ne')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # The package itself imports torch; the module under test does not.
    stub = (
        "import sys, types\n"
        "package = types.ModuleType('hf_sparse')\n"
        "package.__path__ = [sys.argv[2]]\n"
        "sys.modules['hf_sparse'] = package\n"
    )
    package = Path(sys.modules["hf_sparse"].__file__ or "").parent
    done = subprocess.run([sys.executable, "-c", stub + code, str(tmp_path), str(package)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "model.safetensors").read_text() == "old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError), atomic_folder(tmp_path):
        pass


def test_a_target_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "file"):
        pass
    assert listing(tmp_path) == {"file": "mine"}


INTERRUPTED = """
import os, sys
from pathlib import Path
from hf_sparse.core.stored import files

calls, rename = 0, os.replace
def dying(source, target):
    global calls
    calls += 1
    if calls == 2:
        os.kill(os.getpid(), 9)
    rename(source, target)

os.replace = dying
with files.atomic_folder(sys.argv[1], stale=lambda name: name == "old.txt") as staging:
    for name in ("a.txt", "b.txt", "c.txt"):
        (staging / name).write_text("new")
"""


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "old.txt", "mine.txt"):
        (tmp_path / name).write_text("earlier")
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, str(tmp_path)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert {name: (tmp_path / name).read_text() for name in ("a.txt", "b.txt")} == {"a.txt": "new", "b.txt": "earlier"}
    assert interrupted_save(tmp_path) is not None
    assert finish_interrupted_save(tmp_path)
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert files == {"a.txt": "new", "b.txt": "new", "c.txt": "new", "mine.txt": "earlier"}
    assert not finish_interrupted_save(tmp_path)


@pytest.mark.parametrize("names", ['["../precious"]', '["sub/a"]', "[3]", '{"a": 1}', '["/precious"]'])
def test_a_journal_that_somebody_else_wrote_removes_nothing(tmp_path: Path, names: str) -> None:
    target = tmp_path / "model"
    left = target / f".saved-{platform.node()}-999999999-x"
    left.mkdir(parents=True)
    (left / ".removed.json").write_text(names)
    (tmp_path / "precious").write_text("kept")
    (target / "sub").mkdir()
    (target / "sub" / "a").write_text("kept")
    with pytest.raises(OSError, match="lists more than files of its folder"):
        finish_interrupted_save(target)
    assert (tmp_path / "precious").exists()
    assert (target / "sub" / "a").exists()

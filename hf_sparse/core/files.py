"""Files written whole or not at all: written aside, flushed to disk, then renamed into place."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike[str], stale: Callable[[str], bool] | None = None) -> Iterator[Path]:
    """Write a set of files into a folder so that a crash leaves each earlier file whole.

    Yields a staging folder on the same file system. When the block ends without an error every file in it is flushed
    and renamed over its namesake in `target`; when it raises, `target` is untouched.

    Args:
        target: the folder to fill; made if missing. Files in it that are not written again stay.
        stale: called with the name of each file of `target` that was not written again; True removes it (the shards
            of an earlier save, say). The removal comes last.

    Raises:
        OSError: if the folder cannot be made or written.

    Example:
        >>> with tempfile.TemporaryDirectory() as top:
        ...     with atomic_folder(top) as staging:
        ...         _ = (staging / "a.txt").write_text("whole")
        ...     (Path(top) / "a.txt").read_text()
        'whole'
    """
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(target)
    staging = Path(tempfile.mkdtemp(prefix=f"{_staging_prefix()}{os.getpid()}-", dir=target))
    try:
        yield staging
        written = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
        for name in written:
            _flush(staging / name)
        for name in written:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, target / name)
        if stale is not None:
            kept = {str(name) for name in written}
            for path in sorted(target.iterdir()):
                if path.is_file() and path.name not in kept and stale(path.name):
                    path.unlink()
        _flush(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _staging_prefix() -> str:
    # The machine's name, because on a shared file system a process of another machine may be at work.
    return f".saving-{platform.node()}-"


def _clear_abandoned(target: Path) -> None:
    # What a killed save left behind would otherwise stay for ever, and travel with the folder when it is uploaded.
    prefix = _staging_prefix()
    for path in target.glob(f"{glob.escape(prefix)}*"):
        process = path.name.removeprefix(prefix).partition("-")[0]
        if process.isdigit() and not _is_running(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # It runs, and belongs to somebody else.
        return True
    return True


def _flush(path: Path) -> None:
    # A rename is only as durable as the bytes behind it.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

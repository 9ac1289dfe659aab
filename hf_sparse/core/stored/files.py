"""Files written whole or not at all: written aside, flushed to disk, then renamed into place."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# A staging folder that is being filled, and one that holds all of a save.
_SAVING, _SAVED = ".saving-", ".saved-"
# Inside it: which files of the target go once the new ones are in place.
_REMOVED = ".removed.json"


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike[str], stale: Callable[[str], bool] | None = None) -> Iterator[Path]:
    """Write a set of files into a folder so that a crash leaves each earlier file whole, and loses nothing.

    Yields a staging folder on the same file system. When the block ends without an error every file in it is flushed,
    the folder is marked as complete, and its files are renamed over their namesakes in `target`; when it raises,
    `target` is untouched, and gone again if it was made for this. After a crash between two renames the rest is done
    by the next save, or by `finish_interrupted_save`.

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
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    finish_interrupted_save(target)
    staging = Path(tempfile.mkdtemp(prefix=f"{_prefix(_SAVING)}{os.getpid()}-", dir=target))
    try:
        yield staging
        written = {str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file()}
        there = {path.name for path in target.iterdir() if path.is_file()}
        removed = [name for name in sorted(there - written) if stale is not None and stale(name)]
        (staging / _REMOVED).write_text(json.dumps(removed), encoding="utf-8")
        for path in staging.rglob("*"):
            flush(path)
        complete = target / staging.name.replace(_SAVING, _SAVED, 1)
        os.rename(staging, complete)
        flush(target)
        _put_in_place(complete, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if made and not any(target.iterdir()):
            with contextlib.suppress(OSError):
                target.rmdir()


def finish_interrupted_save(target: str | os.PathLike[str]) -> bool:
    """Finish a save that a crash interrupted after all of it was written; clear away one that was not yet.

    Args:
        target: a folder that `atomic_folder` writes to.

    Returns:
        Whether there was something to finish.
    """
    # What a killed save left behind would otherwise stay for ever, and travel with the folder when it is uploaded.
    for path in _abandoned(Path(target), _SAVING):
        shutil.rmtree(path, ignore_errors=True)
    complete = _abandoned(Path(target), _SAVED)
    for path in complete:
        _put_in_place(path, Path(target))
    return bool(complete)


def interrupted_save(target: str | os.PathLike[str]) -> Path | None:
    """Find what a save left behind that was interrupted after all of it was written; None where there is nothing."""
    return next(iter(_abandoned(Path(target), _SAVED)), None)


def _put_in_place(complete: Path, target: Path) -> None:
    journal = complete / _REMOVED
    # Without a journal all is in place already, and the crash came while the emptied folder was removed.
    removed = _read_journal(journal) if journal.is_file() else []
    for path in sorted(complete.rglob("*")):
        if path.is_file() and path != journal:
            place = target / path.relative_to(complete)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    for name in removed:
        (target / name).unlink(missing_ok=True)
    flush(target)
    shutil.rmtree(complete, ignore_errors=True)


def _read_journal(journal: Path) -> list[str]:
    # A folder that was copied or downloaded may bring one along that nobody here wrote.
    removed = json.loads(journal.read_text(encoding="utf-8"))
    if not isinstance(removed, list) or not all(isinstance(name, str) and Path(name).name == name for name in removed):
        raise OSError(f"{journal} lists more than files of its folder: remove {journal.parent} and save again.")
    return removed


def _prefix(state: str) -> str:
    # The machine's name, because on a shared file system a process of another machine may be at work.
    return f"{state}{platform.node()}-"


def _abandoned(target: Path, state: str) -> list[Path]:
    found = []
    for path in sorted(target.glob(f"{glob.escape(_prefix(state))}*")):
        process = path.name.removeprefix(_prefix(state)).partition("-")[0]
        if process.isdigit() and not _is_running(int(process)):
            found.append(path)
    return found


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


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk."""
    # A rename is only as durable as the bytes behind it.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Checkpoints that are whole, and how to tell: the last file that is written lists all the others with their sizes."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_sparse.core.stored.files import flush

MANIFEST = "checkpoint_complete.json"
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")

logger = logging.getLogger(__name__)


def mark_whole(folder: str | os.PathLike[str], step: int, world_size: int) -> None:
    """Declare a checkpoint whole: all its files on disk, then their list, in one rename.

    Args:
        folder: the checkpoint's folder; nothing more is written to it.
        step: optimizer steps done.
        world_size: number of ranks that wrote it.
    """
    folder = Path(folder)
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for path in files.values():
        flush(path)
    sizes = {name: path.stat().st_size for name, path in files.items() if name != MANIFEST}
    staged = folder / f".{MANIFEST}.{os.getpid()}"
    staged.write_text(json.dumps({"step": step, "world_size": world_size, "files": sizes}, indent=1), encoding="utf-8")
    flush(staged)
    os.replace(staged, folder / MANIFEST)
    flush(folder)


def what_is_missing(folder: str | os.PathLike[str]) -> str | None:
    """Say why a checkpoint is not whole; None where it is.

    Example:
        >>> what_is_missing("nowhere")
        'nowhere holds no checkpoint_complete.json'
    """
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"{folder} holds no {MANIFEST}"
    except (ValueError, KeyError, TypeError):
        return f"{folder / MANIFEST} is damaged"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{folder} holds no {name}"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes of {size}"
    return None


def check_whole(folder: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint that a crash, a full disk or an unfinished copy has left incomplete.

    Raises:
        ValueError: saying what is missing, and which checkpoint beside it is whole.
    """
    missing = what_is_missing(folder)
    if missing is not None:
        others = [path for path in _checkpoints(Path(folder).parent) if what_is_missing(path) is None]
        way_out = f"Resume from {others[-1]}" if others else "No other one beside it is whole: begin anew"
        raise ValueError(
            f"{missing}: its save was interrupted, a copy of it was, or another program wrote it. {way_out}."
        )


def check_optimizer(folder: str | os.PathLike[str]) -> None:
    """Refuse to resume from a checkpoint that holds the model alone.

    Raises:
        ValueError: naming it. Moments, and with them the importance of weights, would begin anew without a word.
    """
    if not any(path.name.startswith("optimizer") for path in Path(folder).iterdir()):
        raise ValueError(
            f"{folder} holds no optimizer: it was written with save_only_model=True, and a run cannot go on from it. "
            f"Resume from another one, or load its model and train anew."
        )


def last_whole_checkpoint(output_dir: str | os.PathLike[str]) -> Path:
    """Find the newest whole checkpoint of a run; newer ones that are not whole are named in a warning.

    Raises:
        ValueError: if there is none.
    """
    for folder in reversed(_checkpoints(Path(output_dir))):
        missing = what_is_missing(folder)
        if missing is None:
            return folder
        logger.warning("Skipped a checkpoint whose save was interrupted: %s.", missing)
    raise ValueError(f"output_dir={str(output_dir)!r} holds no whole checkpoint to resume from: begin anew.")


def _checkpoints(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    numbered = [(int(match[1]), path) for path in found if (match := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(numbered) if path.is_dir()]

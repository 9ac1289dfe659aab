"""What the commands share that write a model folder: where to, what is copied beside the weights, the card."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hf_sparse.cli.support import check_model_folder, quiet_transformers

if TYPE_CHECKING:
    from hf_sparse.core.report import SparsityReport

SaveFormat = Literal["compressed", "dense"]
Destination = Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.", show_default=False)]


def check_folders(source: Path, destination: Path, force: bool) -> None:
    """Refuse a source that is no folder and a destination that is not free, before anything heavy is imported.

    Raises:
        FileNotFoundError, FileExistsError: as `check_model_folder` and `check_destination`.
    """
    check_model_folder(source)
    check_destination(source, destination, force)
    quiet_transformers()


def check_destination(source: Path, destination: Path, force: bool) -> None:
    """Refuse a destination that holds something already.

    Raises:
        FileExistsError: if the destination is a file, the source itself, or, without `force`, not empty.
    """
    if destination.resolve() == source.resolve():
        raise FileExistsError(f"{destination} is the source itself: name another folder.")
    if destination.exists() and not destination.is_dir():
        raise FileExistsError(f"{destination} is a file: name a folder.")
    if destination.is_dir() and any(destination.iterdir()) and not force:
        raise FileExistsError(f"{destination} is not empty: name another folder, or overwrite it with --force.")


def write_folder(convert: Callable[[Path], None], src: Path, dst: Path, save_format: SaveFormat) -> SparsityReport:
    """Write a converted model and whatever else lies beside its source, whole or not at all.

    Args:
        convert: writes weights and config into the folder that it is given.
        src: folder that other files are copied from; its card is brought up to date.
        dst: folder to write.
        save_format: what the weights will be.

    Returns:
        The report of what was written.
    """
    from hf_sparse.core.report import report
    from hf_sparse.core.stored.files import atomic_folder
    from hf_sparse.hub.push import WEIGHT_FILES

    with atomic_folder(dst, stale=lambda name: any(fnmatch.fnmatch(name, p) for p in WEIGHT_FILES)) as staging:
        convert(staging)
        copy_others(src, staging, target=dst)
        _update_card(src, staging, save_format)
        return report(staging)


def copy_others(
    src: Path, dst: Path, left_out: Sequence[str] = (), target: Path | None = None, overwrite: bool = False
) -> list[str]:
    """Copy what lies beside the weights of a model, with the folders it is in: no weights, no state of training.

    Args:
        src: folder of the model.
        dst: folder to copy to, which may lie in the other one.
        left_out: patterns of further paths that are not copied.
        target: where `dst` will end up; None = where it is.
        overwrite: whether a file that is there already is replaced.

    Returns:
        The paths of what was copied, inside both folders.
    """
    from hf_sparse.hub.push import TRAINING_STATE, WEIGHT_FILES

    patterns = (*TRAINING_STATE, *WEIGHT_FILES, *left_out)
    # What is being written, staging folder included, is no part of the source.
    written = (dst if target is None else target).resolve()
    inside = src.resolve() in written.parents
    copied = []
    for file in sorted(path for path in src.rglob("*") if path.is_file()):
        if inside and written in file.resolve().parents:
            continue
        name = file.relative_to(src)
        wanted = not any(fnmatch.fnmatch(name.as_posix(), pattern) for pattern in patterns)
        if wanted and (overwrite or not (dst / name).exists()):
            (dst / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, dst / name)
            copied.append(name.as_posix())
    return copied


def _update_card(src: Path, staging: Path, save_format: SaveFormat) -> None:
    """Bring the copied card up to date: another format and size, and times that were not measured on this copy."""
    from hf_sparse.hub.card import CARD_FILE, is_rendered_file, write_card
    from hf_sparse.hub.facts import FACTS_FILE, read_facts

    if not (src / FACTS_FILE).is_file():
        return
    size = sum(file.stat().st_size for file in staging.glob("model*.safetensors"))
    facts = replace(read_facts(src / FACTS_FILE), save_format=save_format, file_bytes=size, latency=())
    card = src / CARD_FILE
    if card.is_file() and not is_rendered_file(card):
        (staging / FACTS_FILE).write_text(facts.to_json(), encoding="utf-8")
        typer.echo(f"{CARD_FILE} was edited by hand and is copied as it is; it may describe the source.", err=True)
    else:
        write_card(staging, facts)

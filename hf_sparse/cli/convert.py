"""`hf-sparse compress` and `decompress`: a model folder with its pruned blocks left out of storage, and back."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hf_sparse.cli.support import (
    Debug,
    Force,
    Json,
    ModelFolder,
    check_destination,
    check_model_folder,
    guarded,
    is_compressed,
    load_model,
    print_json,
    progress,
    quiet_transformers,
)

if TYPE_CHECKING:
    from hf_sparse.core.blocks import BlockShape
    from hf_sparse.core.report import SparsityReport

SaveFormat = Literal["compressed", "dense"]
Destination = Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.", show_default=False)]


@guarded
def compress(
    src: ModelFolder,
    dst: Destination,
    block_height: Annotated[
        int | None, typer.Option(help="Output rows per block, -1 = all. (default: as recorded in SRC, else 8)")
    ] = None,
    block_width: Annotated[
        int | None, typer.Option(help="Input columns per block, -1 = all. (default: as recorded in SRC, else 1)")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Leave the zero blocks of a dense model out of storage. Exact: the copy computes the same."""
    check_model_folder(src)
    check_destination(src, dst, force)
    if is_compressed(src):
        raise ValueError(f"{src} is compressed already: `hf-sparse report {src}` shows its layers.")
    shape = _block_shape(src, block_height, block_width)
    quiet_transformers()

    def convert(staging: Path) -> None:
        from hf_sparse.inference.streaming import NotStreamable, compress_folder, work

        try:
            with progress(f"compressing {src}", work(src, passes=2)) as advance:
                found = bool(compress_folder(src, staging, shape, advance))
        except NotStreamable as error:
            typer.echo(f"{src}: {error}; it is loaded as a whole.", err=True)
            found = _compress_in_memory(src, staging, shape)
        if not found:
            raise ValueError(
                f"{src} has no zero block of {shape[0]} x {shape[1]} to leave out: name the shape it was pruned with "
                f"(--block-height, --block-width), or prune it first."
            )

    _show(write_folder(convert, src, dst, "compressed"), dst, as_json)


@guarded
def decompress(
    src: ModelFolder, dst: Destination, force: Force = False, as_json: Json = False, debug: Debug = False
) -> None:
    """Write a dense copy of a compressed model, for tools that know nothing of blocks. Exact, too."""
    check_model_folder(src)
    check_destination(src, dst, force)
    if not is_compressed(src):
        raise ValueError(f"{src} is dense already.")

    def convert(staging: Path) -> None:
        from hf_sparse.inference.streaming import decompress_folder, work

        with progress(f"decompressing {src}", work(src, passes=1)) as advance:
            decompress_folder(src, staging, advance)

    _show(write_folder(convert, src, dst, "dense"), dst, as_json)


def _compress_in_memory(src: Path, staging: Path, shape: BlockShape) -> bool:
    """Let transformers read what only it can bring into the names of today; whether there was a zero block."""
    from hf_sparse.inference.compress import compress as compress_model
    from hf_sparse.inference.compress import compressed_layers

    model = compress_model(load_model(src), block_shape=shape)
    model.save_pretrained(staging)
    return bool(compressed_layers(model))


def _block_shape(src: Path, height: int | None, width: int | None) -> BlockShape:
    from hf_sparse.hub.facts import FACTS_FILE, read_facts

    recorded = read_facts(src / FACTS_FILE).block_shape if (src / FACTS_FILE).is_file() else None
    default = recorded or (8, 1)
    return default[0] if height is None else height, default[1] if width is None else width


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
    from hf_sparse.core.files import atomic_folder
    from hf_sparse.core.report import report
    from hf_sparse.hub.push import TRAINING_STATE, WEIGHT_FILES

    left_out = (*TRAINING_STATE, *WEIGHT_FILES)
    with atomic_folder(dst, stale=lambda name: any(fnmatch.fnmatch(name, p) for p in WEIGHT_FILES)) as staging:
        convert(staging)
        for file in sorted(path for path in src.rglob("*") if path.is_file()):
            name = file.relative_to(src)
            wanted = not any(fnmatch.fnmatch(name.as_posix(), pattern) for pattern in left_out)
            if wanted and not (staging / name).exists():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, staging / name)
        _update_card(src, staging, save_format)
        return report(staging)


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


def _show(written: SparsityReport, dst: Path, as_json: bool) -> None:
    if as_json:
        print_json({"path": str(dst), **written.to_dict()})
    else:
        share = written.bytes / written.dense_bytes
        typer.echo(
            f"{dst}: sparsity {written.sparsity:.2%}, {written.bytes:,} of {written.dense_bytes:,} bytes ({share:.1%})"
        )

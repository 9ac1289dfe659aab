"""`hf-sparse compress` and `decompress`: a model folder with its pruned blocks left out of storage, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_sparse.cli.folders import Destination, check_folders, write_folder
from hf_sparse.cli.support import (
    Debug,
    Force,
    Json,
    ModelFolder,
    guarded,
    is_compressed,
    load_model,
    print_json,
    progress,
)

if TYPE_CHECKING:
    from hf_sparse.core.blocks import BlockShape
    from hf_sparse.core.report import SparsityReport


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
    block_overrides: Annotated[
        str | None,
        typer.Option(
            help='JSON: other shapes for the layers whose whole name a regex matches, {".*query": [16, 16]}.'
        ),
    ] = None,
    exclude_modules: Annotated[
        str | None, typer.Option(help="Regex: layers that stay dense, where it matches the whole name.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Leave the zero blocks of a dense model out of storage. Exact: the copy computes the same."""
    check_folders(src, dst, force)
    if is_compressed(src):
        raise ValueError(f"{src} is compressed already: `hf-sparse report {src}` shows its layers.")
    shape = _block_shape(src, block_height, block_width)
    choice = _choice(exclude_modules, block_overrides)

    def convert(staging: Path) -> None:
        from hf_sparse.inference.stored.streaming import NotStreamable, compress_folder, work

        try:
            with progress(f"compressing {src}", work(src, passes=2)) as advance:
                found = bool(compress_folder(src, staging, shape, advance, **choice))
        except NotStreamable as error:
            typer.echo(f"{src}: {error}; it is loaded as a whole.", err=True)
            found = _compress_in_memory(src, staging, shape, choice)
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
    check_folders(src, dst, force)
    if not is_compressed(src):
        raise ValueError(f"{src} is dense already.")

    def convert(staging: Path) -> None:
        from hf_sparse.inference.stored.streaming import decompress_folder, work

        with progress(f"decompressing {src}", work(src, passes=1)) as advance:
            decompress_folder(src, staging, advance)

    _show(write_folder(convert, src, dst, "dense"), dst, as_json)


def _compress_in_memory(src: Path, staging: Path, shape: BlockShape, choice: dict[str, Any]) -> bool:
    """Let transformers read what only it can bring into the names of today; whether there was a zero block."""
    from hf_sparse.inference.compress import compress as compress_model
    from hf_sparse.inference.compress import compressed_tensors

    model = compress_model(load_model(src), block_shape=shape, **choice)
    model.save_pretrained(staging)
    return bool(compressed_tensors(model)[0])


def _choice(exclude_modules: str | None, block_overrides: str | None) -> dict[str, Any]:
    from hf_sparse.core.structure.overrides import parse_block_overrides

    return {"exclude_modules": exclude_modules, "block_overrides": parse_block_overrides(block_overrides)}


def _block_shape(src: Path, height: int | None, width: int | None) -> BlockShape:
    from hf_sparse.hub.facts import FACTS_FILE, read_facts

    recorded = read_facts(src / FACTS_FILE).block_shape if (src / FACTS_FILE).is_file() else None
    default = recorded or (8, 1)
    return default[0] if height is None else height, default[1] if width is None else width


def _show(written: SparsityReport, dst: Path, as_json: bool) -> None:
    if as_json:
        print_json({"path": str(dst), **written.to_dict()})
    else:
        share = written.bytes / written.dense_bytes
        typer.echo(
            f"{dst}: sparsity {written.sparsity:.2%}, {written.bytes:,} of {written.dense_bytes:,} bytes ({share:.1%})"
        )

"""`hf-sparse bench`: how fast a model is on this machine, beside the dense one."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_sparse.cli.support import (
    Debug,
    Json,
    ModelFolder,
    check_model_folder,
    guarded,
    is_compressed,
    load_model,
    print_json,
    quiet_transformers,
)


@guarded
def bench(
    path: ModelFolder,
    dense: Annotated[
        Path | None, typer.Option(help="Folder of the dense model to beat. (default: a dense copy of PATH)")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    length: Annotated[str, typer.Option(help="Tokens per row, separated by commas.")] = "128",
    seconds: Annotated[float, typer.Option(min=0.0, help="Time spent on each measurement.")] = 2.0,
    record: Annotated[bool, typer.Option("--record", help="Record the times in the model card of PATH.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure latency on this machine, beside the dense model. Values are compared before any time is told."""
    for folder in filter(None, (path, dense)):
        check_model_folder(folder)
    batches, lengths = _numbers("--batch", batch), _numbers("--length", length)
    if dense is None and not is_compressed(path):
        raise ValueError(f"{path} is dense: name the model to compare it with, --dense PATH.")
    if record:
        _check_card(path)
    rows = _measure(path, dense, batches, lengths, seconds)

    from hf_sparse.inference.environment import environment

    command = ["hf-sparse", "bench", str(path), *(["--dense", str(dense)] if dense else [])]
    command += ["--batch", batch, "--length", length, "--seconds", f"{seconds:g}"]
    result = {"model": str(path), "command": shlex.join(command), **environment(), "rows": rows}
    if as_json:
        print_json(result)
    else:
        _print_table(rows)
    if record:
        _record(path, result)


def _measure(
    path: Path, dense_path: Path | None, batches: list[int], lengths: list[int], seconds: float
) -> list[dict[str, Any]]:
    from hf_sparse.inference.bench import compare_models, token_inputs
    from hf_sparse.inference.compress import decompress

    quiet_transformers()
    pruned, same = load_model(path), decompress(load_model(path))
    dense = load_model(dense_path) if dense_path else same
    vocab_size = getattr(pruned.config, "vocab_size", None)
    if vocab_size is None:
        raise ValueError(f"{path} takes no tokens (its config has no vocab_size), and bench draws nothing else.")
    longest = getattr(pruned.config, "max_position_embeddings", None)
    if longest is not None and max(lengths) > longest:
        raise ValueError(f"--length {max(lengths)} is more than the {longest} positions of {path}.")
    inputs = token_inputs(batches, lengths, vocab_size)
    try:
        return compare_models(dense, pruned, inputs, reference=same, seconds=seconds)
    except IndexError as error:
        raise ValueError(f"--length {max(lengths)} is more than {path} takes: {error}.") from error


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option}={text!r} must be positive whole numbers separated by commas, such as 1,8.")
    return [int(part) for part in parts]


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("batch", "tokens", "dense ms", "hf_sparse ms", "ratio", "max error", box=None)
    for column in table.columns:
        column.justify = "right"
    for dense, pruned in zip(rows[0::2], rows[1::2], strict=True):
        table.add_row(
            str(pruned["batch"]),
            str(pruned["length"]),
            f"{dense['ms']:.3f}",
            f"{pruned['ms']:.3f}",
            f"{dense['ms'] / pruned['ms']:.2f}x",
            f"{pruned['max_error']:.1e}",
        )
    Console().print(table)
    typer.echo(
        f"density {rows[1]['density']:.1%}, {rows[1]['dtype']}, {rows[1]['threads']} threads, {rows[1]['device']}"
    )


def _check_card(path: Path) -> None:
    """Refuse, before minutes are spent, to record times where they could not be told."""
    from hf_sparse.hub.card import CARD_FILE, facts_from_folder, is_rendered

    facts_from_folder(path)
    card = path / CARD_FILE
    if card.is_file() and not is_rendered(card.read_text(encoding="utf-8")):
        raise FileExistsError(f"{card} was edited by hand: `hf-sparse card {path} --force` renders it again.")


def _record(path: Path, result: dict[str, Any]) -> None:
    from hf_sparse.hub.card import facts_from_folder, write_card
    from hf_sparse.hub.facts import latency_facts

    machine = result["hardware"]
    hardware = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores"
    # The path is that of this disk; whoever reads the card has the model under another one.
    command = result["command"].replace(shlex.quote(str(path)), "PATH", 1)
    facts = replace(facts_from_folder(path), latency=latency_facts(result["rows"], hardware, command))
    card = write_card(path, facts)
    typer.echo(f"{card} tells these times.", err=True)

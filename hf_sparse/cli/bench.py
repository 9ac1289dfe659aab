"""`hf-sparse bench`: how fast a model is on this machine, beside dense engines."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

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

# Of --engines; torch itself is always there. torch.compile has an option of its own: it takes long to begin.
OPTIONAL_ENGINES = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class _Plan:
    """What to measure."""

    path: Path
    dense: Path | None
    batches: list[int]
    lengths: list[int]
    engines: list[str]
    dtype: str | None
    device: str
    graphs: bool
    seconds: float


@guarded
def bench(
    path: ModelFolder,
    dense: Annotated[
        Path | None, typer.Option(help="Folder of the dense model to beat. (default: a dense copy of PATH)")
    ] = None,
    engines: Annotated[
        str, typer.Option(help="Dense engines: auto, or of torch,onnxruntime,openvino separated by commas.")
    ] = "auto",
    compile_dense: Annotated[bool, typer.Option("--compile", help="Measure torch.compile, too.")] = False,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    length: Annotated[str, typer.Option(help="Tokens per row, separated by commas.")] = "128",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Dtype of all models; float16 on a GPU. (default: as saved)"),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to measure; auto takes a GPU if there is one.")
    ] = "auto",
    graphs: Annotated[
        bool, typer.Option(help="On a GPU, replay CUDA graphs: without what the CPU takes to launch.")
    ] = True,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each engine. (default: those of torch)")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time spent on each batch size and length.")] = 2.0,
    out: Annotated[Path | None, typer.Option(help="File to write the JSON to.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Record the times in the model card of PATH.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure latency on this machine, beside dense engines. Values are compared before any time is told."""
    for folder in filter(None, (path, dense)):
        check_model_folder(folder)
    names = _engines(engines) + (["torch_compile"] if compile_dense else [])
    sizes = _numbers("--batch", batch), _numbers("--length", length)
    plan = _Plan(path, dense, *sizes, names, dtype, _device(device, dtype), graphs, seconds)
    if dense is None and not is_compressed(path):
        raise ValueError(f"{path} is dense: name the model to compare it with, --dense PATH.")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"--out {out} must be a file in a folder that exists.")
    if record:
        _check_card(path)
    quiet_transformers()
    with _threads(threads):
        measured = _measure(plan)

        from hf_sparse.inference.measuring.environment import environment

        command = ["hf-sparse", "bench", str(path), *(["--dense", str(dense)] if dense else [])]
        command += ["--engines", engines, *(["--compile"] if compile_dense else []), "--batch", batch]
        command += ["--length", length, *(["--dtype", dtype] if dtype else [])]
        command += [*(["--device", device] if device != "auto" else []), *([] if graphs else ["--no-graphs"])]
        command += [*(["--threads", str(threads)] if threads else []), "--seconds", f"{seconds:g}"]
        result = {"model": str(path), "command": shlex.join(command), **environment(), **measured}
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print_json(result)
    else:
        _print_table(result)
    if record:
        _record(path, result)


def _measure(plan: _Plan) -> dict[str, Any]:
    import torch

    from hf_sparse.inference.compress import compressed_experts, compressed_layers, decompress
    from hf_sparse.inference.encoders.fused import fused_encoders
    from hf_sparse.inference.measuring.bench import compare_models, token_inputs
    from hf_sparse.inference.measuring.engines import make_engines

    pruned, same = load_model(plan.path), decompress(load_model(plan.path))
    dense = load_model(plan.dense) if plan.dense else same
    kind = getattr(torch, plan.dtype) if plan.dtype else None
    pruned, same, dense = (model.to(device=plan.device, dtype=kind) for model in (pruned, same, dense))
    vocab_size = getattr(pruned.config, "vocab_size", None)
    if vocab_size is None:
        raise ValueError(f"{plan.path} takes no tokens (its config has no vocab_size), and bench draws nothing else.")
    longest = getattr(pruned.config, "max_position_embeddings", None)
    if longest is not None and max(plan.lengths) > longest:
        raise ValueError(f"--length {max(plan.lengths)} is more than the {longest} positions of {plan.path}.")
    inputs = token_inputs(plan.batches, plan.lengths, vocab_size, device=plan.device)
    with _progress(1 + len(inputs)) as advance:
        try:
            with torch.inference_mode():
                truths = [dense(**given)[0] for given in inputs] if plan.engines else []
                others, skipped = make_engines(dense, plan.engines, inputs, truths)
            advance()
            rows = compare_models(
                dense,
                pruned,
                inputs,
                reference=same,
                seconds=plan.seconds,
                others=others,
                advance=advance,
                graphs=plan.graphs,
            )
        except IndexError as error:
            raise ValueError(f"--length {max(plan.lengths)} is more than {plan.path} takes: {error}.") from error
    backends = Counter(layer.backend() for layer in compressed_layers(pruned).values())
    for experts in compressed_experts(pruned).values():
        backends.update(experts.backends())
    return {
        "not_measured": skipped,
        "backends": dict(backends),
        "encoders": fused_encoders(pruned),
        "rows": rows,
    }


def _device(name: str, dtype: str | None) -> str:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here.")
    chosen = "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"
    if chosen == "cpu" and dtype == "float16":
        raise ValueError("--dtype float16 is measured on a GPU: use float32 or bfloat16 on the CPU.")
    return chosen


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr; nothing where nobody watches."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("making engines", total=steps)
        yield lambda: bar.update(task, advance=1, description="measuring")


def _engines(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if names == ["auto"]:
        return list(OPTIONAL_ENGINES)
    known = ("torch", *OPTIONAL_ENGINES)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--engines={text!r} holds {unknown[0]!r}: use auto, or of {','.join(known)}.")
    return [name for name in names if name != "torch"]


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option}={text!r} must be positive whole numbers separated by commas, such as 1,8.")
    return [int(part) for part in parts]


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("batch", "tokens", "engine", "ms", "spread", "of dense", "of torch", "max error", box=None)
    for column in table.columns:
        column.justify = "left" if column.header == "engine" else "right"
    names = {"dense": "torch", "torch_compile": "torch.compile"}
    for row in result["rows"]:
        table.add_row(
            str(row["batch"]),
            str(row["length"]),
            names.get(row["engine"], row["engine"]),
            f"{row['ms']:.3f}",
            f"{row['spread'][0]:.3g}-{row['spread'][1]:.3g}",
            f"{row['speedup']:.2f}x",
            f"{row['speedup_eager']:.2f}x",
            f"{row['max_error']:.1e}",
        )
    Console().print(table)
    last = result["rows"][-1]
    typer.echo(
        f"density {last['density']:.1%}, {last['dtype']}, {_place(last)}; "
        f"speed-ups over the fastest dense engine and over torch"
    )
    for name, reason in result["not_measured"].items():
        typer.echo(f"without {names.get(name, name)}: {reason}")
    if result["backends"]:
        counts = ", ".join(f"{count} by {name}" for name, count in result["backends"].items())
        typer.echo(f"compressed layers: {counts}")
    for name, state in result["encoders"].items():
        typer.echo(f"encoder {name or 'of the model'}: {state}")


def _place(row: dict[str, Any]) -> str:
    if row["device"] == "cpu":
        return f"{row['threads']} threads, cpu"
    return f"{row['gpu']}, {'CUDA graph' if row['mode'] == 'graph' else 'launched by the CPU'}"


def _check_card(path: Path) -> None:
    """Refuse, before minutes are spent, to record times where they could not be told."""
    from hf_sparse.hub.card import CARD_FILE, facts_from_folder, is_rendered_file

    facts_from_folder(path)
    card = path / CARD_FILE
    if card.is_file() and not is_rendered_file(card):
        raise FileExistsError(f"{card} was edited by hand: `hf-sparse card {path} --force` renders it again.")


def _record(path: Path, result: dict[str, Any]) -> None:
    from hf_sparse.hub.card import facts_from_folder, write_card
    from hf_sparse.hub.facts import latency_facts

    machine = result["hardware"]
    hardware = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores"
    # The path is that of this disk; whoever reads the card has the model under another one.
    command = result["command"].replace(shlex.quote(str(path)), "PATH", 1)
    pairs = [row for row in result["rows"] if row["engine"] in ("dense", "hf_sparse")]
    facts = replace(facts_from_folder(path), latency=latency_facts(pairs, hardware, command))
    card = write_card(path, facts)
    typer.echo(f"{card} tells these times.", err=True)

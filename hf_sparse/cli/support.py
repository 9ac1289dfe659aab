"""What all commands share: options, errors without tracebacks, JSON, folders to write to."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

_F = TypeVar("_F", bound=Callable[..., None])

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
Model = Annotated[
    str,
    typer.Argument(help="Folder of a saved model, or a repository on the Hub: namespace/name.", show_default=False),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository on the Hub.")]
Token = Annotated[str | None, typer.Option(help="Access token; better kept in HF_TOKEN or `hf auth login`.")]
ModelFolder = Annotated[Path, typer.Argument(help="Folder of a saved model.", show_default=False)]

MAX_ERROR_LINES = 3


def guarded(command: _F) -> _F:
    """Turn the errors that a user can do something about into one to three lines on stderr and exit code 1.

    The command has to take `debug`; True lets errors through.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:
            raise
        except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
            # typer says "stop" with exceptions that are RuntimeErrors.
            if kwargs.get("debug") or isinstance(error, typer.Exit | typer.Abort):
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            typer.echo("\n".join([f"hf-sparse: {lines[0]}", *lines[1:MAX_ERROR_LINES]]), err=True)
            raise typer.Exit(1) from error

    return run  # type: ignore[return-value]


def print_json(data: Any) -> None:
    """Print data as the only thing on stdout."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr while bytes are dealt with; nothing where nobody watches.

    Args:
        what: is going on.
        total: bytes.

    Yields:
        What to call with the number of bytes that were just dealt with.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda size: bar.advance(task, size)
        bar.update(task, completed=total)


def quiet_transformers() -> None:
    """Keep the log of transformers off stderr, and its progress bars too where nobody watches them."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def check_model_folder(path: Path) -> None:
    """Refuse a path that is no folder, before anything heavy is imported.

    Raises:
        FileNotFoundError: if there is no folder of that name.
    """
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {kind}: expected the folder of a saved model.")


def resolve_model(model: str, revision: str | None = None, token: str | None = None, weights: bool = True) -> Path:
    """Find the folder of a model: the one of that name, or a copy of a repository on the Hub.

    Args:
        model: folder, or namespace/name.
        revision, token: for a repository.
        weights: False leaves the weights of a repository where they are.

    Raises:
        FileNotFoundError: if it is neither a folder nor a name that a repository could have.
        ValueError: for a revision of a folder.
        FetchError: if the Hub does not give it.
    """
    path = local_folder(model, revision)
    if path is not None:
        return path
    from hf_sparse.hub.fetch import fetch_model

    return fetch_model(model, revision, token, weights)


def local_folder(model: str, revision: str | None = None) -> Path | None:
    """Find the folder of that name; None where it is a name that a repository on the Hub could have.

    Raises:
        FileNotFoundError, ValueError: as `resolve_model`.
    """
    path = Path(model)
    if path.exists():
        check_model_folder(path)
        if revision is not None:
            raise ValueError(f"{model} is a folder, which has no revisions: leave --revision {revision} out.")
        return path
    # A name of the Hub has one slash; everything else is a path, and costs no import.
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or "\\" in model:
        check_model_folder(path)
    from hf_sparse.hub.filters import is_hub_id

    if not is_hub_id(model):
        check_model_folder(path)
    return None


def is_compressed(folder: Path) -> bool:
    """Tell whether a folder holds a compressed model.

    Raises:
        FileNotFoundError: if it holds no config.json.
        FormatError: if that is not JSON.
    """
    from hf_sparse.core.stored.reading import read_config

    quantization = read_config(folder).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "hf_sparse"


def load_model(folder: Path) -> Any:
    """Load a model as the class that its config names, with every tensor of the file and no other.

    Raises:
        FileNotFoundError, FormatError: as `core.report.report`.
        ValueError: if the config names no class of transformers, or the class wants other tensors than the file has.
    """
    import transformers

    from hf_sparse.core.report import report

    report(folder)
    names = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).architectures or []
    cls: Any = getattr(transformers, str(names[0]), None) if names else None
    # A name out of a file: nothing but a model is called.
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"{folder}/config.json names no architecture of transformers (architectures={names}).")
    loaded: Any = cls.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info[kind])):
            raise ValueError(
                f"{folder}: {len(keys)} {kind.replace('_', ' ')} for {names[0]}, such as {keys[0]}: "
                f"it would not be the same model."
            )
    return model.eval()

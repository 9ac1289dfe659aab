"""The command line `hf-sparse`: one module per command, each a thin door to the Python API.

Results go to stdout (with `--json` nothing but JSON), everything else to stderr. Exit codes: 0 done, 1 refused or
failed, 2 wrong usage. Heavy imports happen inside the commands, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import sys
import traceback
from types import TracebackType
from typing import Annotated

import typer

from hf_sparse.cli.bench import bench
from hf_sparse.cli.convert import compress, decompress
from hf_sparse.cli.env import env
from hf_sparse.cli.exits import crop, export
from hf_sparse.cli.plan import plan
from hf_sparse.cli.publish import card, push
from hf_sparse.cli.report import report
from hf_sparse.version import __version__

app = typer.Typer(
    name="hf-sparse",
    help="Look at, convert, measure and publish block-sparse models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

for _command, _example in (
    (report, "hf-sparse report out/model --html report.html"),
    (plan, "hf-sparse plan pruning.json --steps 1000 --model out/dense --plot plan.png"),
    (compress, "hf-sparse compress out/dense out/small --block-height 8 --block-width 1"),
    (decompress, "hf-sparse decompress out/small out/dense"),
    (crop, "hf-sparse crop out/small out/cropped"),
    (export, "hf-sparse export out/small out/onnx --to onnx"),
    (bench, "hf-sparse bench out/model --dense out/teacher --batch 1,8 --length 128"),
    (card, "hf-sparse card out/model"),
    (push, "hf-sparse push out/model me/my-model --private"),
    (env, "hf-sparse env --json"),
):
    app.command(epilog=f"Example: {_example}")(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; the console script `hf-sparse` calls it."""
    # Calling the app itself would let typer replace the hook, and a bug would end in a page of traceback.
    sys.excepthook = _last_resort
    typer.main.get_command(app)(prog_name="hf-sparse")


def _last_resort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if "--debug" in sys.argv:
        traceback.print_exception(kind, error, trace)
        return
    typer.echo(f"hf-sparse: this is a bug: {kind.__name__}: {error}", err=True)
    typer.echo("Run it again with --debug, and report the traceback together with `hf-sparse env`.", err=True)

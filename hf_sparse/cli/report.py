"""`hf-sparse report`: how sparse a model is and what it weighs, as a table, as JSON, or as a page to look at."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from hf_sparse.cli.support import Debug, Json, Model, Revision, Token, guarded, local_folder, print_json


@guarded
def report(
    model: Model,
    html: Annotated[
        Path | None, typer.Option(help="Also write a page with tables, mask maps and curves: one file, no network.")
    ] = None,
    revision: Revision = None,
    token: Token = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell how sparse a model is and what it weighs, layer by layer."""
    if html is not None:
        _check_page(html)
    with _folder_of(model, revision, token) as path:
        from hf_sparse.core.report import report as report_folder

        found = report_folder(path)
        if html is not None:
            _write_page(path, html, name=None if path == Path(model) else model)
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(str(found))


@contextmanager
def _folder_of(model: str, revision: str | None, token: str | None) -> Iterator[Path]:
    """Find the folder of a model, or of what a report looks at in a repository: of a compressed one no weights."""
    path = local_folder(model, revision)
    if path is not None:
        yield path
        return
    from hf_sparse.hub.fetch import fetch_model
    from hf_sparse.hub.headers import fetch_headers

    with tempfile.TemporaryDirectory(prefix="hf_sparse-") as top:
        folder = Path(top) / model.replace("/", "--")
        folder.mkdir()
        if (found := fetch_headers(model, folder, revision, token)) is not None:
            yield found
        else:
            typer.echo(f"{model} is dense: its weights are fetched, where its zeros are counted.", err=True)
            yield fetch_model(model, revision, token)


def _check_page(html: Path) -> None:
    """Refuse a name that a page should not have, before anything is read."""
    if html.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--html {html}: the name of the page must end in .html.")
    if html.is_dir():
        raise IsADirectoryError(f"--html {html} is a folder: name a file.")
    if not html.parent.is_dir():
        raise FileNotFoundError(f"--html {html}: {html.parent} is no folder.")


def _write_page(path: Path, html: Path, name: str | None) -> None:
    from hf_sparse.hub.html import render_report

    # Rendered before the file is opened: a damaged model leaves an earlier page whole.
    text = render_report(path, name)
    html.write_text(text, encoding="utf-8")
    typer.echo(f"{html}: {len(text.encode()):,} bytes, opens in any browser.", err=True)

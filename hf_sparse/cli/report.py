"""`hf-sparse report`: how sparse a model is and what it weighs."""

from __future__ import annotations

import typer

from hf_sparse.cli.support import Debug, Json, ModelFolder, check_model_folder, guarded, print_json


@guarded
def report(path: ModelFolder, as_json: Json = False, debug: Debug = False) -> None:
    """Tell how sparse a model is and what it weighs, layer by layer."""
    check_model_folder(path)
    from hf_sparse.core.report import report as report_folder

    found = report_folder(path)
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(str(found))

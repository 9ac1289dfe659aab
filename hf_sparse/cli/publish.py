"""`hf-sparse card` and `push`: the model card rendered again from its facts, and a folder published on the Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_sparse.cli.support import Debug, Force, Json, ModelFolder, Token, check_model_folder, guarded, print_json


@guarded
def card(path: ModelFolder, force: Force = False, as_json: Json = False, debug: Debug = False) -> None:
    """Render README.md again from the facts recorded in the model folder."""
    check_model_folder(path)
    from hf_sparse.hub.card import facts_from_folder, write_card

    try:
        written = write_card(path, facts_from_folder(path), keep_edited=not force)
    except FileExistsError as error:
        raise FileExistsError(f"{error} Overwrite it with --force.") from error
    if as_json:
        print_json({"path": str(written)})
    else:
        typer.echo(f"{written} is rendered.")


@guarded
def push(
    path: ModelFolder,
    repo: Annotated[str, typer.Argument(help="Repository on the Hub: namespace/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if missing.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of pushing.")] = False,
    token: Token = None,
    message: Annotated[str | None, typer.Option(help="Title of the commit or pull request.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Publish a model folder on the Hub: weights, tokenizer, card, but no state of training."""
    check_model_folder(path)
    from hf_sparse.hub.push import push_folder

    url = push_folder(
        path, repo, private=private, revision=revision, create_pr=create_pr, token=token, message=message
    )
    if as_json:
        print_json({"url": url})
    else:
        typer.echo(url)

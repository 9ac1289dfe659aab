"""A model folder published on the Hub: checked before, whole after, explained when it is refused."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from hf_sparse.core.report import report

# State of a training run, of no use to who loads the model; training_args.bin is a pickle besides. Folders that begin
# with "_" are left out by `Trainer.push_to_hub`, too: the example scripts keep their dense model in one.
TRAINING_STATE = (
    "checkpoint-*/**",
    "_*/**",
    ".saving-*/**",
    ".saved-*/**",
    "training_args.bin",
    "optimizer.*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "trainer_state.json",
    "sparsity_state.safetensors",
)

# What an earlier push left under other names would be loaded in place of the new weights.
WEIGHT_FILES = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "pytorch_model.bin.index.json",
)

# Seconds to wait before a step of the push is tried again. The client adds tries of its own to some of them.
WAITS = (1.0, 4.0, 15.0)

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class PushError(RuntimeError):
    """The Hub could not be reached or refused. The message says why and the way out; local files are as they were."""


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Publish a model folder: weights, tokenizer, card and everything else in it but the state of training.

    Weight files that an earlier push left in the repository and that this folder does not have are removed from it.
    Where the connection breaks or the Hub stumbles, the push goes on from there a few times before it gives up.

    Args:
        folder: a folder saved by `save_pretrained` or by the trainer, compressed or dense.
        repo_id: "namespace/name"; a bare name goes to the namespace of the token.
        private: create the repository as a private one.
        revision: branch to push to, made if missing; None is the main branch.
        create_pr: open a pull request instead of pushing; the repository has to exist.
        token: access token; None takes HF_TOKEN or the one that `hf auth login` stored.
        message: title of the commit or pull request.

    Returns:
        Address of the repository, branch or pull request.

    Raises:
        FileNotFoundError: if the folder is not that of a model.
        FormatError: if the folder is a damaged one.
        ValueError: if there is no token, for `create_pr` together with `revision` or a bare name, and for `private`
            where the repository exists and is public.
        PushError: if the Hub cannot be reached or refuses.
    """
    report(folder)
    token = token or get_token()
    if token is None:
        raise ValueError(
            "There is no access token for the Hub: run `hf auth login`, or set HF_TOKEN, or pass a token."
        )
    if create_pr and (revision is not None or "/" not in repo_id):
        raise ValueError(
            f"create_pr opens a pull request against the main branch of an existing repository: leave revision "
            f"({revision!r}) out and name the repository in full ({repo_id!r} must be namespace/name)."
        )
    api = HfApi(token=token)
    with explained(repo_id):
        return _push(api, Path(folder), repo_id, private, revision, create_pr, message)


@contextlib.contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Turn what the Hub's client raises inside the block into a `PushError` that says why and the way out.

    Args:
        repo_id: what is being pushed to.
    """
    endpoint = constants.ENDPOINT
    try:
        yield
    except PushError:
        raise
    except (HTTPError, OSError, RuntimeError) as error:
        cause = _cause(error)
        if isinstance(cause, HfHubHTTPError):
            raise PushError(_explain(cause, endpoint, repo_id)) from error
        if not _is_of_the_connection(cause):
            raise
        raise PushError(
            f"{endpoint} could not be reached, or the connection broke ({cause or type(cause).__name__}). "
            f"Local files are untouched: push again."
        ) from error


def _push(
    api: HfApi, folder: Path, repo_id: str, private: bool, revision: str | None, create_pr: bool, message: str | None
) -> str:
    title = message or "Upload model with hf_sparse"
    address = f"{api.endpoint}/{repo_id}"
    if create_pr:
        # Opened here and not by the upload, which could open a second one when it is tried again.
        request = api.create_pull_request(repo_id, title=title)
        revision, address = request.git_reference, request.url
    else:
        repo_id = persistently(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True)).repo_id
        # The Hub ignores `private` for a repository that exists already.
        if private and not persistently(lambda: api.repo_info(repo_id)).private:
            raise ValueError(
                f"{repo_id} exists and is public: make it private in its settings, or push to another name."
            )
        address = f"{api.endpoint}/{repo_id}"
        if revision is not None:
            branch, address = revision, f"{address}/tree/{revision}"
            persistently(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
    persistently(
        lambda: api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=title,
            ignore_patterns=list(TRAINING_STATE),
            delete_patterns=list(WEIGHT_FILES),
        )
    )
    return address


def persistently(step: Callable[[], _T]) -> _T:
    """Do a step that may be done twice, again after a wait where it may succeed then."""
    for wait in WAITS:
        try:
            return step()
        except (HTTPError, OSError, RuntimeError) as error:
            reason = _cause(error)
            status = reason.response.status_code if isinstance(reason, HfHubHTTPError) else 503
            if (status < 500 and status != 429) or not _is_of_the_connection(reason):
                raise
        logger.warning("%s; trying again in %g seconds.", str(reason).splitlines()[0] if str(reason) else reason, wait)
        time.sleep(wait)
    return step()


def _cause(error: Exception) -> Exception:
    """Unwrap what the client puts around an error of one of its uploading threads."""
    return error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error


def _is_of_the_connection(error: Exception) -> bool:
    # The uploader of large files, which is not written in Python, has RuntimeErrors only.
    return isinstance(error, HTTPError | ConnectionError | TimeoutError | RuntimeError)


def _explain(error: HfHubHTTPError, endpoint: str, repo_id: str) -> str:
    status = error.response.status_code
    said = error.server_message or f"status {status}"
    reasons = {
        401: "the token is not valid there: run `hf auth login`, or pass another one.",
        403: "the token may not write there: use one with write access to that namespace.",
        404: "there is no such repository or revision.",
        413: "it is too large for this repository.",
        429: "too many requests: wait and push again.",
    }
    fallback = "the Hub has trouble: push again later." if status >= 500 else "the request was refused."
    return f"{endpoint} refused to take {repo_id} ({said}): {reasons.get(status, fallback)} Local files are untouched."

"""A model of the Hub brought here to be looked at: its config, weights and recorded facts, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from hf_sparse.hub.facts import FACTS_FILE

# No pickles: a report opens safetensors alone.
LOOKED_AT = ("config.json", "model*.safetensors", "model.safetensors.index.json", FACTS_FILE)


class FetchError(RuntimeError):
    """A model could not be brought here from the Hub. The message says why and the way out."""


class _Bar(tqdm):
    """A progress bar of the Hub's client, whose count of files is else shown also where nobody watches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # What tqdm takes for "unless this is a terminal".
        kwargs.setdefault("disable", None)
        super().__init__(*args, **kwargs)


def fetch_model(repo_id: str, revision: str | None = None, token: str | None = None, weights: bool = True) -> Path:
    """Download what a report looks at, or take it from the cache.

    Args:
        repo_id: "namespace/name".
        revision: branch, tag or commit; None is the main branch.
        token: access token; None takes HF_TOKEN or the one that `hf auth login` stored, where there is one.
        weights: False leaves the weights out.

    Returns:
        The folder in the cache that holds the files.

    Raises:
        FetchError: if the Hub cannot be reached, or has no such repository or revision for this token.
    """
    api = HfApi(token=token)
    wanted = [name for name in LOOKED_AT if weights or not name.endswith(".safetensors")]
    try:
        return Path(api.snapshot_download(repo_id, revision=revision, allow_patterns=wanted, tqdm_class=_Bar))
    except GatedRepoError as error:
        why = f"access to {repo_id} has to be asked for on its page."
        raise FetchError(f"{constants.ENDPOINT}: {why}") from error
    except RevisionNotFoundError as error:
        raise FetchError(f"{constants.ENDPOINT}: {repo_id} has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise FetchError(
            f"{repo_id} is no folder here, and {constants.ENDPOINT} has no such repository, or it is a private one: "
            f"then run `hf auth login`, or set HF_TOKEN."
        ) from error
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FetchError(
            f"{repo_id} is no folder here, and could not be fetched from {constants.ENDPOINT}: {reason}"
        ) from error

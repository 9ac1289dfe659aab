"""What a report needs of a compressed model on the Hub: headers and bitmaps, by ranges of bytes, and no weights.

A stand-in of each weights file is put down that has its size, its header and its bitmaps; the rest of it is a hole,
which takes no room on a disk. Whatever reads headers and bitmaps of a folder reads those of the Hub like that.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from hf_sparse.core.stored.packing import QUANT_METHOD, FormatError, LayerFormat, read_layer_formats
from hf_sparse.core.stored.reading import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, read_config, shard_names, weight_files
from hf_sparse.hub.fetch import LOOKED_AT, FetchError, fetch_model
from hf_sparse.hub.push import persistently

# One answer brings the header of most models; a longer one takes a second.
FIRST_BYTES = 2**16
# As the safetensors library has it.
MAX_HEADER_BYTES = 100_000_000
# Two ranges that lie closer than this are asked for as one.
_GAP = 2**12


def fetch_headers(repo_id: str, folder: Path, revision: str | None = None, token: str | None = None) -> Path | None:
    """Bring headers, bitmaps, config and recorded facts of a compressed model into a folder.

    Args:
        repo_id: "namespace/name".
        folder: an existing folder, to bring them to.
        revision: branch, tag or commit; None is the main branch.
        token: access token; None takes HF_TOKEN or the one that `hf auth login` stored, where there is one.

    Returns:
        The folder to look at: the given one, or where the model is in the cache, the one there. None where the model
        is dense: only its weights tell where its zeros are.

    Raises:
        FetchError: if the Hub cannot be reached, has no such repository or revision for this token, or serves no parts
            of files.
        FormatError: if config.json or the index is damaged.
    """
    snapshot = fetch_model(repo_id, revision, token, weights=False)
    quantization = read_config(snapshot).get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        return None
    if constants.HF_HUB_OFFLINE:
        return fetch_model(repo_id, revision, token)
    try:
        formats = read_layer_formats(quantization)
    except FormatError as error:
        raise FormatError(f"{repo_id}: {CONFIG_FILE}: {error}") from error
    with contextlib.suppress(FileNotFoundError):
        weight_files(snapshot)
        # Somebody has loaded this very commit before.
        return snapshot
    for name in LOOKED_AT:
        if (snapshot / name).is_file():
            shutil.copyfile(snapshot / name, folder / name)
    # The snapshot is named after its commit: whatever is pushed meanwhile, all files are of that one.
    remote = _Remote(repo_id, snapshot.name, token)
    if not remote.bring(SINGLE_FILE, folder, formats) and (folder / INDEX_FILE).is_file():
        for name in shard_names(folder / INDEX_FILE):
            remote.bring(name, folder, formats)
    return folder


class _Remote:
    """The files of one commit."""

    def __init__(self, repo_id: str, commit: str, token: str | None) -> None:
        self.repo_id, self.commit = repo_id, commit
        self.headers = build_hf_headers(token=token)

    def bring(self, name: str, folder: Path, formats: Mapping[str, LayerFormat]) -> bool:
        """Put down the stand-in of a file; False where the repository has no such file."""
        try:
            start, size = self._read(name, 0, FIRST_BYTES)
            end = 8 + int.from_bytes(start[:8], "little")
            if len(start) < end <= min(size, 8 + MAX_HEADER_BYTES):
                start += self._read(name, len(start), end)[0]
            with (folder / name).open("wb") as file:
                # What is wrong with a header is said by what reads it.
                file.truncate(size)
                file.write(start[:end])
                for first, last in _ranges(start[8:end], formats):
                    file.seek(end + first)
                    file.write(self._read(name, end + first, end + last)[0])
        except EntryNotFoundError:
            return False
        except (HfHubHTTPError, HTTPError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise FetchError(f"{self.repo_id}: {name} could not be looked at: {reason}") from error
        return True

    def _read(self, name: str, first: int, end: int) -> tuple[bytes, int]:
        """Read the bytes from `first` up to `end`, and tell how many there are in the whole file."""
        return persistently(lambda: self._ask(name, first, end))

    def _ask(self, name: str, first: int, end: int) -> tuple[bytes, int]:
        url = hf_hub_url(self.repo_id, name, revision=self.commit)
        headers = {**self.headers, "Range": f"bytes={first}-{end - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            # An answer of another kind is the whole file, which nobody asked for.
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            if response.status_code != 206 or not total.isdecimal():
                raise FetchError(f"{url} serves no parts of files: download the model and report its folder.")
            data = b""
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > end - first:
                    raise FetchError(f"{url} answered with more bytes than it was asked for.")
        return data, int(total)


def _ranges(header: bytes, formats: Mapping[str, LayerFormat]) -> Iterable[tuple[int, int]]:
    """Give the ranges of the data of a file in which the bitmaps lie, those of neighbours as one."""
    try:
        tensors: Any = json.loads(header)
        places = sorted(_places(tensors, formats))
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return []
    ranges: list[tuple[int, int]] = []
    for first, last in places:
        if ranges and first - ranges[-1][1] <= _GAP:
            ranges[-1] = (ranges[-1][0], max(last, ranges[-1][1]))
        else:
            ranges.append((first, last))
    return ranges


def _places(tensors: Any, formats: Mapping[str, LayerFormat]) -> Iterable[tuple[int, int]]:
    for name, layer in formats.items():
        if (entry := tensors.get(layer.mask_key(name))) is not None:
            first, last = entry["data_offsets"]
            # One of another size is damage, and is found to be when the header is read.
            if 0 <= first and last - first == layer.mask_bytes:
                yield first, last

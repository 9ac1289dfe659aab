"""The files of a model folder, opened with suspicion: JSON objects, safetensors files, and the list of them.

Whatever is wrong with a file comes out as one of two errors that name it: `FormatError` or `FileNotFoundError`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_sparse.core.stored.packing import FormatError, shortened

CONFIG_FILE = "config.json"
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def read_object(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        FileNotFoundError: if there is no such file.
        FormatError: if it is no JSON, or nested deeper than Python can read, or holds something else.
    """
    raw = Path(file).read_bytes()
    try:
        data = json.loads(raw.decode("utf-8"))
        if _HALF_CHARACTER.search(raw):
            # JSON can name half a character; no file and no terminal takes one.
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise FormatError(f"{file} must hold an object, found a {type(data).__name__}.")
    return data


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the config.json of a model folder.

    Raises:
        FileNotFoundError, FormatError: as `read_object`.
    """
    file = Path(folder) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}: expected the folder of a saved model.")
    return read_object(file)


def open_file(file: str | os.PathLike[str]) -> Any:
    """Open a safetensors file; what is read through it stays mapped until it is closed or forgotten.

    Raises:
        FileNotFoundError: if there is no such file.
        FormatError: if it is not a whole safetensors file.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _explained(file, error) from error


@contextmanager
def opened(file: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a safetensors file for a while, as `open_file` does; raises the same, also where it breaks while read."""
    with open_file(file) as handle:
        try:
            yield handle
        except SafetensorError as error:
            raise _explained(file, error) from error


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """List the weights files that `from_pretrained` reads: the single one, or the shards that the index names.

    Raises:
        FileNotFoundError: if there is none, or a shard is missing.
        FormatError: if the index is no index, or names a file outside the folder.
    """
    folder = Path(folder)
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {SINGLE_FILE} and no {INDEX_FILE}. Other files are not opened: "
            f"load the model with transformers and save it once."
        )
    names = shard_names(index)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {missing[0]}, which its {INDEX_FILE} names.")
    return [folder / name for name in names]


def shard_names(index: Path) -> list[str]:
    """List the files that an index names, sorted.

    Raises:
        FormatError: if it is no index, or names anything but a file beside it.
    """
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise FormatError(f"{index} is no index of weights: weight_map must tell in which file each tensor lies.")
    for name in places.values():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise FormatError(f"{index} names {name!r}, which is no safetensors file of this folder.")
    return sorted(set(places.values()))


def _is_plain_name(name: str) -> bool:
    # Not printable are, among others, null bytes and halves of characters, which no system takes in a name.
    plain = Path(name).name == name and name.isprintable() and len(name.encode()) <= 255
    return plain and name.endswith(".safetensors")


def _explained(file: str | os.PathLike[str], error: Exception) -> Exception:
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(shortened(f"{file} is missing."))
    return FormatError(f"{file} is not a whole safetensors file: {error}")

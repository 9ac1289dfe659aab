"""The files of a compressed model, checked: every tensor is there, with the shape, dtype and bits it should have.

All of it happens on headers and bitmaps, before a weight is allocated. Nothing here trusts a file.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_sparse.core.stored.formats import MASK_SUFFIX, FormatError, LayerFormat
from hf_sparse.core.stored.reading import open_file

VERSION_KEY = "hf_sparse_format_version"
CHECKSUM_KEY = "hf_sparse_masks_crc32"

_MASK_KEY = ".weight" + MASK_SUFFIX
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a file says of one tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Headers:
    """What the headers of all files say, and the bitmaps.

    Attributes:
        tensors: {tensor name: StoredTensor}.
        checksums: {file: checksum of the bitmaps}, for the files that hold one.
        bitmaps: {tensor name: uint8, any shape}, mapped from the files.
        files: {file: the open file}.
    """

    tensors: dict[str, StoredTensor]
    checksums: dict[str, str]
    bitmaps: dict[str, Tensor]
    files: dict[str, Any]


def header_strings(bitmaps: dict[str, Tensor], version: int = 1) -> dict[str, str]:
    """Give what a writer adds to the header of each weights file.

    Args:
        bitmaps: {name of the bitmap tensor: uint8}.
        version: format version of the model.
    """
    strings = {VERSION_KEY: str(version)}
    # Layers that are offloaded while the model is saved have no bits at hand; the checksum is optional.
    if not any(bitmap.is_meta for bitmap in bitmaps.values()):
        strings[CHECKSUM_KEY] = _checksum({key: bits.cpu().numpy().tobytes() for key, bits in bitmaps.items()})
    return strings


def read_headers(files: Iterable[str] | None, version: int = 1) -> Headers:
    """Read the headers of safetensors files and the bitmaps in them.

    Args:
        files: paths of all files of the model.
        version: format version that config.json names.

    Raises:
        FileNotFoundError: if one is missing.
        FormatError: if there is no file, one is not a whole safetensors file or of another version, or two hold the
            same tensor.
    """
    if not files:
        raise FormatError(
            "a compressed model is loaded from its safetensors files, and none were given. "
            "For a state_dict in memory use model.load_state_dict on a model that is compressed already."
        )
    headers = Headers({}, {}, {}, {})
    for file in map(str, files):
        if not file.endswith(".safetensors"):
            raise FormatError(f"{file}: a compressed model is stored as safetensors; other files are not opened.")
        _read_header(file, headers, str(version))
    return headers


def _read_header(file: str, headers: Headers, expected: str) -> None:
    handle = headers.files[file] = open_file(file)
    metadata = handle.metadata() or {}
    version = metadata.get(VERSION_KEY, expected)
    if version != expected:
        raise FormatError(f"{file}: its header says {VERSION_KEY}={version!r}, config.json says {expected}.")
    if CHECKSUM_KEY in metadata:
        headers.checksums[file] = metadata[CHECKSUM_KEY]
    for key in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
        if key in headers.tensors:
            raise FormatError(f"{key} is stored twice, in {headers.tensors[key].file} and in {file}.")
        view = handle.get_slice(key)
        found = headers.tensors[key] = StoredTensor(file, tuple(view.get_shape()), view.get_dtype())
        if key.endswith(MASK_SUFFIX) and found.dtype == "U8":
            headers.bitmaps[key] = handle.get_tensor(key)


def check_places(folder: str | os.PathLike[str], files: Iterable[str] | None) -> None:
    """Check that all files lie in the folder of the model: transformers goes wherever an index says.

    Args:
        folder: the folder, or a repository id, whose files lie in the cache.
        files: paths as transformers found them; none are opened.

    Raises:
        FormatError: if one lies elsewhere.
    """
    top = os.path.abspath(folder) + os.sep if os.path.isdir(folder) else ""
    for file in map(str, files or ()):
        if os.pardir in re.split(r"[/\\]", file) or not os.path.abspath(file).startswith(top):
            raise FormatError(f"{file} lies outside of the folder of the model, {folder}: it is not opened.")


def check_bitmaps(headers: Headers, formats: dict[str, LayerFormat]) -> None:
    """Check the values and the bitmap of every compressed layer against what config.json says of them.

    Raises:
        FormatError: if a tensor is missing, has another shape or dtype, or a bitmap has other bits than it should.
    """
    bitmaps = {}
    for name, layer in formats.items():
        _check_tensor(headers, layer.weight_key(name), layer.values_shape, FLOATS)
        key = layer.mask_key(name)
        found = _check_tensor(headers, key, (layer.mask_bytes,), ("U8",))
        bitmaps[key] = headers.bitmaps[key].numpy().tobytes()
        # One big integer per bitmap: counting its bits takes microseconds, and there may be hundreds of bitmaps.
        bits = int.from_bytes(bitmaps[key], "little")
        if bits.bit_length() > layer.num_blocks:
            raise FormatError(
                f"{found.file}: {key}: the bitmap sets bits beyond the {layer.num_blocks} blocks of its "
                f"{layer.grid[0]} x {layer.grid[1]} grid."
            )
        population = bits.bit_count()
        if population != layer.kept:
            raise FormatError(f"{found.file}: {key} keeps {population} blocks, config.json says {layer.kept}.")
    for key in headers.tensors:
        weight = key.removesuffix(MASK_SUFFIX)
        # Other tensors may be named like a bitmap; one of a linear, or beside its values, is nothing else.
        if key != weight and key not in bitmaps and (key.endswith(_MASK_KEY) or weight in headers.tensors):
            raise FormatError(
                f"{headers.tensors[key].file} holds {key}, but config.json does not list the layer "
                f"{weight.removesuffix('.weight')!r} in quantization_config['modules']."
            )
    found_checksum = _checksum(bitmaps) if headers.checksums else ""
    for file, checksum in headers.checksums.items():
        if checksum != found_checksum:
            raise FormatError(
                f"{file}: the bitmaps have the checksum {found_checksum}, its header says {checksum}. "
                f"The file is damaged: get it again."
            )


def _check_tensor(headers: Headers, key: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> StoredTensor:
    found = headers.tensors.get(key)
    if found is None:
        files = sorted({tensor.file for tensor in headers.tensors.values()})
        raise FormatError(f"{key} is in none of the files: {', '.join(files)}.")
    if found.shape != shape or found.dtype not in dtypes:
        raise FormatError(
            f"{found.file}: {key} should be {' or '.join(dtypes)} of shape {list(shape)}, found {found.dtype} "
            f"of shape {list(found.shape)}."
        )
    return found


def _checksum(bitmaps: dict[str, bytes]) -> str:
    value = 0
    for name in sorted(bitmaps):
        value = zlib.crc32(bitmaps[name], zlib.crc32(name.encode(), value))
    return f"{value:08x}"

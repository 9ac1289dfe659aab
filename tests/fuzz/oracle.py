"""Formats 1 and 2 read a second time, from docs/format.md alone: what a folder says, in plain Python.

The fuzz holds whatever the library loads against this. It shares no line with the library and needs neither torch nor
safetensors, so that a mistake of theirs is not made twice.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2,
         "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
MASK = "_block_mask"


@dataclass(frozen=True)
class Plain:
    """A tensor as bytes: dtype of the file, shape, row-major values."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class NotReadable(Exception):
    """By the letter of docs/format.md this is no checkpoint of versions 1 and 2."""


def read_dense(folder: Path) -> dict[str, Plain]:
    """Read every tensor of a folder, compressed layers as dense weights.

    Raises:
        NotReadable: if it is no checkpoint.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors: dict[str, Plain] = {}
        for file in _files(folder):
            for name, tensor in read_file(file).items():
                _need(name not in tensors)
                tensors[name] = tensor
        quantization = config["quantization_config"]
        version = quantization["format_version"]
        _need(quantization["quant_method"] == "hf_sparse" and version in (1, 2))
        for name, entry in quantization["modules"].items():
            _need(len(entry["dense_shape"]) == 2 or version == 2)
            key = name if len(entry["dense_shape"]) == 3 else name + ".weight"
            tensors[key] = _unpack(tensors[key], tensors.pop(key + MASK), entry)
        _need(not any(name.endswith(".weight" + MASK) for name in tensors))
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OSError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise NotReadable(f"{type(error).__name__}: {error}") from error
    return tensors


def read_file(file: Path) -> dict[str, Plain]:
    """Read a safetensors file."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    _need(len(raw) >= 8 + length)
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        _need(0 <= start <= end <= len(data) and end - start == math.prod(shape) * SIZES[entry["dtype"]])
        tensors[name] = Plain(entry["dtype"], shape, data[start:end])
    return tensors


def _files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    names = sorted(set(index["weight_map"].values()))
    _need(not any("/" in name for name in names))
    return [folder / name for name in names]


def _unpack(values: Plain, bitmap: Plain, entry: dict[str, Any]) -> Plain:
    (height, width), (*experts, rows, columns) = entry["block_shape"], entry["dense_shape"]
    size = SIZES[values.dtype]
    _need(rows % height == 0 and (not experts or ("transposed" not in entry and experts[0] > 0)))
    rows *= math.prod(experts)
    _need(columns % width == 0 and rows * columns <= 2**24)
    bands, per_band = rows // height, columns // width
    _need(values.shape == (entry["kept"], height, width) and bitmap.dtype == "U8")
    _need(len(bitmap.data) == (bands * per_band + 7) // 8)
    dense = bytearray(rows * columns * size)
    taken = 0
    for block in range(8 * len(bitmap.data)):
        if not bitmap.data[block // 8] >> block % 8 & 1:
            continue
        _need(block < bands * per_band)
        band, place = divmod(block, per_band)
        for row in range(height):
            start = (taken * height + row) * width * size
            at = ((band * height + row) * columns + place * width) * size
            dense[at : at + width * size] = values.data[start : start + width * size]
        taken += 1
    _need(taken == entry["kept"])
    return Plain(values.dtype, tuple(entry["dense_shape"]), bytes(dense))


def _need(condition: bool) -> None:
    if not condition:
        raise ValueError("not format 1")

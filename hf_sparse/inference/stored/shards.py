"""Weights files read and written a tensor at a time, so that none is ever held in memory as a whole.

The safetensors library writes whole files, and maps what it opens: a file stays in memory as far as it was read. Here
a file is checked by the library, and its bytes then go through a buffer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from hf_sparse.core.stored.packing import FormatError
from hf_sparse.core.stored.reading import opened

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
_ALIGNMENT = 8
_CHUNK = 2**22


@dataclass(frozen=True)
class RawTensor:
    """Where the bytes of a stored tensor lie.

    Attributes:
        file: the safetensors file.
        dtype: as in its header, such as "BF16".
        shape: dimensions.
        start, size: position in the file and number of bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def item_bytes(self) -> int:
        """Bytes of one value of a weight; raises as `read` does."""
        if self.dtype not in DTYPES:
            raise FormatError(f"{self.file}: a weight of dtype {self.dtype}; expected one of {sorted(DTYPES)}.")
        return DTYPES[self.dtype].itemsize

    def read(self) -> Tensor:
        """Read the tensor into memory of its own.

        Raises:
            FormatError: for a dtype that no weight of a linear has.
        """
        if self.size != math.prod(self.shape) * self.item_bytes:
            raise FormatError(f"{self.file}: a tensor of shape {list(self.shape)} in {self.size} bytes.")
        data = bytearray(self.size)
        with self.file.open("rb") as source:
            source.seek(self.start)
            source.readinto(data)
        dtype = DTYPES[self.dtype]
        return torch.frombuffer(data, dtype=dtype).view(self.shape) if data else torch.empty(self.shape, dtype=dtype)

    def copy_to(self, target: BinaryIO, advance: Callable[[int], None]) -> None:
        """Copy the bytes, whatever their dtype, through a small buffer."""
        left = self.size
        with self.file.open("rb") as source:
            source.seek(self.start)
            while left:
                chunk = source.read(min(_CHUNK, left))
                if not chunk:
                    raise FormatError(f"{self.file} ended while it was read: something else is writing to it.")
                target.write(chunk)
                advance(len(chunk))
                left -= len(chunk)


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write: its header entry, and what writes its bytes.

    Attributes:
        dtype, shape, size: as in `RawTensor`.
        write: called with the open file; has to write that many bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    size: int
    write: Callable[[BinaryIO], None]


def read_layout(file: Path) -> tuple[dict[str, RawTensor], dict[str, str]]:
    """Tell where the tensors of a file lie, and what strings its header carries.

    Raises:
        FormatError: if it is not a whole safetensors file.
    """
    # The library checks sizes, offsets and the end of the file.
    with opened(file):
        pass
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        header = json.loads(source.read(length))
    strings = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        tensors[name] = RawTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + first, last - first)
    return tensors, strings


def write_file(file: Path, tensors: Mapping[str, NewTensor], strings: Mapping[str, str]) -> None:
    """Write a safetensors file, one tensor after the other.

    Args:
        file: to write.
        tensors: {name: tensor}; written in the order of the safetensors library: wide dtypes first, then by name.
        strings: for the header.

    Raises:
        RuntimeError: if a tensor writes more or fewer bytes than announced.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-_width(item[1]), item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **strings}}
    at = 0
    for name, tensor in ordered:
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + tensor.size]}
        at += tensor.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in ordered:
            before = target.tell()
            tensor.write(target)
            if (written := target.tell() - before) != tensor.size:
                raise RuntimeError(f"{file}: {name} took {written} bytes instead of {tensor.size}.")


def write_bytes(tensor: Tensor, target: BinaryIO) -> None:
    """Write the values of a tensor, row-major."""
    target.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def write_index(folder: Path, files: Mapping[str, Iterable[str]], total: int) -> None:
    """Write the index of a model in several files, as transformers names and reads it.

    Args:
        folder: of the model.
        files: {file: names of its tensors}.
        total: bytes of all tensors.
    """
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _width(tensor: NewTensor) -> int:
    # "F32", "BF16", "F8_E4M3"; BOOL alone has no number.
    bits = re.search(r"\d+", tensor.dtype)
    return int(bits[0]) if bits else 8

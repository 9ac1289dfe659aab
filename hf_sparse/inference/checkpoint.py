"""The files of a compressed model, checked: every tensor is there, with the shape, dtype and bits it should have.

All of it happens on headers and bitmaps, before a weight is allocated. Nothing here trusts a file.
"""

from __future__ import annotations

import os
import re
import zlib
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_sparse.core.packing import FORMAT_VERSION, MASK_SUFFIX, FormatError, LayerFormat
from hf_sparse.core.reading import open_file
from hf_sparse.core.targets import find_stacks, is_conv1d, is_linear, weight_view

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


@dataclass(frozen=True)
class Matches:
    """What of a checkpoint belongs where in a model.

    Attributes:
        layers: {name in the checkpoint: name in the model} of the compressed layers; without those of a head that this
            class does not have.
        tensors: {name in the checkpoint: name in the model} of all tensors but the bitmaps.
        expected: names in the model of all tensors that a dense checkpoint of it has.
        modules: {name in the model: module}, dense.
    """

    layers: dict[str, str]
    tensors: dict[str, str]
    expected: frozenset[str]
    modules: dict[str, nn.Module]


def header_strings(bitmaps: dict[str, Tensor]) -> dict[str, str]:
    """Give what a writer adds to the header of each weights file.

    Args:
        bitmaps: {name of the bitmap tensor: uint8}.
    """
    strings = {VERSION_KEY: str(FORMAT_VERSION)}
    # Layers that are offloaded while the model is saved have no bits at hand; the checksum is optional.
    if not any(bitmap.is_meta for bitmap in bitmaps.values()):
        strings[CHECKSUM_KEY] = _checksum({key: bits.cpu().numpy().tobytes() for key, bits in bitmaps.items()})
    return strings


def read_headers(files: Iterable[str] | None) -> Headers:
    """Read the headers of safetensors files and the bitmaps in them.

    Raises:
        FileNotFoundError: if one is missing.
        FormatError: if there is no file, one is not a whole safetensors file or of a newer version, or two hold the
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
        _read_header(file, headers)
    return headers


def _read_header(file: str, headers: Headers) -> None:
    handle = headers.files[file] = open_file(file)
    metadata = handle.metadata() or {}
    version = metadata.get(VERSION_KEY, str(FORMAT_VERSION))
    if version != str(FORMAT_VERSION):
        raise FormatError(f"{file}: its header says {VERSION_KEY}={version!r}, config.json says {FORMAT_VERSION}.")
    if CHECKSUM_KEY in metadata:
        headers.checksums[file] = metadata[CHECKSUM_KEY]
    for key in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
        if key in headers.tensors:
            raise FormatError(f"{key} is stored twice, in {headers.tensors[key].file} and in {file}.")
        view = handle.get_slice(key)
        found = headers.tensors[key] = StoredTensor(file, tuple(view.get_shape()), view.get_dtype())
        if key.endswith(_MASK_KEY) and found.dtype == "U8":
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
        _check_tensor(headers, name + ".weight", layer.values_shape, FLOATS)
        key = name + _MASK_KEY
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
        if key.endswith(_MASK_KEY) and key not in bitmaps:
            raise FormatError(
                f"{headers.tensors[key].file} holds {key}, but config.json does not list the layer "
                f"{key.removesuffix(_MASK_KEY)!r} in quantization_config['modules']."
            )
    found_checksum = _checksum(bitmaps) if headers.checksums else ""
    for file, checksum in headers.checksums.items():
        if checksum != found_checksum:
            raise FormatError(
                f"{file}: the bitmaps have the checksum {found_checksum}, its header says {checksum}. "
                f"The file is damaged: get it again."
            )


def match_modules(model: Any, headers: Headers, formats: dict[str, LayerFormat]) -> Matches:
    """Find the compressed layers in a model and check them and their neighbours against it.

    A checkpoint of a model with a head and one of the bare model differ by the prefix `model.base_model_prefix`; both
    load into both, as always in transformers.

    Args:
        model: a `PreTrainedModel` on the meta device, dense.
        headers: of its checkpoint.
        formats: {name in the checkpoint: geometry}.

    Raises:
        FormatError: if a layer is missing in the model or is no linear of that shape there, or if a tensor beside the
            compressed layers is missing in the checkpoint or has another shape.
    """
    state, modules = model.state_dict(keep_vars=True), dict(model.named_modules())
    local_names = _local_names(model, headers, state)
    matched = {}
    for name, layer in formats.items():
        local = local_names.get(name + ".weight", "").removesuffix(".weight")
        if not local:
            if _may_be_absent(model, headers, name):
                continue
            raise FormatError(
                f"config.json lists the compressed layer {name!r}, which {type(model).__name__} as configured lacks."
            )
        _check_linear(modules[local], name, layer)
        matched[name] = local
    names = Counter(local_names.values())
    for local in matched.values():
        if names[local + ".weight"] > 1:
            twice = [key for key, found in local_names.items() if found == local + ".weight"]
            raise FormatError(f"the checkpoint holds {local}.weight twice, as {' and as '.join(twice)}.")
    _check_neighbours(model, headers, state, local_names, set(matched.values()))
    return Matches(matched, local_names, frozenset(state), modules)


def _check_linear(module: Any, name: str, layer: LayerFormat) -> None:
    if not is_linear(module):
        raise FormatError(f"config.json lists the compressed layer {name!r}, which is a {type(module).__name__} here.")
    shape, transposed = tuple(weight_view(module).shape), is_conv1d(module)
    if (shape, transposed) != (layer.dense_shape, layer.transposed):
        raise FormatError(
            f"{name}: config.json says dense_shape {list(layer.dense_shape)} and transposed={int(layer.transposed)}, "
            f"the model has {list(shape)} and transposed={int(transposed)}."
        )


def _check_neighbours(
    model: Any, headers: Headers, state: dict[str, Tensor], local_names: dict[str, str], compressed: set[str]
) -> None:
    # What transformers does not find it fills with noise, and only warns. That is meant for new heads; a layer that
    # lost a tensor beside a compressed one is damage, and so is any loss where the class is that of the checkpoint.
    stored = {local: headers.tensors[key] for key, local in local_names.items()}
    same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    stacks = tuple(n + "." for n in find_stacks(model) if any(c.startswith(n + ".") for c in compressed))
    optional = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
    tied = set(model.all_tied_weights_keys or ())
    base = model.base_model_prefix + "." if hasattr(model, model.base_model_prefix) else ""
    for key, expected in state.items():
        found = stored.get(key)
        if found is None:
            if key in tied or any(re.search(pattern, key) for pattern in optional):
                continue
            if same_class or key.startswith(stacks):
                raise FormatError(f"the checkpoint has no tensor {key}, which {type(model).__name__} needs.")
            continue
        if expected.dtype.is_floating_point != (found.dtype in FLOATS):
            raise FormatError(f"{found.file}: {key} has dtype {found.dtype}, expected {expected.dtype}.")
        # Heads may differ in their number of labels, which from_pretrained has an option for.
        if key.removesuffix(".weight") not in compressed and key.startswith(base) and found.shape != expected.shape:
            raise FormatError(f"{found.file}: {key} has shape {list(found.shape)}, expected {list(expected.shape)}.")


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


def _local_names(model: Any, headers: Headers, names: Container[str]) -> dict[str, str]:
    prefix = model.base_model_prefix + "."
    local = {}
    for key in headers.tensors:
        # In the order of transformers: it strips a prefix where it can, then tries to add one.
        for candidate in ([key.removeprefix(prefix)] if key.startswith(prefix) else []) + [prefix + key, key]:
            if candidate in names:
                local[key] = candidate
                break
    return local


def _may_be_absent(model: Any, headers: Headers, name: str) -> bool:
    # transformers drops what belongs to the head of another class, and what a class says it does without.
    if any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ()):
        return True
    prefix = model.base_model_prefix + "."
    has_head = any(key.startswith(prefix) for key in headers.tensors)
    same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    return has_head and not same_class and not name.startswith(prefix)


def _checksum(bitmaps: dict[str, bytes]) -> str:
    value = 0
    for name in sorted(bitmaps):
        value = zlib.crc32(bitmaps[name], zlib.crc32(name.encode(), value))
    return f"{value:08x}"

"""Checks on the files of a compressed model: every tensor it promises is there, with the shape and bits it promises."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hf_sparse.core.packing import MASK_SUFFIX, FormatError, LayerFormat, unpack_mask
from hf_sparse.core.targets import is_linear, weight_view

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of one tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def read_headers(files: Iterable[str] | None) -> dict[str, StoredTensor]:
    """Read the headers of safetensors files: {tensor name: StoredTensor}.

    Raises:
        FormatError: if there is none, or one is not a whole safetensors file.
    """
    if not files:
        raise FormatError("a compressed model is loaded from safetensors files, found none (state_dict=... has none).")
    tensors: dict[str, StoredTensor] = {}
    for file in map(str, files):
        if not file.endswith(".safetensors"):
            raise FormatError(f"{file}: a compressed model is stored as safetensors, nothing else is opened.")
        try:
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                    view = handle.get_slice(key)
                    tensors[key] = StoredTensor(file, tuple(view.get_shape()), view.get_dtype())
        except SafetensorError as error:
            raise FormatError(f"{file} is not a whole safetensors file: {error}") from error
    return tensors


def match_modules(
    model: nn.Module, formats: dict[str, LayerFormat], tensors: dict[str, StoredTensor]
) -> dict[str, str]:
    """Find the layers of a checkpoint in a model: {name in the checkpoint: name in the model}."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    names = {name for name, _ in model.named_modules()}
    matched = {}
    for name in formats:
        for local in (name, name.removeprefix(prefix), prefix + name):
            if local in names:
                matched[name] = local
                break
        else:
            raise FormatError(f"quantization_config lists the layer {name!r}, which {type(model).__name__} lacks.")
    return matched


def check_tensors(
    model: nn.Module, formats: dict[str, LayerFormat], tensors: dict[str, StoredTensor], names: dict[str, str]
) -> None:
    """Check the stored tensors of every compressed layer against `formats` and against the model."""
    for name, local in names.items():
        layer, linear = formats[name], model.get_submodule(local)
        if not is_linear(linear) or tuple(weight_view(linear).shape) != layer.dense_shape:
            raise FormatError(f"{name}: expected a linear of {list(layer.dense_shape)}, the model has {linear}.")
        for key, shape, dtypes in (
            (name + ".weight", layer.values_shape, _FLOATS),
            (name + ".weight" + MASK_SUFFIX, (layer.mask_bytes,), ("U8",)),
        ):
            found = tensors.get(key)
            if found is None:
                raise FormatError(f"{key} is missing from the checkpoint.")
            if found.shape != shape or found.dtype not in dtypes:
                raise FormatError(
                    f"{found.file}: {key} should be {' or '.join(dtypes)} of shape {list(shape)}, found {found.dtype} "
                    f"of shape {list(found.shape)}."
                )
        key = name + ".weight" + MASK_SUFFIX
        with safe_open(tensors[key].file, framework="pt") as handle:
            try:
                population = int(unpack_mask(handle.get_tensor(key), layer.grid).sum(dtype=torch.int64))
            except FormatError as error:
                raise FormatError(f"{tensors[key].file}: {key}: {error}") from error
        if population != layer.kept:
            raise FormatError(f"{tensors[key].file}: {key} keeps {population} blocks, config.json says {layer.kept}.")

"""A model folder compressed or decompressed tensor by tensor: what it takes of memory is one layer, not the model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hf_sparse.core.blocks import BlockShape, to_blocks
from hf_sparse.core.stored.packing import (
    MASK_SUFFIX,
    FormatError,
    LayerFormat,
    pack,
    pack_mask,
    read_layer_formats,
    unpack,
    unpack_mask,
    version_of,
)
from hf_sparse.core.stored.reading import read_config, weight_files
from hf_sparse.core.structure.readers import refuse_read_without_call
from hf_sparse.core.structure.targets import assign_block_shapes, find_targets
from hf_sparse.inference.compress import format_of
from hf_sparse.inference.loading import BlockSparseConfig
from hf_sparse.inference.stored.checkpoint import (
    CHECKSUM_KEY,
    VERSION_KEY,
    check_bitmaps,
    header_strings,
    read_headers,
)
from hf_sparse.inference.stored.shards import (
    NewTensor,
    RawTensor,
    read_layout,
    write_bytes,
    write_file,
    write_index,
)

Advance = Callable[[int], None]
Strings = dict[str, str]


class NotStreamable(ValueError):
    """The tensors of a folder are not those of its model as it stands; the message says how they differ."""


def empty_model(folder: Path) -> Any:
    """Build the model that a config.json describes, without weights: on the meta device, in the config's dtype.

    Raises:
        NotStreamable: if the config names no class of transformers.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    names = config.architectures or []
    cls: Any = getattr(transformers, str(names[0]), None) if names else None
    # A name out of a file: nothing but a model is called.
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise NotStreamable(f"{folder}/config.json names no architecture of transformers (architectures={names})")
    with torch.device("meta"):
        model: Any = cls(config)
    return model.to(config.dtype) if isinstance(config.dtype, torch.dtype) else model


def work(source: Path, passes: int) -> int:
    """Count the bytes that converting a folder deals with, at most.

    Args:
        source: folder of a model.
        passes: 2 to compress, where weights are looked at and then written; 1 to decompress.

    Raises:
        FileNotFoundError, FormatError: as `core.stored.reading.weight_files`.
    """
    return passes * sum(file.stat().st_size for file in weight_files(source))


def compress_folder(
    source: Path,
    target: Path,
    block_shape: BlockShape,
    advance: Advance = lambda size: None,
    *,
    exclude_modules: str | None = None,
    block_overrides: Mapping[str, BlockShape] | None = None,
) -> dict[str, LayerFormat]:
    """Write a compressed copy of a dense model: weights, index and config.json. Exact.

    Args:
        source: folder of a dense model.
        target: an existing folder.
        block_shape: (h, w) of the zero blocks to look for, -1 for the whole dimension.
        advance: called with the number of bytes that were dealt with, `work(source, 2)` in all at most.
        exclude_modules, block_overrides: as for `inference.compress.compress`.

    Returns:
        {layer: geometry} of the compressed layers; empty, and nothing written, where no block is zero.

    Raises:
        NotStreamable: if the tensors have other names or shapes than the model's, as those of some old checkpoints.
        FileNotFoundError, FormatError: if the folder is not whole.
        ValueError: if a block shape does not tile its layer, a pattern matches none, a pruned linear is read by its
            module without a call, or the model is quantized.
    """
    layout = _Layout(source)
    if quantization := layout.config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(f"{source} is quantized already, with {method!r}: hf_sparse compresses plain weights.")
    formats: dict[str, LayerFormat] = {}
    bitmaps: dict[str, Tensor] = {}
    model = empty_model(source)
    _compare(model, layout)
    targets = find_targets(model, exclude_modules=exclude_modules)
    for name, shape in assign_block_shapes(targets, block_shape, block_overrides).items():
        whole = format_of(targets[name], shape)
        raw = layout.tensors[whole.weight_key(name)]
        mask = to_blocks(_oriented(raw, whole) != 0, shape).any(dim=3).any(dim=2)
        advance(raw.size)
        if not mask.all():
            refuse_read_without_call(model, name)
            formats[name] = replace(whole, kept=int(mask.sum()))
            bitmaps[whole.mask_key(name)] = pack_mask(mask)
    if not formats:
        return {}
    stored = {form.weight_key(name): form for name, form in formats.items()}

    def convert(name: str, raw: RawTensor) -> dict[str, NewTensor]:
        form = stored.get(name)
        if form is None:
            return {name: _copied(raw, advance)}
        bitmap = bitmaps[name + MASK_SUFFIX]

        def write(file: BinaryIO) -> None:
            values, _ = pack(_oriented(raw, form), unpack_mask(bitmap, form.grid), form.block_shape)
            write_bytes(values, file)
            advance(raw.size)

        size = raw.size // math.prod(form.dense_shape) * math.prod(form.values_shape)
        return {
            name: NewTensor(raw.dtype, form.values_shape, size, write),
            name + MASK_SUFFIX: NewTensor("U8", (len(bitmap),), len(bitmap), lambda file: write_bytes(bitmap, file)),
        }

    strings = header_strings(bitmaps, version_of(formats.values()))
    layout.write_converted(target, convert, lambda old: {**old, **strings})
    quantization = BlockSparseConfig({name: form.to_dict() for name, form in formats.items()}).to_dict()
    _write_json(target / "config.json", {**layout.config, "quantization_config": quantization})
    return formats


def decompress_folder(source: Path, target: Path, advance: Advance = lambda size: None) -> None:
    """Write a dense copy of a compressed model: weights, index and config.json. Exact.

    Args:
        source: folder of a compressed model.
        target: an existing folder.
        advance: called with the number of bytes that were dealt with, `work(source, 1)` in all at most.

    Raises:
        FileNotFoundError, FormatError: if the folder is not whole.
    """
    layout = _Layout(source)
    quantization: Any = layout.config.get("quantization_config")
    formats = read_layer_formats(quantization)
    check_bitmaps(read_headers([str(file) for file in layout.files], quantization["format_version"]), formats)
    stored = {form.weight_key(name): form for name, form in formats.items()}

    def convert(name: str, raw: RawTensor) -> dict[str, NewTensor]:
        if name.endswith(MASK_SUFFIX) and name.removesuffix(MASK_SUFFIX) in stored:
            return {}
        form = stored.get(name)
        if form is None:
            return {name: _copied(raw, advance)}

        def write(file: BinaryIO) -> None:
            weight = unpack(raw.read(), layout.tensors[name + MASK_SUFFIX].read(), form.dense_shape)
            write_bytes(weight.t() if form.transposed else weight, file)
            advance(raw.size)

        shape = form.stored_shape
        return {name: NewTensor(raw.dtype, shape, math.prod(shape) * raw.item_bytes, write)}

    own = (VERSION_KEY, CHECKSUM_KEY)
    layout.write_converted(target, convert, lambda old: {key: text for key, text in old.items() if key not in own})
    config = {key: value for key, value in layout.config.items() if key != "quantization_config"}
    _write_json(target / "config.json", config)


class _Layout:
    """The config of a folder and where its tensors lie."""

    def __init__(self, folder: Path) -> None:
        self.config = read_config(folder)
        self.files = {file: read_layout(file) for file in weight_files(folder)}
        self.tensors: dict[str, RawTensor] = {}
        for file, (tensors, _) in self.files.items():
            if twice := sorted(self.tensors.keys() & tensors.keys()):
                raise FormatError(f"{twice[0]} is stored twice, in {self.tensors[twice[0]].file} and in {file}.")
            self.tensors |= tensors

    def write_converted(
        self,
        target: Path,
        convert: Callable[[str, RawTensor], dict[str, NewTensor]],
        convert_strings: Callable[[Strings], Strings],
    ) -> None:
        """Write each file anew under its name, and the index where there are several."""
        names, total = {}, 0
        for file, (tensors, strings) in self.files.items():
            new = {name: tensor for old, raw in tensors.items() for name, tensor in convert(old, raw).items()}
            write_file(target / file.name, new, convert_strings(strings))
            names[file.name] = list(new)
            total += sum(tensor.size for tensor in new.values())
        if list(names) != ["model.safetensors"]:
            write_index(target, names, total)


def _compare(model: Any, layout: _Layout) -> None:
    """Hold a model against what is stored."""
    name = type(model).__name__
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {key: raw.shape for key, raw in layout.tensors.items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if missing := sorted(expected.keys() - found.keys() - tied):
        raise NotStreamable(f"{len(missing)} tensors of {name} are not stored, such as {missing[0]}")
    if unknown := sorted(found.keys() - expected.keys()):
        raise NotStreamable(f"{len(unknown)} stored tensors are not in {name}, such as {unknown[0]}")
    if other := [key for key in found if found[key] != expected[key]]:
        raise NotStreamable(f"{other[0]} is stored as {list(found[other[0]])}, not as {list(expected[other[0]])}")


def _oriented(raw: RawTensor, form: LayerFormat) -> Tensor:
    """Read a dense weight as [O, I], output rows first."""
    weight = raw.read()
    return weight.t() if form.transposed else weight.view(form.dense_shape)


def _copied(raw: RawTensor, advance: Advance) -> NewTensor:
    return NewTensor(raw.dtype, raw.shape, raw.size, lambda file: raw.copy_to(file, advance))


def _write_json(file: Path, data: dict[str, Any]) -> None:
    # As transformers lays it out.
    file.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

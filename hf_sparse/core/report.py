"""What a model weighs and where its zeros are: a table per layer, from a model in memory or a folder's headers."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_sparse.core.blocks import BlockShape
from hf_sparse.core.stored.packing import (
    MASK_SUFFIX,
    QUANT_METHOD,
    FormatError,
    LayerFormat,
    read_layer_formats,
    unpack_mask,
)
from hf_sparse.core.stored.reading import CONFIG_FILE, opened, read_config, weight_files
from hf_sparse.core.structure.carried import carried_mask, follows_mask
from hf_sparse.core.structure.experts import Prunable, experts_of
from hf_sparse.core.structure.fused import FusedWeights, fused_weights, grouped, is_fused
from hf_sparse.core.structure.targets import find_stacks_or_compressed, is_linear, weight_view

_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer of a `SparsityReport`.

    Attributes:
        name: module name; of fused experts the name of their parameter.
        shape: (O, I), output rows first; of fused experts the rows of all of them, (E * O, I).
        block_shape: (h, w) in weights; (1, 1) for a dense layer, whose zeros are then counted one by one.
        kept_blocks: blocks that are stored, or that are not zero.
        total_blocks: blocks of the grid.
        bytes: bytes of the weight as stored, bitmap included.
        dense_bytes: bytes of the dense weight in the same dtype.
    """

    name: str
    shape: tuple[int, int]
    block_shape: BlockShape
    kept_blocks: int
    total_blocks: int
    bytes: int
    dense_bytes: int

    @property
    def sparsity(self) -> float:
        """Fraction of blocks removed, [0, 1]."""
        return 1.0 - self.kept_blocks / self.total_blocks


@dataclass(frozen=True, kw_only=True)
class SparsityReport:
    """What `report` returns.

    Attributes:
        layers: one `LayerReport` per linear, and per fused weight of experts, inside the transformer layers (and per
            compressed layer elsewhere).
        bytes: bytes of all tensors of the model as stored.
        dense_bytes: bytes of all tensors if every layer were dense.
        not_pruned: fused weights inside the layers that cannot be pruned, such as experts laid out [E, I, O]; they
            count in both sizes.
        stale_masks: layers with a mask from an earlier pruning whose pruned blocks are not zero any more: something
            trained or changed them since. They are reported as dense.
    """

    layers: list[LayerReport]
    bytes: int
    dense_bytes: int
    not_pruned: tuple[FusedWeights, ...] = ()
    stale_masks: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Fraction of weights removed over all `layers`, [0, 1]."""
        total = sum(math.prod(layer.shape) for layer in self.layers)
        kept = sum(math.prod(layer.shape) * (1.0 - layer.sparsity) for layer in self.layers)
        return 1.0 - kept / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Give plain numbers, lists and strings, ready for JSON; "not_pruned" and "stale_masks" if not empty."""
        layers = [{**asdict(layer), "sparsity": layer.sparsity} for layer in self.layers]
        found: dict[str, Any] = {
            "sparsity": self.sparsity,
            "bytes": self.bytes,
            "dense_bytes": self.dense_bytes,
            "layers": layers,
        }
        if self.not_pruned:
            found["not_pruned"] = [{**asdict(kind), "shape": list(kind.shape)} for kind in self.not_pruned]
        if self.stale_masks:
            found["stale_masks"] = list(self.stale_masks)
        return found

    def __str__(self) -> str:
        head = ("layer", "shape", "block", "kept", "of", "sparsity", "bytes")
        rows = [
            (
                layer.name,
                "x".join(map(str, layer.shape)),
                "x".join(map(str, layer.block_shape)),
                f"{layer.kept_blocks:,}",
                f"{layer.total_blocks:,}",
                f"{layer.sparsity:.2%}",
                f"{layer.bytes:,}",
            )
            for layer in self.layers
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = []
        for row in [head, *rows]:
            cells = zip(row, widths, strict=True)
            lines.append("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(cells)))
        share = self.bytes / self.dense_bytes if self.dense_bytes else 1.0
        lines.append(
            f"{len(self.layers)} layers, sparsity {self.sparsity:.2%}; "
            f"whole model {self.bytes:,} of {self.dense_bytes:,} bytes ({share:.1%})"
        )
        if self.stale_masks:
            lines.append(
                f"{len(self.stale_masks)} layer(s) changed since they were pruned and are reported as dense: blocks "
                f"that the mask on {self.stale_masks[0]} prunes are not zero any more"
            )
        return "\n".join([*lines, *map(str, self.not_pruned)])


def report(model_or_path: nn.Module | str | os.PathLike[str]) -> SparsityReport:
    """Tell how sparse a model is and what it weighs, layer by layer.

    Args:
        model_or_path: a model (dense, in training under `SparseDistillTrainer`, or compressed), or a folder saved by
            it. A compressed folder is read from its headers alone, without building the model.

    Returns:
        A `SparsityReport`; `str()` is a table.

    Raises:
        FileNotFoundError: if the folder, its config.json or its weights are missing.
        FormatError: if a compressed folder is damaged.

    Example:
        >>> layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4, bias=False)) for _ in range(2))
        >>> report(nn.ModuleDict({"encoder": layers})).layers[0].total_blocks
        16
    """
    return (
        _report_model(model_or_path) if isinstance(model_or_path, nn.Module) else _report_folder(Path(model_or_path))
    )


def _report_model(model: nn.Module) -> SparsityReport:
    names = find_stacks_or_compressed(model)
    stacks = tuple(name + "." for name in names)
    layers: list[LayerReport] = []
    stale: list[str] = []
    for name, module in model.named_modules():
        if hasattr(module, "layer_formats"):
            for part, layer in module.layer_formats().items():
                size = getattr(module, part).element_size()
                layers.append(_compressed_layer(f"{name}.{part}", layer, size))
        if hasattr(module, "weight" + MASK_SUFFIX):
            layers.append(_compressed_layer(name, module.layer_format(), module.weight.element_size()))
        elif name.startswith(stacks):
            layers += [_dense_layer(name, module, stale)] if is_linear(module) else []
            layers += [_dense_layer(full, weight, stale) for full, weight in experts_of(name, module)]
    stored = stored_bytes(model)
    return SparsityReport(
        layers=layers,
        bytes=stored,
        dense_bytes=stored + sum(x.dense_bytes - x.bytes for x in layers),
        not_pruned=tuple(fused_weights(model, names)),
        stale_masks=tuple(stale),
    )


def stored_bytes(model: nn.Module) -> int:
    """Count the bytes of all tensors that a save writes; a shared one counts once."""
    buffers = [buffer for module in model.modules() for name, buffer in module.named_buffers(recurse=False)
               if name not in module._non_persistent_buffers_set]  # fmt: skip
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *buffers]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _dense_layer(name: str, module: Prunable, stale: list[str]) -> LayerReport:
    weight = weight_view(module).detach()
    size = weight.numel() * weight.element_size()
    shape = (weight.shape[0], weight.shape[1])
    bitmap = carried_mask(module)
    if bitmap is not None and not follows_mask(module, bitmap):
        stale.append(name)
        bitmap = None
    if bitmap is not None:
        block_shape = (shape[0] // bitmap.grid[0], shape[1] // bitmap.grid[1])
        kept, total = int(bitmap.mask().sum()), bitmap.num_blocks
    else:
        block_shape, kept, total = (1, 1), int(torch.count_nonzero(weight)), weight.numel()
    return LayerReport(name=name, shape=shape, block_shape=block_shape, kept_blocks=kept, total_blocks=total,
                       bytes=size, dense_bytes=size)  # fmt: skip


def _compressed_layer(name: str, layer: LayerFormat, item_bytes: int) -> LayerReport:
    return LayerReport(
        name=name,
        shape=layer.dense_shape,
        block_shape=layer.block_shape,
        kept_blocks=layer.kept,
        total_blocks=layer.num_blocks,
        bytes=math.prod(layer.values_shape) * item_bytes + layer.mask_bytes,
        dense_bytes=math.prod(layer.dense_shape) * item_bytes,
    )


def _report_folder(folder: Path) -> SparsityReport:
    config = read_config(folder)
    try:
        formats = _read_formats(config.get("quantization_config"))
    except FormatError as error:
        raise FormatError(f"{folder / CONFIG_FILE}: {error}") from error
    files = weight_files(folder)
    layers, fused, stored = [], [], 0
    bitmaps = _read_bitmaps(files) if formats else {}
    for file in files:
        with opened(file) as handle:
            for key in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                layer, size = _stored_tensor(handle, key, formats, bitmaps, file)
                stored += size
                layers += [layer] if layer else []
                shape = tuple(handle.get_slice(key).get_shape())
                fused += [(key, shape, size)] if layer is None and is_fused(key, shape) else []
    if missing := set(formats) - {layer.name for layer in layers}:
        raise FormatError(f"{folder} lists {sorted(missing)[0]!r} in config.json but stores no weight for it.")
    order = {name: i for i, name in enumerate(formats)}
    layers.sort(key=lambda layer: (order.get(layer.name, len(order)), layer.name))
    return SparsityReport(
        layers=layers,
        bytes=stored,
        dense_bytes=stored + sum(x.dense_bytes - x.bytes for x in layers),
        not_pruned=tuple(grouped(fused)),
    )


def _read_formats(quantization: Any) -> dict[str, LayerFormat]:
    # Weights quantized by somebody else are reported as the tensors they are.
    other = isinstance(quantization, dict) and quantization.get("quant_method") != QUANT_METHOD
    return {} if quantization is None or other else read_layer_formats(quantization)


def _read_bitmaps(files: list[Path]) -> dict[str, torch.Tensor]:
    # A bitmap may lie in another file than the values that it belongs to.
    bitmaps = {}
    for file in files:
        with opened(file) as handle:
            names = [key for key in handle.keys() if key.endswith(MASK_SUFFIX)]  # noqa: SIM118 (no mapping)
            bitmaps.update({name: handle.get_tensor(name) for name in names})
    return bitmaps


def _stored_tensor(
    handle: Any, key: str, formats: dict[str, LayerFormat], bitmaps: dict[str, torch.Tensor], file: Path
) -> tuple[LayerReport | None, int]:
    view = handle.get_slice(key)
    shape, item_bytes = tuple(view.get_shape()), _ITEM_BYTES.get(view.get_dtype(), 1)
    size, name = math.prod(shape) * item_bytes, key.removesuffix(".weight")
    # The tensor of a linear ends in ".weight", that of experts has the name of the layer itself.
    name = key if key in formats and formats[key].experts else name
    if name in formats and key == formats[name].weight_key(name):
        layer = formats[name]
        if shape != layer.values_shape:
            raise FormatError(f"{file}: {key} has shape {list(shape)}, config.json says {list(layer.values_shape)}.")
        if key + MASK_SUFFIX not in bitmaps:
            raise FormatError(f"{file} stores {key} without its bitmap {key + MASK_SUFFIX}.")
        try:
            population = int(unpack_mask(bitmaps[key + MASK_SUFFIX], layer.grid).sum())
        except FormatError as error:
            raise FormatError(f"{file}: {key + MASK_SUFFIX}: {error}") from error
        if population != layer.kept:
            raise FormatError(f"{file}: {key + MASK_SUFFIX} keeps {population} blocks, config.json says {layer.kept}.")
        return _compressed_layer(name, layer, item_bytes), size
    # A folder has no module tree: the 2-D weights inside numbered layers are its linears, and 3-D ones that hold zeros
    # are experts that were pruned.
    linear = len(shape) == 2 and key.endswith(".weight") and any(part.isdigit() for part in key.split("."))
    if not formats and (linear or is_fused(key, shape)):
        # Opened anew for each: what is read through one handle stays in memory until that is closed.
        with opened(file) as alone:
            kept, total = int(torch.count_nonzero(alone.get_tensor(key))), math.prod(shape)
        if not linear and kept == total:
            return None, size
        shape = (math.prod(shape[:-1]), shape[-1])
        layer_report = LayerReport(name=name, shape=shape, block_shape=(1, 1), kept_blocks=kept, total_blocks=total,
                                   bytes=size, dense_bytes=size)  # fmt: skip
        return layer_report, size
    return None, size

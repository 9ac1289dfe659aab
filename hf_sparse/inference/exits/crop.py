"""Cropping: what pruning left dead in a model is taken out of it for good, so that any engine gains.

Constants that dead units and heads still gave are folded into the next bias, so that the outputs stay what they were.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.core.structure.targets import is_conv1d, is_linear, weight_view
from hf_sparse.inference.compress import compressed_layers, decompress
from hf_sparse.inference.exits.dead import Dead, dead_heads, dead_units
from hf_sparse.inference.exits.structure import CropError, CroppableLayer, Heads, croppable_layers

logger = logging.getLogger(__name__)


def crop(model: Any, multiple: int = 1, uneven: bool = False) -> Any:
    """Remove dead units and heads for good. Exact in evaluation mode up to the order of sums.

    Args:
        model: a model of transformers, compressed or dense; changed in place, and dense afterwards.
        multiple: the number of units that are left is a multiple of this, as some engines like it; a few dead ones
            stay for it.
        uneven: False leaves all layers as large as the largest needs to be, and heads where the config has no number
            for them, so that the model saves and loads anywhere. True cuts each layer as far as it goes: no config of
            transformers describes that, so that such a model is for exporting (`hf_sparse.export`) and refuses
            `save_pretrained`.

    Returns:
        The same model. Where nothing is dead it is as large as before, and the log says so.

    Raises:
        CropError: (a ValueError) if layers of this class are not known, share weights, or do not fit the config.
        ValueError: if `multiple` is not a positive integer.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        >>> model = BertModel(config)
        >>> _ = model.encoder.layer[0].intermediate.dense.weight.data[:20].zero_()
        >>> crop(model).config.intermediate_size
        12
    """
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"multiple={multiple!r} must be a positive integer.")
    layers = croppable_layers(model)
    _check_shared(model, layers)
    sizes = {layer.name: _units(layer) for layer in layers}
    _check_config(model, layers, sizes)
    if compressed_layers(model):
        decompress(model)
    dead = {layer.name: dead_units(layer) for layer in layers}
    live = {name: _round_up(int((~found.mask).sum()), multiple, sizes[name]) for name, found in dead.items()}
    largest: dict[str, int] = defaultdict(int)
    for layer in layers:
        field = layer.feed_forward.size
        largest[field] = max(largest[field], live[layer.name])
    changes = {layer.feed_forward.size: (sizes[layer.name], largest[layer.feed_forward.size]) for layer in layers}
    for layer in layers:
        size = live[layer.name] if uneven else largest[layer.feed_forward.size]
        _remove_units(layer, dead[layer.name], sizes[layer.name] - size)
    headed = {layer: found for layer in layers if (found := dead_heads(layer)) is not None}
    counts = {layer: min(int(found.mask.sum()), len(found.mask) - 1) for layer, found in headed.items()}
    if not uneven:
        counts, fields = _even_heads(model, headed, counts)
        changes |= fields
    for layer, count in counts.items():
        _remove_heads(layer, headed[layer], count)
    if uneven:
        model.save_pretrained = _refuse_to_save
    else:
        _write_config(model, changes)
    before, after, heads = sum(sizes.values()), sum(map(_units, layers)), sum(counts.values())
    if before == after and not heads:
        logger.warning("crop: nothing to remove in %d layers, the model stays as large as it was.", len(layers))
    else:
        logger.info("crop: %d of %d units and %d heads removed.", before - after, before, heads)
    return model


@dataclass(frozen=True)
class LayerUnits:
    """How many units a layer has, and how many of them live."""

    live: int
    total: int


def units_of(model: Any) -> dict[str, LayerUnits]:
    """Count the units of every layer: {layer: how many live, and all}.

    Args:
        model: of transformers, compressed or dense; a compressed one is dense afterwards.

    Raises:
        CropError: if its layers are not known.
    """
    layers = croppable_layers(model)
    if compressed_layers(model):
        decompress(model)
    return {layer.name: LayerUnits(int((~dead_units(layer).mask).sum()), _units(layer)) for layer in layers}


def sizes_told(model: Any) -> dict[str, int | None]:
    """Give the sizes in a model's config that cropping may change: {field: value}."""
    layers = croppable_layers(model)
    fields = {layer.feed_forward.size for layer in layers}
    fields |= {field for layer in layers if layer.heads is not None for field in layer.heads.fields}
    return {field: _told(model.config, field) for field in sorted(fields)}


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise CropError(
        "this model was cropped unevenly, which no config describes: save_pretrained would write a folder that cannot "
        "be loaded. Export it (hf_sparse.export), or crop it with uneven=False."
    )


# What is removed


def _even_heads(
    model: Any, dead: dict[CroppableLayer, Dead], counts: dict[CroppableLayer, int]
) -> tuple[dict[CroppableLayer, int], dict[str, tuple[int, int]]]:
    """Tell how many heads can go from every layer alike, and the fields of the config that say so with (old, new)."""
    kinds = {layer.heads for layer in dead}
    heads = kinds.pop() if len(kinds) == 1 else None
    groups = {len(found.mask) for found in dead.values()}
    layer = next(iter(dead), None)
    if layer is None or heads is None or not heads.fields or len(groups) > 1:
        return {}, {}
    size = getattr(layer.get(heads.attention), heads.size)
    total, wanted = groups.pop(), min(counts.values())
    share = weight_view(layer.get(heads.query)).shape[0] // size // total
    told = [getattr(model.config, field, None) for field in heads.fields]
    if told != [share * total, total] or getattr(model.config, heads.size, None) != size:
        return {}, {}
    # Some configs want numbers of heads that divide the hidden size.
    while wanted and not _allowed(model.config, heads, (share * (total - wanted), total - wanted)):
        wanted -= 1
    fields = {f: (old, old * (total - wanted) // total) for f, old in zip(heads.fields, told, strict=True)}
    return dict.fromkeys(counts, wanted), fields if wanted else {}


def _allowed(config: Any, heads: Heads, numbers: Sequence[int]) -> bool:
    try:
        type(config).from_dict({**config.to_dict(), **dict(zip(heads.fields, numbers, strict=True))})
    # Configs refuse what does not fit with errors of several kinds.
    except Exception:  # noqa: BLE001
        return False
    return True


def _remove_units(layer: CroppableLayer, dead: Dead, count: int) -> None:
    form = layer.feed_forward
    kept = _without(dead, count, layer.get(form.down))
    for name in filter(None, (form.up, form.gate)):
        _keep(layer.get(name), rows=kept)
    _keep(layer.get(form.down), cols=kept)


def _remove_heads(layer: CroppableLayer, dead: Dead, count: int) -> None:
    heads = layer.heads
    if not count or heads is None:
        return
    kept = _without(dead, count, layer.get(heads.output))
    attention = layer.get(heads.attention)
    size = getattr(attention, heads.size)
    share = weight_view(layer.get(heads.query)).shape[0] // size // len(dead.mask)
    shared, own = _features(kept, size), _features(kept, share * size)
    _keep(layer.get(heads.query), rows=own)
    for name in (heads.key, heads.value):
        _keep(layer.get(name), rows=shared)
    _keep(layer.get(heads.output), cols=own)
    for field, number in zip(heads.counts, (share * len(kept), len(own)), strict=True):
        if field is not None:
            setattr(attention, field, number)


def _features(parts: Tensor, size: int) -> Tensor:
    """Number the features of parts that are `size` wide: [parts * size] int64."""
    return (parts[:, None] * size + torch.arange(size, device=parts.device)).flatten()


def _without(dead: Dead, count: int, following: Any) -> Tensor:
    """Choose `count` dead parts to remove, fold what they give, and tell the others: [kept] int64, ascending."""
    removed = dead.mask.nonzero().flatten()[:count]
    if count and following.bias is not None:
        with torch.no_grad():
            following.bias.copy_(following.bias.double() + dead.bias[removed].sum(0))
    keep = torch.ones_like(dead.mask)
    keep[removed] = False
    return keep.nonzero().flatten()


def _keep(linear: Any, rows: Tensor | None = None, cols: Tensor | None = None) -> None:
    weight = weight_view(linear).detach()
    weight = weight if rows is None else weight[rows]
    weight = weight if cols is None else weight[:, cols]
    outputs, inputs = weight.shape
    stored = weight.t() if is_conv1d(linear) else weight
    linear.weight = nn.Parameter(stored.contiguous(), linear.weight.requires_grad)
    if rows is not None and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[rows].contiguous(), linear.bias.requires_grad)
    if is_conv1d(linear):
        linear.nx, linear.nf = inputs, outputs
    else:
        linear.in_features, linear.out_features = inputs, outputs


# The config


def _units(layer: CroppableLayer) -> int:
    linear = layer.get(layer.feed_forward.up)
    return int(linear.nf if is_conv1d(linear) else linear.out_features)


def _configs(model: nn.Module, field: str, size: int) -> list[Any]:
    """Every config inside the model that says this size; encoders and decoders have copies of their own."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [c for c in configs.values() if _told(c, field) == size]


def _told(config: Any, field: str) -> int | None:
    told = getattr(config, field, None)
    return 4 * config.hidden_size if told is None and field == "n_inner" and hasattr(config, field) else told


def _check_config(model: nn.Module, layers: list[CroppableLayer], sizes: dict[str, int]) -> None:
    for layer in layers:
        field = layer.feed_forward.size
        if _told(getattr(model, "config", None), field) != sizes[layer.name]:
            raise CropError(
                f"{layer.name} has {sizes[layer.name]} units, but {type(model).__name__}.config.{field} is "
                f"{_told(getattr(model, 'config', None), field)}: the size could not be written down."
            )


def _write_config(model: nn.Module, changes: dict[str, tuple[int, int]]) -> None:
    for field, (old, new) in changes.items():
        for config in _configs(model, field, old):
            setattr(config, field, new)


def _check_shared(model: nn.Module, layers: list[CroppableLayer]) -> None:
    owners: dict[int, int] = defaultdict(int)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] += 1
    for layer in layers:
        form = layer.feed_forward
        for name in filter(None, (form.up, form.gate, form.down)):
            linear = layer.get(name)
            if not (is_linear(linear) or hasattr(linear, "weight_block_mask")):
                raise CropError(f"{layer.name}.{name} is a {type(linear).__name__}, and no plain linear.")
            if owners[id(linear.weight)] > 1:
                raise CropError(f"{layer.name}.{name} shares its weight with another module.")


def _round_up(number: int, multiple: int, limit: int) -> int:
    return min(limit, max(multiple, -(-number // multiple) * multiple))

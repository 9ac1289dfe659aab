"""Cropping: what pruning left dead in a model is taken out of it for good, so that any engine gains.

A unit of a feed-forward part is dead where nothing reaches it (its row is zero, so it gives the constant act(bias)) or
nobody reads it (its column in the next linear is zero). A head is dead where its values do not depend on the input
(their rows are zero; attention weights sum to one, so it gives its bias) or nobody reads it. Constants that were read
are folded into the next bias, so that the outputs stay what they were.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.core.targets import is_conv1d, is_linear, weight_view
from hf_sparse.inference.compress import compressed_layers, decompress
from hf_sparse.inference.exits.structure import CropError, CroppableLayer, croppable_layers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Dead:
    """What is dead in a row of parallel parts, units or heads.

    Attributes:
        mask: [parts] bool, True = dead.
        bias: [parts, O] float64, what each dead part gives to the next linear, whatever the input.
    """

    mask: Tensor
    bias: Tensor


def crop(model: Any, multiple: int = 1, uneven: bool = False) -> Any:
    """Remove dead units, and dead heads if asked, for good. Exact in evaluation mode up to the order of sums.

    Args:
        model: a model of transformers, compressed or dense; changed in place, and dense afterwards.
        multiple: the number of units that are left is a multiple of this, as some engines like it; a few dead ones
            stay for it.
        uneven: False leaves all layers as large as the largest needs to be, which a plain config can say, so that the
            model saves and loads anywhere. True cuts each layer as far as it goes, and heads as well: no config of
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
    dead = {layer.name: _dead_units(layer) for layer in layers}
    live = {name: _round_up(int((~found.mask).sum()), multiple, sizes[name]) for name, found in dead.items()}
    largest: dict[str, int] = defaultdict(int)
    for layer in layers:
        field = layer.feed_forward.size
        largest[field] = max(largest[field], live[layer.name])
    for layer in layers:
        size = live[layer.name] if uneven else largest[layer.feed_forward.size]
        _remove_units(layer, dead[layer.name], sizes[layer.name] - size)
    heads = sum(_remove_heads(layer) for layer in layers) if uneven else 0
    before, after = sum(sizes.values()), sum(map(_units, layers))
    if uneven:
        model.save_pretrained = _refuse_to_save
    else:
        _write_config(model, {f: (sizes[x.name], largest[f]) for x in layers for f in [x.feed_forward.size]})
    if before == after and not heads:
        logger.warning("crop: nothing to remove in %d layers, the model stays as large as it was.", len(layers))
    else:
        logger.info("crop: %d of %d units and %d heads removed.", before - after, before, heads)
    return model


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise CropError(
        "this model was cropped unevenly, which no config describes: save_pretrained would write a folder that cannot "
        "be loaded. Export it (hf_sparse.export), or crop it with uneven=False."
    )


# What is dead


def _dead_units(layer: CroppableLayer) -> Dead:
    form = layer.feed_forward
    up, down = layer.get(form.up), layer.get(form.down)
    activation = layer.get(form.activation)
    unread = (weight_view(down).detach() == 0).all(dim=0)
    zero, bias = _row_bias(up)
    if form.gate is None:
        known, constant = zero, activation(bias)
    else:
        gate_zero, gate_bias = _row_bias(layer.get(form.gate))
        gate = activation(gate_bias)
        # A product is constant where both sides are, or where one of them is zero.
        known = (zero & gate_zero) | (zero & (bias == 0)) | (gate_zero & (gate == 0))
        constant = torch.where(zero & gate_zero, bias * gate, 0.0)
    constant = torch.where(known & ~unread, constant, 0.0).double()
    given = weight_view(down).detach().double().t() * constant[:, None]
    return _foldable(Dead(unread | known, given), down)


def _dead_heads(layer: CroppableLayer) -> Dead | None:
    if layer.heads is None:
        return None
    value, output = layer.get(layer.heads.value), layer.get(layer.heads.output)
    size = int(layer.get(layer.heads.attention).attention_head_size)
    zero, bias = _row_bias(value)
    read = weight_view(output).detach().double().t()  # [H * size, O]
    given = (read * bias.double()[:, None]).unflatten(0, (-1, size)).sum(1)
    unread = (read == 0).all(dim=1).unflatten(0, (-1, size)).all(dim=1)
    constant = zero.unflatten(0, (-1, size)).all(dim=1)
    return _foldable(Dead(unread | constant, torch.where((constant & ~unread)[:, None], given, 0.0)), output)


def _foldable(dead: Dead, linear: Any) -> Dead:
    # Without a bias to take it up, only what gives nothing can go.
    return dead if linear.bias is not None else Dead(dead.mask & (dead.bias == 0).all(dim=1), dead.bias)


def _row_bias(linear: Any) -> tuple[Tensor, Tensor]:
    """[O] bool, whether a row is zero, and [O] float32, the bias."""
    weight = weight_view(linear).detach()
    bias = weight.new_zeros(weight.shape[0]) if linear.bias is None else linear.bias.detach()
    return (weight == 0).all(dim=1), bias.float()


# What is removed


def _remove_units(layer: CroppableLayer, dead: Dead, count: int) -> None:
    form = layer.feed_forward
    kept = _without(dead, count, layer.get(form.down))
    for name in filter(None, (form.up, form.gate)):
        _keep(layer.get(name), rows=kept)
    _keep(layer.get(form.down), cols=kept)


def _remove_heads(layer: CroppableLayer) -> int:
    dead = _dead_heads(layer)
    if dead is None or layer.heads is None:
        return 0
    # A layer without heads is none of any class.
    count = min(int(dead.mask.sum()), len(dead.mask) - 1)
    kept = _without(dead, count, layer.get(layer.heads.output))
    attention = layer.get(layer.heads.attention)
    size = attention.attention_head_size
    rows = (kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()
    for name in (layer.heads.query, layer.heads.key, layer.heads.value):
        _keep(layer.get(name), rows=rows)
    _keep(layer.get(layer.heads.output), cols=rows)
    for field, number in zip(layer.heads.counts, (len(kept), len(rows)), strict=True):
        if field is not None:
            setattr(attention, field, number)
    return count


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

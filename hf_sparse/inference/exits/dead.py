"""What pruning left dead in a layer: units and heads that say the same to every input, or to nobody.

A unit is dead where nothing reaches it (its row is zero, so it gives the constant act(bias)) or nobody reads it (its
column in the next linear is zero). A head is dead where its values do not depend on the input (their rows are zero;
attention weights sum to one, so it gives its bias) or nobody reads it.

Shape letters: O out features; U units or heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse.core.structure.targets import weight_view
from hf_sparse.inference.exits.structure import CroppableLayer


@dataclass(frozen=True, eq=False)
class Dead:
    """What is dead in a row of parallel parts.

    Attributes:
        mask: [U] bool, True = dead.
        bias: [U, O] float64, what each dead part gives to the next linear, whatever the input.
    """

    mask: Tensor
    bias: Tensor


def dead_units(layer: CroppableLayer) -> Dead:
    """Find the dead units of a layer's feed-forward part."""
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


def dead_heads(layer: CroppableLayer) -> Dead | None:
    """Find the dead heads of a layer, in groups that share keys and values; None where heads cannot change."""
    if layer.heads is None:
        return None
    value, output = layer.get(layer.heads.value), layer.get(layer.heads.output)
    size = int(getattr(layer.get(layer.heads.attention), layer.heads.size))
    zero, bias = _row_bias(value)
    groups = len(zero) // size
    # [groups, heads of a group, size, O]: what each group writes.
    read = weight_view(output).detach().double().t().unflatten(0, (groups, -1, size))
    given = (read * bias.double().view(groups, 1, size, 1)).sum((1, 2))
    unread = (read == 0).flatten(1).all(dim=1)
    constant = zero.view(groups, size).all(dim=1)
    return _foldable(Dead(unread | constant, torch.where((constant & ~unread)[:, None], given, 0.0)), output)


def _foldable(dead: Dead, linear: Any) -> Dead:
    # Without a bias to take it up, only what gives nothing can go.
    return dead if linear.bias is not None else Dead(dead.mask & (dead.bias == 0).all(dim=1), dead.bias)


def _row_bias(linear: Any) -> tuple[Tensor, Tensor]:
    """[O] bool, whether a row is zero, and [O] float32, the bias."""
    weight = weight_view(linear).detach()
    bias = weight.new_zeros(weight.shape[0]) if linear.bias is None else linear.bias.detach()
    return (weight == 0).all(dim=1), bias.float()

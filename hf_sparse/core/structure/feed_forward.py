"""The feed-forward units of a model: which row of one linear and which column of another are one and the same unit.

A feed-forward part leads D features in to F units and out to D again. A unit is one row of each linear that leads in
(two rows where a gate and its input share one linear, [2F, D]) and one column of the linear that leads out [D, F].
Removing all of them together removes the unit; removing a row here and another one's column there wastes both.

Shape letters: D hidden size, F units.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from hf_sparse.core.blocks import BlockShape
from hf_sparse.core.structure.experts import ExpertsWeight, Prunable
from hf_sparse.core.structure.targets import weight_view


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """One feed-forward part of a model.

    Attributes:
        into: names of the linears [F, D] or [2F, D] that lead in.
        out: name of the linear [D, F] that leads out.
        units: F.
    """

    into: tuple[str, ...]
    out: str
    units: int

    @property
    def block_shapes(self) -> dict[str, BlockShape]:
        """{name: (h, w)}: whole rows of what leads in, whole columns of what leads out."""
        return {**dict.fromkeys(self.into, (1, -1)), self.out: (-1, 1)}


def find_feed_forwards(model: nn.Module, targets: Mapping[str, Prunable]) -> list[FeedForward]:
    """Find the feed-forward parts among the layers that are pruned.

    Attention is told by the names of its classes ("BertSelfAttention", "LlamaAttention"); of the other linears in a
    layer, those that fit each other as [F, D] and [D, F] inside the smallest module that holds both make one part.
    Fused experts are in none: they are pruned in the blocks of the other layers.

    Args:
        model: what the targets belong to.
        targets: {name: linear}, as `find_targets` gives them.

    Returns:
        In the model's own order, at least one. Each target is in at most one; linears of a part that are no targets
        stay out of it.

    Raises:
        ValueError: if there is none, or a linear fits two parts.

    Example:
        >>> layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(1))
        >>> find_feed_forwards(layers, {"0.0": layers[0][0], "0.2": layers[0][2]})
        [FeedForward(into=('0.0',), out='0.2', units=8)]
    """
    candidates = {
        name: module
        for name, module in targets.items()
        if not (isinstance(module, ExpertsWeight) or _is_attention(model, name))
    }
    found: list[FeedForward] = []
    for name, module in candidates.items():
        features, units = weight_view(module).shape
        if units <= features:
            continue
        scope = name.rpartition(".")[0]
        while not (into := _leading_into(candidates, scope, features, units)):
            if not scope or _is_layer(model, scope):
                break
            scope = scope.rpartition(".")[0]
        if into:
            found.append(FeedForward(into=into, out=name, units=units))
    if twice := [name for name, count in Counter(name for part in found for name in part.into).items() if count > 1]:
        raise ValueError(
            f'feed_forward="units" cannot tell which linear {twice[0]} belongs to: '
            f"{[part.out for part in found if twice[0] in part.into]} fit it. "
            f'Use feed_forward="blocks", and block_overrides for layers that need another block shape.'
        )
    if not found:
        raise ValueError(
            f'feed_forward="units" found no feed-forward part in {type(model).__name__}: no two of its '
            f"{len(candidates)} target layers outside attention fit each other as [F, D] and [D, F] with F > D. "
            f'Use feed_forward="blocks", and block_overrides for layers that need another block shape.'
        )
    return found


def unit_overrides(parts: Sequence[FeedForward]) -> dict[str, BlockShape]:
    """Give the block shapes of feed-forward parts as `assign_block_shapes` takes them: {pattern of a name: (h, w)}."""
    return {re.escape(name): shape for part in parts for name, shape in part.block_shapes.items()}


def _leading_into(linears: Mapping[str, Prunable], scope: str, features: int, units: int) -> tuple[str, ...]:
    prefix = f"{scope}." if scope else ""
    shapes = {n: tuple(weight_view(m).shape) for n, m in linears.items() if n.startswith(prefix)}
    return tuple(n for n, shape in shapes.items() if shape in ((units, features), (2 * units, features)))


def _is_attention(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    inside = (".".join(parts[:end]) for end in range(1, len(parts)))
    return any("attention" in type(model.get_submodule(path)).__name__.lower() for path in inside)


def _is_layer(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList)

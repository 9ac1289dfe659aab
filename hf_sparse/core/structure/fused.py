"""Weights of several linears in one tensor that cannot be pruned, and are said not to be.

Of such parameters of three dimensions, the experts that `core.structure.experts` knows the layout of are pruned. The
others ([experts, in, out], heads of attention) stay dense; what they weigh is told wherever a size is promised or
reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from hf_sparse.core.stored.formats import MASK_SUFFIX
from hf_sparse.core.structure.experts import experts_parts
from hf_sparse.core.structure.targets import find_stacks


@dataclass(frozen=True, kw_only=True)
class FusedWeights:
    """Fused weights of one kind, in all layers that have them.

    Attributes:
        name: of the parameters, with * for the numbers of layers.
        shape: of one of them.
        count: how many there are.
        bytes: of all of them.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    bytes: int

    def __str__(self) -> str:
        return (
            f"not pruned: {self.name}, fused weights of shape {'x'.join(map(str, self.shape))}, {self.count} times, "
            f"{self.bytes:,} bytes"
        )


def fused_weights(model: nn.Module, stacks: Iterable[str] | None = None) -> list[FusedWeights]:
    """Find the fused weights inside the layers of a model that are not pruned.

    These are parameters of three dimensions that no torch layer holds, without experts that are or could be pruned.

    Args:
        model: any module tree.
        stacks: names of its lists of layers; None looks for them.

    Returns:
        One entry per kind, in the model's own order.
    """
    inside = tuple(f"{name}." for name in (find_stacks(model) if stacks is None else stacks))
    found = [
        (f"{name}.{key}", tuple(parameter.shape), parameter.numel() * parameter.element_size())
        for name, module in model.named_modules()
        if name.startswith(inside) and not type(module).__module__.startswith("torch.")
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and key not in experts_parts(module) and not hasattr(module, key + MASK_SUFFIX)
    ]
    return grouped(found)


def grouped(tensors: Iterable[tuple[str, tuple[int, ...], int]]) -> list[FusedWeights]:
    """Put fused weights of several layers together.

    Args:
        tensors: (name, shape, bytes) of each.

    Example:
        >>> [str(kind) for kind in grouped([("h.0.experts.up", (4, 8, 2), 256), ("h.1.experts.up", (4, 8, 2), 256)])]
        ['not pruned: h.*.experts.up, fused weights of shape 4x8x2, 2 times, 512 bytes']
    """
    kinds: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for name, shape, size in tensors:
        kinds.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), shape), []).append(size)
    return [
        FusedWeights(name=name, shape=shape, count=len(sizes), bytes=sum(sizes))
        for (name, shape), sizes in kinds.items()
    ]


def is_fused(name: str, shape: tuple[int, ...]) -> bool:
    """Tell from its name and shape whether a stored tensor is a fused weight inside numbered layers."""
    numbered = any(part.isdigit() for part in name.split("."))
    return len(shape) == 3 and numbered and not name.endswith((".weight", ".bias", "_block_mask"))

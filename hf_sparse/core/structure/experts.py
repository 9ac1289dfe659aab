"""The experts of a mixture, which transformers keeps as one parameter [experts, out, in] that no linear holds.

To everything that prunes, such a parameter is one weight [E * O, I]: the rows of all experts, one expert after the
other, in memory as it is. Blocks tile one expert, so that none lies in two.

Shape letters: E experts; O, I out and in features of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from hf_sparse.core.bits import Bitmap
from hf_sparse.core.stored.formats import MASK_SUFFIX


class ExpertsWeight:
    """A fused parameter in the role that a linear has elsewhere: something with a weight, a gradient and a mask.

    Args:
        module: the module that holds the parameter.
        part: name of the parameter in it.

    Attributes:
        module, part: as given.
    """

    def __init__(self, module: nn.Module, part: str) -> None:
        self.module, self.part = module, part

    @property
    def weight(self) -> nn.Parameter:
        """The parameter [E, O, I], looked up anew: it may be moved, sharded or replaced."""
        parameter: Any = getattr(self.module, self.part)
        return parameter

    @property
    def experts(self) -> int:
        """E."""
        return int(self.weight.shape[0])

    @property
    def block_mask(self) -> Bitmap | None:
        """The mask [R, C] over [E * O, I] that training goes by, where there is one; kept beside the parameters."""
        masks: dict[str, Bitmap] = self.module.__dict__.get("block_mask", {})
        return masks.get(self.part)

    @block_mask.setter
    def block_mask(self, mask: Bitmap) -> None:
        """Keep a mask beside the parameters."""
        self.module.__dict__.setdefault("block_mask", {})[self.part] = mask


# What can be pruned: a plain linear, or the fused weights of experts.
Prunable = nn.Module | ExpertsWeight


def experts_parts(module: nn.Module) -> list[str]:
    """Name the fused expert parameters of a module whose layout is known to be [E, O, I].

    transformers' classes of experts say of themselves how they lay weights out (`is_transposed`) and how many experts
    there are; a shape alone does not tell [E, O, I] from [E, I, O]. What does not say so is left dense.
    """
    if getattr(module, "is_transposed", None) is not False:
        return []
    return [
        part
        for part, parameter in module._parameters.items()
        if parameter is not None
        and parameter.ndim == 3
        and parameter.shape[0] == getattr(module, "num_experts", None)
        and part + MASK_SUFFIX not in module._buffers
    ]


def experts_of(name: str, module: nn.Module) -> Iterator[tuple[str, ExpertsWeight]]:
    """Give (qualified name, weight) of the fused expert parameters of a module.

    Args:
        name: of the module in its model; may be empty.
        module: any module.
    """
    for part in experts_parts(module):
        yield f"{name}.{part}" if name else part, ExpertsWeight(module, part)

"""The dense backend: lay the weight out once, then do what `nn.Linear` does. Taken wherever nothing beats it."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.inference.kernels.reference import activate, to_dense
from hf_sparse.inference.kernels.registry import BlockIndex, LayerSpec, register


class DenseBackend:
    """`F.linear` with a cached dense weight: the speed and the memory of the layer before it was pruned."""

    name = "dense"

    def available(self) -> tuple[bool, str]:
        """Always."""
        return True, "plain torch"

    def supports(self, spec: LayerSpec) -> tuple[bool, str]:
        """Every layer."""
        return True, "plain torch"

    def wins(self, spec: LayerSpec) -> bool:
        """Always: it is what the others are measured against."""
        return True

    def prepare(self, values: Tensor, index: BlockIndex) -> Tensor:
        """Lay the weight out as [O, I]."""
        return to_dense(values, index)

    def run(self, x: Tensor, state: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        """Compute [M, O] from x [M, I]."""
        return activate(torch.nn.functional.linear(x, state, bias), activation)


register(DenseBackend())

"""The law: a block-sparse linear in the fewest words of plain torch. Every other backend is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.core.blocks import from_blocks
from hf_sparse.inference.kernels.registry import BlockIndex, LayerSpec, register

ACTIVATIONS = {
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def activate(y: Tensor, activation: str | None) -> Tensor:
    """Apply an activation by name; None gives y back.

    Raises:
        ValueError: if there is no activation of that name.
    """
    if activation is None:
        return y
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {sorted(ACTIVATIONS)} or None.")
    return ACTIVATIONS[activation](y)


def to_dense(values: Tensor, index: BlockIndex) -> Tensor:
    """Lay the stored blocks out as a dense weight.

    Args:
        values: [N, h, w].
        index: where they belong.

    Returns:
        [O, I], zero elsewhere. Differentiable in `values`.
    """
    blocks = values.new_zeros(*index.layer.grid, *index.layer.block_shape)
    return from_blocks(blocks.index_put((index.rows, index.cols), values))


class ReferenceBackend:
    """`activation(x @ W.T + bias)` with W laid out dense on every call."""

    name = "reference"

    def available(self) -> tuple[bool, str]:
        """Always."""
        return True, "plain torch"

    def supports(self, spec: LayerSpec) -> tuple[bool, str]:
        """Every layer."""
        return True, "plain torch"

    def wins(self, spec: LayerSpec) -> bool:
        """Never: it is the law, not an engine."""
        return False

    def prepare(self, values: Tensor, index: BlockIndex) -> tuple[Tensor, BlockIndex]:
        """Keep both as they are."""
        return values, index

    def run(self, x: Tensor, state: tuple[Tensor, BlockIndex], bias: Tensor | None, activation: str | None) -> Tensor:
        """Compute [M, O] from x [M, I]."""
        y = x @ to_dense(*state).t()
        return activate(y if bias is None else y + bias, activation)


register(ReferenceBackend())

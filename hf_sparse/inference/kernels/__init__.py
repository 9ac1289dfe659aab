"""One op, several backends: `block_sparse_linear`, the same function of its inputs whoever computes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_sparse.inference.kernels.reference import activate, to_dense
from hf_sparse.inference.kernels.registry import (
    Backend,
    BlockIndex,
    CountsTokens,
    GivesGradients,
    LayerSpec,
    WinsForFew,
    backend_for_few,
    backend_status,
    choose_backend,
    get_backend,
    register,
    requested_backend,
    require_backend,
)

__all__ = [
    "Backend",
    "BlockIndex",
    "CountsTokens",
    "GivesGradients",
    "LayerSpec",
    "WinsForFew",
    "activate",
    "backend_for_few",
    "backend_status",
    "block_sparse_linear",
    "choose_backend",
    "get_backend",
    "register",
    "requested_backend",
    "require_backend",
    "to_dense",
]


def block_sparse_linear(
    x: Tensor,
    values: Tensor,
    index: BlockIndex,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute activation(x @ W.T + bias) with a weight W given by its kept blocks.

    Args:
        x: [..., I], any strides.
        values: [N, h, w], the kept blocks in row-major order of the grid, dtype and device of x.
        index: where the blocks belong (`BlockIndex.from_bitmap`).
        bias: [O] or None.
        activation: "relu", "silu", "gelu", "gelu_tanh" or None.
        backend: as in `choose_backend`.

    Returns:
        [..., O], contiguous.

    Raises:
        ValueError: if the backend or the activation is unknown, or the backend cannot be used.
    """
    spec = LayerSpec(layer=index.layer, device=values.device, dtype=values.dtype)
    chosen = choose_backend(spec, backend)
    state: Any = chosen.prepare(values, index)
    y = chosen.run(x.reshape(-1, x.shape[-1]), state, bias, activation)
    return y.reshape(*x.shape[:-1], y.shape[-1])

"""`BlockSparseLinear`: a linear layer that stores only the blocks it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.core.packing import LayerFormat, pack, unpack_mask
from hf_sparse.inference.kernels import Backend, BlockIndex, LayerSpec, choose_backend, to_dense


@dataclass(frozen=True)
class _Prepared:
    # `sources` is compared by identity: whoever replaces or writes to a tensor makes the rest stale.
    sources: tuple[Any, ...]
    backend: Backend
    index: BlockIndex
    state: Any


class BlockSparseLinear(nn.Module):
    """A linear layer, y = x @ W.T + bias, whose weight is kept as its blocks alone.

    Args:
        layer: geometry of the weight (`core.packing.LayerFormat`).
        bias: whether there is a bias [O].
        device, dtype: of the parameters. The contents are not initialised.

    Attributes:
        weight: [N, h, w], the kept blocks in row-major order of the grid; trainable.
        weight_block_mask: uint8 bitmap, one bit per block (docs/format.md).
        bias: [O] or None.
    """

    def __init__(
        self,
        layer: LayerFormat,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.dense_shape
        self.block_shape = layer.block_shape
        self.transposed = layer.transposed
        self.weight = nn.Parameter(torch.empty(layer.values_shape, device=device, dtype=dtype))
        self.weight_block_mask: Tensor
        self.register_buffer(
            "weight_block_mask", torch.zeros(layer.mask_bytes, dtype=torch.uint8, device=device), persistent=True
        )
        self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        self._prepared: _Prepared | None = None

    @classmethod
    def from_dense(
        cls, weight: Tensor, mask: Tensor, block_shape: tuple[int, int], bias: Tensor | None, transposed: bool = False
    ) -> BlockSparseLinear:
        """Pack a dense weight.

        Args:
            weight: [O, I].
            mask: [R, C] bool, True = keep; what it drops is left out, zero or not.
            block_shape: (h, w).
            bias: [O] or None.
            transposed: True if the dense layer is a `Conv1D`.
        """
        values, bitmap = pack(weight.detach(), mask, block_shape)
        layer = LayerFormat(
            block_shape=block_shape,
            kept=values.shape[0],
            dense_shape=(weight.shape[0], weight.shape[1]),
            transposed=transposed,
        )
        module = cls(layer, bias=bias is not None, device="meta")
        module.weight = nn.Parameter(values, requires_grad=weight.requires_grad)
        module.weight_block_mask = bitmap
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return module

    def layer_format(self) -> LayerFormat:
        """Give the geometry, as `config.json` states it."""
        return LayerFormat(
            block_shape=self.block_shape,
            kept=self.weight.shape[0],
            dense_shape=(self.out_features, self.in_features),
            transposed=self.transposed,
        )

    def block_mask(self) -> Tensor:
        """Give the mask: [R, C] bool, True = kept."""
        return unpack_mask(self.weight_block_mask, self.layer_format().grid)

    def dense_weight(self) -> Tensor:
        """Give the weight as [O, I], zero where blocks were left out. Differentiable in `weight`."""
        return to_dense(self.weight, self._ready().index)

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., O] from x [..., I]."""
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, self.weight, self.bias)):
            return nn.functional.linear(x, self.dense_weight(), self.bias)
        ready = self._ready()
        y = ready.backend.run(x.reshape(-1, self.in_features), ready.state, self.bias, None)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Say the shapes."""
        layer = self.layer_format()
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block_shape={self.block_shape}, "
            f"kept={layer.kept}/{layer.num_blocks}, bias={self.bias is not None}"
        )

    def _ready(self) -> _Prepared:
        ready, sources = self._prepared, self._sources()
        if ready is None or not _same(ready.sources, sources):
            ready = self._prepare(sources)
        return ready

    def _sources(self) -> tuple[Any, ...]:
        tensors = (self.weight, self.weight_block_mask)
        return (*tensors, tuple(_version(t) for t in tensors))

    def _prepare(self, sources: tuple[Any, ...]) -> _Prepared:
        index = BlockIndex.from_bitmap(self.weight_block_mask, self.layer_format())
        spec = LayerSpec(layer=index.layer, device=self.weight.device, dtype=self.weight.dtype)
        backend = choose_backend(spec)
        with torch.no_grad():
            state = backend.prepare(self.weight.detach(), index)
        self._prepared = _Prepared(sources=sources, backend=backend, index=index, state=state)
        return self._prepared

    def _apply(self, fn: Any, recurse: bool = True) -> BlockSparseLinear:
        self._prepared = None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}


def _version(tensor: Tensor) -> int | None:
    # Tensors made in inference mode keep no count of writes.
    return None if tensor.is_inference() else tensor._version


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[0] is b[0] and a[1] is b[1] and bool(a[2] == b[2])

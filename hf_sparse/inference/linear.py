"""`BlockSparseLinear`: a linear layer that stores only the blocks it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hf_sparse.core.blocks import BlockShape, to_blocks
from hf_sparse.core.packing import LayerFormat, pack, unpack_mask
from hf_sparse.inference.kernels import Backend, BlockIndex, LayerSpec, choose_backend, to_dense


class BlockSparseLinear(nn.Module):
    """A linear layer, y = x @ W.T + bias, whose weight is kept as its blocks alone.

    It trains like a linear: gradients reach the kept blocks, the bias and x, and pruned blocks stay absent. What a
    backend makes of the blocks is built on the first call and again when the weight, the mask, the device or the dtype
    changes. Writing through `weight.data` is the one change that torch does not tell of: call `eval()` after it.

    Args:
        layer: geometry of the weight (`core.packing.LayerFormat`).
        bias: whether there is a bias [O].
        device: of the parameters and the bitmap.
        dtype: of the parameters, floating point. Their contents are not initialised.

    Attributes:
        weight: [N, h, w], the kept blocks in row-major order of the grid.
        weight_block_mask: uint8 bitmap, one bit per block (docs/format.md).
        bias: [O] or None.
        in_features: I.
        out_features: O.
        block_shape: (h, w).
        transposed: whether the dense layer is a `Conv1D`, which stores [I, O].

    Example:
        >>> layer = BlockSparseLinear.from_dense(torch.eye(4), torch.eye(2).bool(), (2, 2))
        >>> layer(torch.arange(4.)).tolist()
        [0.0, 1.0, 2.0, 3.0]
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
        self._indexed: _Indexed | None = None
        self._prepared: _Prepared | None = None

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        mask: Tensor,
        block_shape: BlockShape,
        bias: Tensor | None = None,
        transposed: bool = False,
    ) -> BlockSparseLinear:
        """Pack a dense weight.

        Args:
            weight: [O, I], floating point.
            mask: [R, C] bool, True = keep; what it drops is left out, zero or not.
            block_shape: (h, w), both positive.
            bias: [O] or None; taken over, not copied.
            transposed: whether the dense layer is a `Conv1D`.

        Returns:
            The layer, on the device of the weight, with its dtype and `requires_grad`.

        Raises:
            ValueError: if the mask does not fit the weight.
        """
        values, bitmap = pack(weight.detach(), mask, block_shape)
        dense_shape = (weight.shape[0], weight.shape[1])
        layer = LayerFormat(
            block_shape=block_shape, kept=values.shape[0], dense_shape=dense_shape, transposed=transposed
        )
        module = cls(layer, bias=bias is not None, device="meta")
        module.weight = nn.Parameter(values, requires_grad=weight.requires_grad)
        module.weight_block_mask = bitmap
        if bias is not None:
            module.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
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
        return to_dense(self.weight, self._index())

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., O] from x [..., I], any strides, any number of rows."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must be [..., {self.in_features}], found shape {list(x.shape)}.")
        autocast = torch.is_autocast_enabled(x.device.type)
        backward = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, self.weight, self.bias)
        )
        if autocast or (backward and (self.training or torch.compiler.is_compiling())):
            # The weight changes before the next call, or torch decides on the dtypes: nothing is worth preparing.
            return linear(x, self.dense_weight(), self.bias)
        if x.dtype != self.weight.dtype:
            raise TypeError(f"x is {x.dtype}, but the layer is {self.weight.dtype}: use x.to({self.weight.dtype}).")
        ready = self._ready()
        flat = x.reshape(-1, self.in_features)
        if backward:
            y = _WithGradient.apply(flat, self.weight, self.bias, ready)
        else:
            y = ready.backend.run(flat, ready.state, self.bias, None)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Say the shapes, for `print`."""
        layer = self.layer_format()
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block_shape={self.block_shape}, "
            f"kept={layer.kept}/{layer.num_blocks}, bias={self.bias is not None}"
        )

    def train(self, mode: bool = True) -> BlockSparseLinear:
        """Switch between training and evaluation; forgets what the backend prepared."""
        self._prepared = None
        super().train(mode)
        return self

    def _index(self) -> BlockIndex:
        cached = self._indexed
        if torch.compiler.is_compiling():
            return (cached or self._make_index()).index
        stamp = _stamp(self.weight_block_mask)
        if cached is None or not _same(cached.stamp, stamp):
            cached = self._make_index()
        return cached.index

    def _ready(self) -> _Prepared:
        cached = self._prepared
        if torch.compiler.is_compiling():
            return cached or self._prepare()
        if cached is None or not _same(cached.stamp, _stamp(self.weight, self.weight_block_mask)):
            cached = self._prepare()
        return cached

    # Both read values, which a compiled graph cannot: a first call under torch.compile leaves the graph for them.
    @torch.compiler.disable
    def _make_index(self) -> _Indexed:
        index = BlockIndex.from_bitmap(self.weight_block_mask, self.layer_format())
        self._indexed = _Indexed(_stamp(self.weight_block_mask), index)
        return self._indexed

    @torch.compiler.disable
    def _prepare(self) -> _Prepared:
        index = self._index()
        backend = choose_backend(LayerSpec(layer=index.layer, device=self.weight.device, dtype=self.weight.dtype))
        with torch.no_grad():
            state = backend.prepare(self.weight.detach(), index)
        self._prepared = _Prepared(_stamp(self.weight, self.weight_block_mask), backend, index, state)
        return self._prepared

    def _apply(self, fn: Any, recurse: bool = True) -> BlockSparseLinear:
        self._indexed = self._prepared = None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._indexed = self._prepared = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indexed": None, "_prepared": None}


@dataclass(frozen=True, eq=False)
class _Indexed:
    stamp: tuple[Any, ...]
    index: BlockIndex


@dataclass(frozen=True, eq=False)
class _Prepared:
    stamp: tuple[Any, ...]
    backend: Backend
    index: BlockIndex
    state: Any


class _WithGradient(torch.autograd.Function):
    # The backends compute no gradients; the backward pass is dense, and what falls on pruned blocks is dropped.

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, ready: _Prepared) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.index = ready.index
        return ready.backend.run(x, ready.state, bias, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        index: BlockIndex = ctx.index
        grad_x = grad @ to_dense(values, index) if ctx.needs_input_grad[0] else None
        grad_values = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_values = to_blocks(grad.t() @ x, index.layer.block_shape)[index.rows, index.cols]
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_values, grad_bias, None


def _stamp(*tensors: Tensor) -> tuple[Any, ...]:
    # Who replaces a tensor changes its identity, who writes to it raises its version. Tensors made in inference mode
    # keep no version.
    return (*tensors, *((None if t.is_inference() else t._version, t.data_ptr()) for t in tensors))


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(x is y or (type(x) is tuple and x == y) for x, y in zip(a, b, strict=True))

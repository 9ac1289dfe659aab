"""What a layer holds ready for its next call, and how it knows that it is still right."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_sparse.core.blocks import to_blocks
from hf_sparse.core.stored.packing import LayerFormat
from hf_sparse.inference.kernels import (
    Backend,
    BlockIndex,
    CountsTokens,
    GivesGradients,
    LayerSpec,
    WinsForFew,
    backend_for_few,
    choose_backend,
    get_backend,
    requested_backend,
    to_dense,
)


class Stamp:
    """A tensor as it was: who replaces it changes its identity, who writes to it raises its version.

    Example:
        >>> weight = torch.zeros(2)
        >>> stamp = Stamp(weight)
        >>> stamp.fits(weight), stamp.fits(weight.add_(1))
        (True, False)
    """

    __slots__ = ("_address", "_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        try:
            self._address = tensor.data_ptr()
        except RuntimeError as error:
            raise RuntimeError(
                "a compressed layer cannot get ready while torch.export traces it, since there are no values to read: "
                "export with hf_sparse.inference.exits.export.export_program, which lets layers get ready first."
            ) from error
        # Tensors made in inference mode keep no version.
        self._version = None if tensor.is_inference() else tensor._version

    def fits(self, tensor: Tensor | None) -> bool:
        """Tell whether this is the same tensor with the same content, as far as torch tells of writes."""
        return self.is_same(tensor) and (
            self._version is None or (tensor is not None and tensor._version == self._version)
        )

    def is_same(self, tensor: Tensor | None) -> bool:
        """Tell whether this is the same tensor in the same place, whatever was written to it."""
        return tensor is self._tensor and tensor is not None and tensor.data_ptr() == self._address


@dataclass(frozen=True, eq=False)
class Indexed:
    """The index of a bitmap."""

    mask: Stamp
    index: BlockIndex

    @classmethod
    def from_bitmap(cls, bitmap: Tensor, layer: LayerFormat) -> Indexed:
        """Read a bitmap; raises as `BlockIndex.from_bitmap` does."""
        return cls(Stamp(bitmap), BlockIndex.from_bitmap(bitmap, layer))

    def fits(self, bitmap: Tensor) -> bool:
        """Tell whether the bitmap is still the one that was read."""
        return self.mask.fits(bitmap)


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the chosen backend made of the values of a layer.

    Attributes:
        weight: the values it was made of.
        mask: the bitmap it was made of.
        backend: the choice.
        index: where the blocks belong.
        state: what `backend.prepare` gave.
        dtype: of x and of the result.
        few: calls with fewer tokens run dense.
        many: calls with more tokens run dense.
        least: calls with at most so many tokens run on the backend for all that.
        dense: [O, I], the weight for those calls; None where there are none.
        in_place: the backend, where it reads the weight itself and gives gradients; None elsewhere.
    """

    weight: Stamp
    mask: Stamp
    backend: Backend
    index: BlockIndex
    state: Any
    dtype: torch.dtype
    few: int
    many: int
    least: int
    dense: Tensor | None
    in_place: GivesGradients | None

    @classmethod
    def from_values(cls, weight: Tensor, bitmap: Tensor, index: BlockIndex, dtype: torch.dtype) -> Prepared:
        """Choose a backend and let it prepare.

        Args:
            weight: [N, h, w].
            bitmap: of the layer, for the stamp.
            index: read from the bitmap.
            dtype: to compute in; another than the weight's under autocast.

        Raises:
            ValueError: if a forced backend cannot be used.
        """
        stamps = Stamp(weight), Stamp(bitmap)
        name, values = requested_backend(), weight.detach().to(dtype)
        spec = LayerSpec(layer=index.layer, device=values.device, dtype=values.dtype)
        backend = choose_backend(spec, name)
        few, many, least, dense = 1, sys.maxsize, 0, None
        if name == "auto" and backend.name == "dense" and (choice := backend_for_few(spec)):
            backend, many = choice
            dense = to_dense(values, index)
        with torch.no_grad():
            state = backend.prepare(values, index)
            if name == "auto" and many == sys.maxsize and isinstance(backend, CountsTokens):
                wins_from = backend.from_tokens(state)
                if wins_from is None:
                    backend = get_backend("dense")
                    state = backend.prepare(values, index)
                elif wins_from > 1:
                    few, dense = wins_from, to_dense(values, index)
                    least = backend.until_tokens(spec) if isinstance(backend, WinsForFew) else 0
        in_place = backend if isinstance(backend, GivesGradients) and dense is None else None
        if in_place is not None and not in_place.follows(state, weight):
            in_place = None
        return cls(*stamps, backend, index, state, dtype, few, many, least, dense, in_place)

    def fits(self, weight: Tensor, bitmap: Tensor | None, dtype: torch.dtype) -> bool:
        """Tell whether weight and bitmap are still those it was made of, and the dtype the one that is asked for."""
        writable = self.in_place is not None and self.in_place.expects_writes(self.state)
        same = self.weight.is_same(weight) if writable else self.weight.fits(weight)
        return same and self.dtype is dtype and self.mask.fits(bitmap)

    def runs_dense(self, tokens: int) -> bool:
        """Tell whether a call with so many tokens is computed by a dense product."""
        if self.dense is None:
            return False
        return not (self.few <= tokens <= self.many or tokens <= self.least)

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute [M, O] from x [M, I]."""
        if self.runs_dense(x.shape[0]):
            dense: Any = self.dense
            return linear(x, dense, bias)
        return self.backend.run(x, self.state, bias, None)


class WithGradient(torch.autograd.Function):
    """A prepared forward pass; backward by the backend where it can, otherwise dense: pruned blocks get nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, ready: Prepared) -> Tensor:
        """Compute [M, O] from x [M, I]."""
        ctx.save_for_backward(x, values)
        ctx.ready = ready
        return ready.run(x, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x, values and bias that are asked for; differentiable itself."""
        x, values = ctx.saved_tensors
        ready: Prepared = ctx.ready
        index, grad_x, grad_values, grad_bias = ready.index, None, None, None
        # The kernels have no second derivative.
        backend = None if torch.is_grad_enabled() or ready.dense is not None else ready.backend
        if not isinstance(backend, GivesGradients):
            backend = None
        if ctx.needs_input_grad[0]:
            grad_x = None if backend is None else backend.input_gradient(grad, ready.state)
            grad_x = grad @ to_dense(values, index) if grad_x is None else grad_x
        if ctx.needs_input_grad[1]:
            grad_values = None if backend is None else backend.values_gradient(grad, x, ready.state)
            if grad_values is None:
                grad_values = to_blocks(grad.t() @ x, index.layer.block_shape)[index.rows, index.cols]
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_values, grad_bias, None

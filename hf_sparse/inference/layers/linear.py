"""`BlockSparseLinear`: a linear layer that stores only the blocks it keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hf_sparse.core.blocks import BlockShape
from hf_sparse.core.stored.packing import LayerFormat, pack, unpack_mask
from hf_sparse.inference.kernels import BlockIndex, requested_backend, to_dense
from hf_sparse.inference.layers.prepared import Indexed, Prepared, WithGradient


class BlockSparseLinear(nn.Module):
    """A linear layer, y = x @ W.T + bias, whose weight is kept as its blocks alone.

    It trains like a linear: gradients reach the kept blocks, the bias and x, and pruned blocks stay absent. What a
    backend makes of the blocks is built on the first call and again when the weight, the mask, the device or the dtype
    changes. Two changes go unseen, and want `eval()` called after them: writing through `weight.data`, and updating
    the weight of a layer in evaluation mode that `torch.compile` has compiled.

    Args:
        layer: geometry of the weight (`core.stored.packing.LayerFormat`).
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
        # torch.zeros on the meta device takes twice as long, and models are loaded there.
        bitmap = torch.empty(layer.mask_bytes, dtype=torch.uint8, device=device).zero_()
        self.register_buffer("weight_block_mask", bitmap, persistent=True)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        )
        self._indexed: Indexed | None = None
        self._prepared: Prepared | None = None

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
        return to_dense(self.weight, self.index())

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., O] from x [..., I], any strides, any number of rows."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must be [..., {self.in_features}], found shape {list(x.shape)}.")
        compiling, ready = torch.compiler.is_compiling(), self._prepared
        if (
            compiling
            and ready is not None
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type))
        ):
            # A compiled graph that looks at the weight would be one for weights of its size, and layers differ in it.
            if x.dtype is not ready.dtype:
                raise TypeError(f"x is {x.dtype}, but the layer is {ready.dtype}: use x.to({ready.dtype}).")
            y = ready.run(x.reshape(-1, self.in_features), self._parameters["bias"])
            return y.view(*x.shape[:-1], self.out_features)
        # Parameters are taken where they are stored: attribute look-ups of a module show for one token. The copies
        # that nn.DataParallel makes have them elsewhere.
        weight: Any = self._parameters.get("weight")
        weight = self.weight if weight is None else weight
        bias: Any = self._parameters["bias"] if "bias" in self._parameters else self.bias
        backward = torch.is_grad_enabled() and (
            weight.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
        )
        autocast = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
        training = backward and self.training
        if (autocast and (backward or compiling)) or (backward and compiling) or (training and not self._trains()):
            # The weight changes before the next call, or torch decides on the dtypes: nothing is worth preparing.
            return linear(x, self.dense_weight(), bias)
        dtype = weight.dtype
        if autocast:
            dtype = torch.get_autocast_dtype(x.device.type)
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        if x.dtype is not dtype:
            raise TypeError(f"x is {x.dtype}, but the layer is {dtype}: use x.to({dtype}).")
        ready = self._prepared
        if ready is None or not (compiling or ready.fits(weight, self._buffers["weight_block_mask"], dtype)):
            ready = self._prepare(dtype)
        flat = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        if backward:
            y = WithGradient.apply(flat, weight, bias, ready)
        else:
            y = ready.run(flat, bias)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def backend(self) -> str:
        """Name the backend that computes this layer outside of training."""
        ready = self._prepared
        return (ready if ready is not None else self._prepare(self.weight.dtype)).backend.name

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

    def index(self) -> BlockIndex:
        """Give where the kept blocks belong, read from the bitmap and checked."""
        cached = self._indexed
        if cached is None or not (torch.compiler.is_compiling() or cached.fits(self.weight_block_mask)):
            cached = self._make_index()
        return cached.index

    # Both read values, which a compiled graph cannot: a first call under torch.compile leaves the graph for them.
    @torch.compiler.disable
    def _make_index(self) -> Indexed:
        self._indexed = Indexed.from_bitmap(self.weight_block_mask, self.layer_format())
        return self._indexed

    @torch.compiler.disable
    def _prepare(self, dtype: torch.dtype) -> Prepared:
        self._prepared = Prepared.from_values(self.weight, self.weight_block_mask, self.index(), dtype)
        return self._prepared

    def _trains(self) -> bool:
        # Kernels that read the weight itself need no preparation when it changes; CPU kernels all have a copy.
        if self.weight.device.type == "cpu" and requested_backend() != "gpu":
            return False
        ready = self._prepared
        return (ready if ready is not None else self._prepare(self.weight.dtype)).in_place is not None

    def _apply(self, fn: Any, recurse: bool = True) -> BlockSparseLinear:
        self._indexed = self._prepared = None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._indexed = self._prepared = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indexed": None, "_prepared": None}

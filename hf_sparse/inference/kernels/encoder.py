"""The fused encoder of the native library: every layer of a BERT-shaped encoder in one call.

Shape letters: B sequences; T tokens of each; D hidden features; A heads; O, I out and in features of a linear.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_sparse.core.blocks import to_blocks
from hf_sparse.core.stored.packing import FormatError, LayerFormat
from hf_sparse.inference.kernels import library
from hf_sparse.inference.kernels.bands import to_bands, to_chunks
from hf_sparse.inference.kernels.cpu import PAIRS_ISAS, TILES_ISA, CpuWeight, check_bands
from hf_sparse.inference.kernels.reference import to_dense
from hf_sparse.inference.kernels.registry import BlockIndex

ALL_MASKED = 5
# A linear that keeps more than this runs faster as a dense one, by the least height of its blocks: float32 and pairs
# in vectors, and pairs in matrix tiles, where it is less for odd widths. Measured on encoders of MiniLM's size.
_DENSE_FROM = {8: 1.0, 4: 0.95, 2: 0.85, 1: 0.6}
_TILES_DENSE_FROM = {16: 0.9, 8: 0.7, 4: 0.35, 2: 0.2, 1: 0.1}
_TILES_ODD_WIDTH = 0.75
TILES_HEIGHT = 4  # lower bands do not fill enough of a matrix tile
HEAD_FEATURES = 8  # the size of a head is a multiple of this


class _Layer(ctypes.Structure):
    # hfs_encoder_layer
    _fields_ = [
        ("weight", ctypes.c_void_p * 6),
        ("bias", ctypes.c_void_p * 6),
        ("norm", ctypes.c_void_p * 4),
    ]


class _Encoder(ctypes.Structure):
    # hfs_encoder
    _fields_ = [
        ("layers", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("layer", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float * 2),
        ("activation", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("isa", ctypes.c_int32),
    ]


@dataclass(frozen=True, eq=False)
class LinearParts:
    """One linear of a layer.

    Attributes:
        values: [N, h, w], the kept blocks.
        index: where they belong.
        bias: [O] or None.
    """

    values: Tensor
    index: BlockIndex
    bias: Tensor | None

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None) -> LinearParts:
        """Take a dense weight [O, I] as one that keeps all its blocks."""
        rows = weight.shape[0]
        height = next(h for h in (32, 16, 8, 4, 2, 1) if rows % h == 0)
        shape = (height, weight.shape[1])
        layer = LayerFormat(block_shape=shape, kept=rows // height, dense_shape=(rows, weight.shape[1]))
        every = torch.arange(rows // height)
        index = BlockIndex(layer=layer, rows=every, cols=torch.zeros_like(every))
        return cls(to_blocks(weight.detach(), shape)[:, 0], index, bias)

    def as_it_pays(self, isa: str) -> LinearParts:
        """Give the same linear as the kernels compute it fastest: as it is, or as a dense one."""
        layer = self.index.layer
        height, width = layer.block_shape
        tiles = isa == TILES_ISA and self.values.dtype == torch.bfloat16
        limit = next(
            limit for least, limit in (_TILES_DENSE_FROM if tiles else _DENSE_FROM).items() if height >= least
        )
        if tiles and width % 2:
            limit *= _TILES_ODD_WIDTH
        if layer.kept <= limit * layer.num_blocks:
            return self
        return LinearParts.from_dense(to_dense(self.values, self.index), self.bias)


@dataclass(frozen=True, eq=False)
class LayerParts:
    """One layer: h = norm(h + output(attention(query(h), key(h), value(h)))), h = norm(h + down(activation(up(h)))).

    Attributes:
        linears: query, key, value, output, up, down.
        norms: gain and shift after attention, gain and shift at the end; each [D].
    """

    linears: tuple[LinearParts, ...]
    norms: tuple[Tensor, ...]


@dataclass(frozen=True)
class EncoderShape:
    """What all layers share.

    Attributes:
        heads: number of attention heads.
        head_size: features of a head, a multiple of 8.
        eps: of the norm after attention, and of the one at the end.
        activation: between up and down; a key of `library.ACTIVATIONS`.
    """

    heads: int
    head_size: int
    eps: tuple[float, float]
    activation: str


class AllMaskedError(ValueError):
    """A sequence has no token that is not masked."""


class NativeEncoder:
    """An encoder in the layout of the kernels.

    Args:
        layers: from the first to the last, on the CPU, float32 or bfloat16 throughout.
        shape: what they share.
        isa: instruction set; None takes the best there is, or what `HF_SPARSE_ISA` says.

    Raises:
        ValueError: if the library is not live.
        FormatError: if the parts do not fit together, or an index points outside its weight.
    """

    def __init__(self, layers: Sequence[LayerParts], shape: EncoderShape, isa: str | None = None) -> None:
        self.dtype = layers[0].linears[0].values.dtype
        dtypes = {p.values.dtype for layer in layers for p in layer.linears}
        if len(dtypes) > 1:
            raise FormatError(f"weights must be of one dtype, found {', '.join(sorted(map(str, dtypes)))}.")
        isa = isa or library.choose_isa()
        layers = [LayerParts(tuple(p.as_it_pays(isa) for p in layer.linears), layer.norms) for layer in layers]
        heights = [p.index.layer.block_shape[0] for layer in layers for p in layer.linears]
        # Pairs are made of two rows; rows that come singly are computed in float32.
        pairs = self.dtype == torch.bfloat16 and isa in PAIRS_ISAS and all(h % 2 == 0 for h in heights)
        if isa in PAIRS_ISAS and not pairs:
            isa = "avx512"
        self.isa = isa
        self.hidden = layers[0].linears[0].index.layer.dense_shape[1]
        self._weights: list[CpuWeight] = []
        self._floats: list[Tensor] = []
        structs = (_Layer * len(layers))()
        for struct, layer in zip(structs, layers, strict=True):
            for i, part in enumerate(layer.linears):
                bands = to_bands(part.values, part.index, pairs=pairs)
                if isa == TILES_ISA and part.index.layer.block_shape[0] >= TILES_HEIGHT:
                    bands = replace(bands, chunks=to_chunks(bands))
                weight = check_bands(bands, in_features=part.index.layer.dense_shape[1], dtype=self.dtype, isa=isa)
                self._weights.append(weight)
                struct.weight[i] = weight.address
                struct.bias[i] = None if part.bias is None else self._float(part.bias, weight.out_features)
            for i, norm in enumerate(layer.norms):
                struct.norm[i] = self._float(norm, self.hidden)
        self._layers = structs
        self._scale = 1 / math.sqrt(shape.head_size)
        self._struct = _Encoder(
            layers=len(layers),
            hidden=self.hidden,
            heads=shape.heads,
            head_size=shape.head_size,
            intermediate=layers[0].linears[4].index.layer.dense_shape[0],
            layer=ctypes.addressof(structs),
            scale=self._scale,
            eps=shape.eps,
            activation=library.ACTIVATIONS[shape.activation],
            dtype=library.DTYPES[self.dtype],
            isa=library.ISAS.index(isa),
        )
        handle: Any = library.load_library().handle
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        handle.hfs_encoder_check.argtypes = [pointer]
        handle.hfs_encoder_run.argtypes = [pointer, pointer, pointer, size, size, pointer, pointer, ctypes.c_int]
        self._run = handle.hfs_encoder_run
        self._address = ctypes.addressof(self._struct)
        if code := handle.hfs_encoder_check(self._address):
            raise FormatError(f"the layers do not make an encoder: {library.STATUS[code]}.")

    def _float(self, tensor: Tensor, size: int) -> int:
        if tensor.shape != (size,) or not tensor.is_cpu:
            raise FormatError(f"expected a vector [{size}] on the CPU, found {list(tensor.shape)} on {tensor.device}.")
        kept = tensor.detach().to(torch.float32).contiguous()
        self._floats.append(kept)
        return kept.data_ptr()

    def pad_bias(self, bias: Tensor) -> Tensor:
        """Bring a position bias into the layout of the kernels.

        Args:
            bias: [A, T queries, T keys], what is added to the scores of every sequence.

        Returns:
            [A, keys, queries] float32, padded, for `run`.
        """
        padding = -bias.shape[-1] % 16
        turned = bias.detach().float().transpose(1, 2) / self._scale
        return torch.nn.functional.pad(turned, (0, padding, 0, padding)).contiguous()

    def run(self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Run all layers.

        Args:
            x: [B, T, D] on the CPU, of the dtype of the weights, contiguous.
            mask: [B, T] float32, added to the scores of a key: 0 for a token, -inf for padding. None sees all.
            bias: what `pad_bias` gave for T tokens.

        Returns:
            [B, T, D], what the last layer gives, for padding as well.

        Raises:
            AllMaskedError: if a sequence has no token that is not masked.
            ValueError: if a tensor has another shape, dtype or device.
        """
        batch, length = x.shape[0], x.shape[1]
        if x.shape[2:] != (self.hidden,) or x.dtype != self.dtype or not (x.is_cpu and x.is_contiguous()):
            raise ValueError(
                f"x must be contiguous {self.dtype} [batch, length, {self.hidden}] on the CPU, found {x.dtype} "
                f"{list(x.shape)} on {x.device}."
            )
        if mask is not None and (
            mask.shape != (batch, length) or mask.dtype != torch.float32 or not mask.is_contiguous() or not mask.is_cpu
        ):
            raise ValueError(
                f"mask must be contiguous float32 [{batch}, {length}], found {mask.dtype} {list(mask.shape)}."
            )
        padded = length + -length % 16
        square = (self._struct.heads, padded, padded)
        if bias is not None and (
            bias.shape != square or bias.dtype != torch.float32 or not bias.is_contiguous() or not bias.is_cpu
        ):
            raise ValueError(
                f"bias must be what pad_bias gives, {list(square)}, found {bias.dtype} {list(bias.shape)}."
            )
        y = torch.empty_like(x)
        code = self._run(
            self._address,
            x.data_ptr(),
            y.data_ptr(),
            batch,
            length,
            None if mask is None else mask.data_ptr(),
            None if bias is None else bias.data_ptr(),
            torch.get_num_threads(),
        )
        if code == ALL_MASKED:
            raise AllMaskedError("a sequence has no token that is not masked.")
        if code:
            raise RuntimeError(f"the native encoder refused {batch} x {length} tokens: {library.STATUS[code]}.")
        return y

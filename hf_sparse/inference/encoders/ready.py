"""What the kernels made of an encoder, and how to tell in every call that it is still true."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.core.stored.packing import FormatError
from hf_sparse.inference.encoders.families import Family, UnsupportedError, read_encoder
from hf_sparse.inference.kernels import library
from hf_sparse.inference.kernels.encoder import NativeEncoder
from hf_sparse.inference.layers.linear import BlockSparseLinear

_version = attrgetter("_version")


class Ready:
    """What the kernels made of an encoder, or why they could not, and how to tell that it is still true."""

    def __init__(self, encoder: Any, family: Family) -> None:
        self.modules = list(encoder.modules())
        self._classes = list(map(type, self.modules))
        # The lists that slicing makes are in training mode, which changes nothing.
        self.switched = [m for m in self.modules if type(m) is not nn.ModuleList]
        self._children_of = [m._modules for m in self.modules if m._modules]
        self._tensors_of = [d for m in self.modules for d in (m._parameters, m._buffers) if d]
        self.hooks = [d for m in self.modules[1:] for d in (m._forward_hooks, m._forward_pre_hooks)]
        self.attributes = [m.__dict__ for m in self.modules[1:]]
        self._children, self._entries = self._now()
        self.tensors = [t for t in self._entries if t is not None]
        self._addresses = list(map(Tensor.data_ptr, self.tensors))
        # Tensors made in inference mode keep no version.
        self._versioned = [t for t in self.tensors if not t.is_inference()]
        self._versions = list(map(_version, self._versioned))
        self.native: NativeEncoder | None = None
        self.position_bias: tuple[int, Tensor] | None = None
        try:
            self.native = self._build(encoder, family)
            self.reason = f"{self.native.isa} kernels, {len(encoder.layer)} layers"
        except (UnsupportedError, FormatError) as error:
            self.reason = str(error)

    def _build(self, encoder: Any, family: Family) -> NativeEncoder:
        if not any(isinstance(m, BlockSparseLinear) for m in self.modules):
            raise UnsupportedError("it has no compressed layers")
        if not library.load_library().isas:
            raise UnsupportedError(library.load_library().reason)
        if not all(type(t) in (Tensor, nn.Parameter) for t in self.tensors):
            raise UnsupportedError("its parameters are not all plain tensors")
        types = {(t.dtype, t.device.type) for t in self.tensors if t.is_floating_point()}
        dtype, device = types.pop()
        if types or device != "cpu" or dtype not in library.DTYPES:
            raise UnsupportedError("its parameters are not all float32, or all bfloat16, on the CPU")
        with torch.no_grad(), torch.device("cpu"):
            return NativeEncoder(*read_encoder(encoder, family))

    def _now(self) -> tuple[list[Any], list[Any]]:
        # Both run in every call: nothing here is a loop of Python's.
        children = chain.from_iterable(map(dict.values, self._children_of))
        return list(children), list(chain.from_iterable(map(dict.values, self._tensors_of)))

    def fits(self) -> bool:
        """Tell whether modules and tensors are still those it was made of, as far as torch tells of writes."""
        children, entries = self._now()
        return (
            len(children) == len(self._children)
            and all(map(is_, children, self._children))
            and len(entries) == len(self._entries)
            and all(map(is_, entries, self._entries))
            and list(map(Tensor.data_ptr, self.tensors)) == self._addresses
            and list(map(_version, self._versioned)) == self._versions
            and list(map(type, self.modules)) == self._classes
        )

"""`BlockSparseExperts`: the fused experts of a mixture, of which only the kept blocks are stored."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.core.formats import MASK_SUFFIX, LayerFormat
from hf_sparse.core.packing import pack
from hf_sparse.inference.kernels import to_dense
from hf_sparse.inference.prepared import Indexed, Stamp

# What a copy of a module must not share with it: the next entry would show up in both.
_CONTAINERS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
# What belongs to the module itself; the last three are of accelerate, which wraps the forward of a module by itself.
_OWN = ("dense_class", "_formats", "_indexed", "_ready", "block_mask", "forward", "_old_forward", "_hf_hook")


class BlockSparseExperts(nn.Module):
    """A module of fused experts in which parameters [E, O, I] are kept as their blocks alone.

    It computes what the dense module computes, by that module's own code: a stand-in of its class is handed the
    weights laid out dense. Outside of training they are laid out once, on the first call, and again when the blocks,
    their bitmap, device or dtype change. It trains: gradients reach the kept blocks, and pruned ones stay absent.

    Args:
        dense: the module whose place it takes; its parameters, buffers, submodules and settings are taken over, not
            copied, those of `formats` excepted.
        formats: {name of a parameter: geometry} of those that are compressed. Their contents are not initialised, and
            they lie on the meta device.

    Attributes:
        NAME: for each of them [N, h, w], the kept blocks, those of the first expert first.
        NAME_block_mask: for each of them the uint8 bitmap (docs/format.md).
        dense_class: class of the module that it stands for.
    """

    def __init__(self, dense: nn.Module, formats: Mapping[str, LayerFormat]) -> None:
        super().__init__()
        self.__dict__.update({key: value for key, value in vars(dense).items() if key not in _OWN})
        for container in _CONTAINERS:
            self.__dict__[container] = copy.copy(vars(dense)[container])
        self.dense_class = type(dense)
        self._formats = dict(formats)
        self._indexed: dict[str, Indexed] = {}
        self._ready: tuple[dict[str, Stamp], nn.Module] | None = None
        for part, layer in formats.items():
            weight: Any = getattr(dense, part)
            values = torch.empty(layer.values_shape, device="meta", dtype=weight.dtype)
            self._parameters[part] = nn.Parameter(values, requires_grad=weight.requires_grad)
            self.register_buffer(part + MASK_SUFFIX, torch.empty(layer.mask_bytes, dtype=torch.uint8, device="meta"))

    @classmethod
    def from_dense(cls, dense: nn.Module, masks: Mapping[str, tuple[Tensor, LayerFormat]]) -> BlockSparseExperts:
        """Pack the weights of a module.

        Args:
            dense: the module of experts; not changed.
            masks: {name of a parameter: (mask [R, C] over [E * O, I], geometry)}.
        """
        made = cls(dense, {part: layer for part, (_, layer) in masks.items()})
        for part, (mask, layer) in masks.items():
            weight: Any = getattr(dense, part)
            values, bitmap = pack(weight.detach().flatten(0, 1), mask, layer.block_shape)
            made._parameters[part] = nn.Parameter(values, requires_grad=weight.requires_grad)
            made._buffers[part + MASK_SUFFIX] = bitmap
        return made

    def layer_formats(self) -> dict[str, LayerFormat]:
        """Give the geometry of each compressed parameter, as `config.json` states it."""
        return dict(self._formats)

    def dense_weights(self) -> dict[str, Tensor]:
        """Give each compressed parameter as [E, O, I], zero where blocks were left out. Differentiable in them."""
        weights = {}
        for part, layer in self._formats.items():
            values: Any = getattr(self, part)
            weights[part] = to_dense(values, self._index(part).index).view(layer.stored_shape)
        return weights

    def to_dense_module(self) -> nn.Module:
        """Give the module that it stands for, with parameters of its own for what was compressed."""
        grads = {part: getattr(self, part).requires_grad for part in self._formats}
        weights = {part: weight.detach() for part, weight in self.dense_weights().items()}
        made = self._stand_in({})
        for part, weight in weights.items():
            made._parameters[part] = nn.Parameter(weight, requires_grad=grads[part])
        # In the order of the class.
        made._parameters = {part: made._parameters[part] for part in self._parameters}
        return made

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the dense module computes; takes and gives the same."""
        trains = torch.is_grad_enabled() and any(getattr(self, part).requires_grad for part in self._formats)
        if trains or torch.compiler.is_compiling():
            return self._stand_in(self.dense_weights()).forward(*args, **kwargs)
        # Not by calling it: the hooks of this module have run, and are those of the stand-in as well.
        return self._prepared().forward(*args, **kwargs)

    def _prepared(self) -> nn.Module:
        tensors = {name: getattr(self, name) for part in self._formats for name in (part, part + MASK_SUFFIX)}
        if self._ready is None or not all(stamp.fits(tensors[name]) for name, stamp in self._ready[0].items()):
            with torch.no_grad():
                stamps = {name: Stamp(tensor) for name, tensor in tensors.items()}
                self._ready = (stamps, self._stand_in(self.dense_weights()))
        return self._ready[1]

    def _stand_in(self, weights: Mapping[str, Tensor]) -> nn.Module:
        made: nn.Module = self.dense_class.__new__(self.dense_class)
        made.__dict__.update({key: value for key, value in vars(self).items() if key not in _OWN})
        for container in _CONTAINERS:
            held = vars(self)[container]
            made.__dict__[container] = {**held} if isinstance(held, dict) else {*held}
        for part in self._formats:
            del made._parameters[part], made._buffers[part + MASK_SUFFIX]
        # Plain attributes: found before parameters, and differentiable.
        made.__dict__.update(weights)
        return made

    def _index(self, part: str) -> Indexed:
        found = self._indexed.get(part)
        if found is None or not (torch.compiler.is_compiling() or found.fits(getattr(self, part + MASK_SUFFIX))):
            found = self._make_index(part)
        return found

    # It reads values, which a compiled graph cannot: a first call under torch.compile leaves the graph for it.
    @torch.compiler.disable
    def _make_index(self, part: str) -> Indexed:
        self._indexed[part] = Indexed.from_bitmap(getattr(self, part + MASK_SUFFIX), self._formats[part])
        return self._indexed[part]

    def extra_repr(self) -> str:
        """Say the shapes, for `print`."""
        parts = (
            f"{part}=[{'x'.join(map(str, layer.stored_shape))}], block_shape={layer.block_shape}, "
            f"kept={layer.kept}/{layer.num_blocks}"
            for part, layer in self._formats.items()
        )
        return f"{self.dense_class.__name__}, {', '.join(parts)}"

    def train(self, mode: bool = True) -> BlockSparseExperts:
        """Switch between training and evaluation; forgets what was laid out."""
        self._ready = None
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> BlockSparseExperts:
        self._indexed, self._ready = {}, None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._indexed, self._ready = {}, None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indexed": {}, "_ready": None}

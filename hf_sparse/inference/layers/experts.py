"""`BlockSparseExperts`: the fused experts of a mixture, of which only the kept blocks are stored."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.core.stored.formats import MASK_SUFFIX, LayerFormat
from hf_sparse.core.stored.packing import pack
from hf_sparse.inference.kernels import to_dense
from hf_sparse.inference.layers.expert_linears import ExpertLinears
from hf_sparse.inference.layers.prepared import Indexed, Stamp

# What a copy of a module must not share with it: the next entry would show up in both.
_CONTAINERS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
# What belongs to the module itself; the last three are of accelerate, which wraps the forward of a module by itself.
_OWN = ("dense_class", "_formats", "_indexed", "_ready", "block_mask", "forward", "_old_forward", "_hf_hook")


@dataclass(eq=False)
class _Ready:
    """What holds until blocks or bitmaps change."""

    stamps: dict[str, Stamp]
    linears: ExpertLinears | None
    dense: nn.Module | None = None


class BlockSparseExperts(nn.Module):
    """A module of fused experts in which parameters [E, O, I] are kept as their blocks alone.

    It computes what the dense module computes. Where sparse kernels are no slower, each expert runs on its kept
    blocks (`inference.layers.expert_linears`). Elsewhere the dense module's own code does it: a stand-in of its class
    is handed the weights laid out dense. Outside of training that is done once, on the first call, and again when the
    blocks, their bitmap, device or dtype change. It trains: gradients reach the kept blocks, and pruned ones stay
    absent.

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
        self._ready: _Ready | None = None
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
        ready = self._prepared()
        if ready.linears is not None and ready.linears.takes(*args, **kwargs):
            return ready.linears.run(self, *args)
        if ready.dense is None:
            with torch.no_grad():
                ready.dense = self._stand_in(self.dense_weights())
        # Not by calling it: the hooks of this module have run, and are those of the stand-in as well.
        return ready.dense.forward(*args, **kwargs)

    def backends(self) -> list[str]:
        """Name what computes each linear of each expert; "dense" where the module of the dense class does."""
        linears = self._prepared().linears
        if linears is None:
            return ["dense"] * sum(layer.experts for layer in self._formats.values())
        return [linear.backend.name for linear in (*linears.into, *linears.out)]

    def apply_gate(self, units: Tensor) -> Tensor:
        """Compute the units of one expert [T, F] from its gates and their inputs [T, 2F], as the dense class does."""
        dense: Any = self.dense_class
        found: Tensor = dense._apply_gate(self, units)
        return found

    def _prepared(self) -> _Ready:
        tensors = {name: getattr(self, name) for part in self._formats for name in (part, part + MASK_SUFFIX)}
        ready = self._ready
        if ready is None or not all(stamp.fits(tensors[name]) for name, stamp in ready.stamps.items()):
            with torch.no_grad():
                stamps = {name: Stamp(tensor) for name, tensor in tensors.items()}
                ready = self._ready = _Ready(stamps, ExpertLinears.of(self, self._formats))
        return ready

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

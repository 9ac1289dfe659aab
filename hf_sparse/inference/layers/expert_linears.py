"""Experts computed one by one on their kept blocks, where that is no slower than all of them on dense weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.core.stored.formats import LayerFormat
from hf_sparse.core.stored.packing import pack_mask, unpack_mask
from hf_sparse.inference.kernels import BlockIndex, requested_backend
from hf_sparse.inference.layers.prepared import Prepared

# Below that many weights in a linear of one expert, going through experts in Python may cost more than kernels save:
# side by side with transformers' own ways, experts of 2**16 weights broke even and those of 2**13 lost.
MIN_WEIGHTS = 2**17


@dataclass(frozen=True, eq=False)
class ExpertLinears:
    """The two linears of every expert, each on the backend that suits its density.

    Attributes:
        into: of each expert, what leads from hidden states to its units.
        out: of each expert, what leads back.
        gated: whether `into` holds a gate and its input.
        dtype: of hidden states.
    """

    into: tuple[Prepared, ...]
    out: tuple[Prepared, ...]
    gated: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, experts: nn.Module, formats: Mapping[str, LayerFormat]) -> ExpertLinears | None:
        """Prepare the experts of a module; None where dense weights do as well or better.

        Args:
            experts: a `BlockSparseExperts`; its `has_gate`, `has_bias` and the like say what experts compute.
            formats: geometry of its compressed parameters.

        Raises:
            ValueError: if a forced backend cannot be used.
        """
        module: Any = experts
        gated = getattr(module, "has_gate", True)
        first = "gate_up_proj" if gated else "up_proj"
        names, backend = (first, "down_proj"), requested_backend()
        if set(formats) != set(names) or getattr(module, "has_bias", True) or backend == "dense":
            return None
        values: Tensor = getattr(module, first)
        sizes = [layer.dense_shape[0] * layer.dense_shape[1] // layer.experts for layer in formats.values()]
        # On a GPU one call for all experts has not been beaten by one call for each.
        if backend == "auto" and (values.device.type != "cpu" or min(sizes) < MIN_WEIGHTS):
            return None
        into, out = (_prepare(module, name, formats[name]) for name in names)
        if all(linear.backend.name == "dense" for linear in (*into, *out)):
            return None
        return cls(into=into, out=out, gated=gated, dtype=values.dtype)

    def takes(self, *args: Any, **kwargs: Any) -> bool:
        """Tell whether it computes a call: three tensors, of the dtype of the weights, without gradients asked for."""
        if len(args) != 3 or kwargs or not all(isinstance(given, Tensor) for given in args):
            return False
        hidden = args[0]
        if hidden.ndim != 2 or hidden.dtype != self.dtype or torch.is_autocast_enabled(hidden.device.type):
            return False
        return not (torch.is_grad_enabled() and any(given.requires_grad for given in args))

    def run(self, experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute what the experts make of hidden states [T, D], each its own, weighted and summed.

        Args:
            experts: the module, for its gate, activation and norm.
            hidden: [T, D].
            index: [T, K], the experts of each token; what is no number of one is left out.
            weights: [T, K], their weights.
        """
        result = torch.zeros_like(hidden)
        for number in index.unique().tolist():
            if not 0 <= number < len(self.into):
                continue
            tokens, slots = (index == number).nonzero(as_tuple=True)
            units = self.into[number].run(hidden[tokens], None)
            units = experts.apply_gate(units) if self.gated else experts.act_fn(units)
            found = self.out[number].run(units, None)
            if getattr(experts, "has_post_expert_norm", False):
                found = experts.post_expert_norm(found)
            found = found * weights[tokens, slots, None]
            result.index_add_(0, tokens, found.to(result.dtype))
        return result


def _prepare(module: nn.Module, name: str, layer: LayerFormat) -> tuple[Prepared, ...]:
    values: Any = getattr(module, name)
    bitmap: Any = getattr(module, f"{name}_block_mask")
    # The blocks of an expert lie one after the other.
    masks = unpack_mask(bitmap, layer.grid).view(layer.experts, -1, layer.grid[1])
    parts = values.detach().split(masks.flatten(1).sum(1).tolist())
    shape = (layer.dense_shape[0] // layer.experts, layer.dense_shape[1])
    prepared = []
    for mask, part in zip(masks, parts, strict=True):
        one = replace(layer, kept=part.shape[0], dense_shape=shape, experts=0)
        index = BlockIndex(one, *mask.nonzero(as_tuple=True))
        prepared.append(Prepared.from_values(part, pack_mask(mask), index, part.dtype))
    return tuple(prepared)

"""Fused encoders: a whole stack of compressed layers in one native call, wherever it computes the same.

`fuse` gives every encoder of a known family inside a compressed model a class of its own, a subclass of its class
that differs in `forward` alone: parameters, names and state_dict stay the model's. Each call decides anew whether the
kernels can take it, and otherwise runs what the model would have run.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from itertools import repeat
from operator import attrgetter, contains
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from transformers import modeling_outputs
from transformers.utils import output_capturing

from hf_sparse.inference.encoders.families import (
    FAMILIES,
    Family,
    attention_of,
    find_family,
)
from hf_sparse.inference.encoders.ready import Ready
from hf_sparse.inference.kernels import requested_backend
from hf_sparse.inference.kernels.encoder import AllMaskedError, NativeEncoder
from hf_sparse.inference.layers.linear import BlockSparseLinear

ENV_ENCODER = "HF_SPARSE_ENCODER"
CHOICES = ("auto", "off")

_PREFIX = "Fused"
# Arguments of an encoder that do not change what its layers compute; any other steps aside if it is set.
_HARMLESS = frozenset({"position_ids", "return_dict"})
_training = attrgetter("training")


class FusedEncoder(nn.Module):
    """What the class of a fused encoder adds to the class that the model gave it.

    Changes that torch does not tell of go unseen until the model was in training mode again (`train()`, then
    `eval()`): writing through `.data`, and setting plain attributes such as `eps`.
    """

    _family: Family

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Run all layers; arguments and result are those of the model's own encoder."""
        y = None
        if not torch.compiler.is_compiling() and _concerns(self, hidden_states, args, kwargs):
            y = _run(self, hidden_states, attention_mask)
        if y is None:
            plain: Any = super().forward
            return plain(hidden_states, attention_mask, *args, **kwargs)
        if self._family.tuples and not kwargs.get("return_dict"):
            return (y,)
        return getattr(modeling_outputs, self._family.output)(last_hidden_state=y)

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation; a switch forgets what the kernels made of the layers."""
        # Not every call: some libraries call eval() before each batch.
        if mode != self.training:
            self.__dict__.pop("_ready", None)
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_ready", None)  # made of addresses; the copy makes its own
        return state


def _concerns(encoder: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    # Cheap questions first: is this inference on the CPU that asks for nothing but the last hidden states?
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.ndim == 3
        and not encoder.training
        and all(a is None for a in args)
        and all(v is None or v is False or k in _HARMLESS for k, v in kwargs.items())
        and not output_capturing._active_collector.get()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and x.numel() > 0
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not (nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)
        and requested_encoder() == "auto"
        and requested_backend() in ("auto", "cpu")
    )


def _run(encoder: Any, x: Tensor, mask: Tensor | None) -> Tensor | None:
    ready = _ready(encoder)
    native = ready.native
    if native is None or x.dtype is not native.dtype or x.shape[2] != native.hidden:
        return None
    inputs = (x,) if mask is None else (x, mask)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *ready.tensors)):
        return None
    if any(map(_training, ready.switched)) or any(map(contains, ready.attributes, repeat("forward"))):
        return None
    if any(ready.hooks) and not all(_captures(hook) for hooks in ready.hooks for hook in hooks.values()):
        return None
    attention = attention_of(encoder, encoder._family)
    if attention not in ("sdpa", "eager"):
        return None
    keys = None
    if mask is not None:
        # Only one of them takes True for "seen"; the other would add it to the scores.
        keys = _key_mask(mask, x) if mask.dtype is not torch.bool or attention == "sdpa" else None
        if keys is None:
            return None
    try:
        return native.run(x.contiguous(), keys, _position_bias(encoder, ready, native, x))
    except AllMaskedError:
        return None


def _ready(encoder: Any) -> Ready:
    ready: Ready | None = encoder.__dict__.get("_ready")
    if ready is None or not ready.fits():
        ready = Ready(encoder, encoder._family)
        encoder.__dict__["_ready"] = ready
    return ready


def _captures(hook: Any) -> bool:
    # transformers leaves its hooks behind when hidden states were asked for once; they do nothing in other calls.
    return getattr(hook, "__module__", None) == output_capturing.__name__


def _key_mask(mask: Tensor, x: Tensor) -> Tensor | None:
    # [B or 1, 1, T or 1, T] -> [B, T] to add to scores; None where queries differ in what they see.
    batch, length = x.shape[0], x.shape[1]
    if type(mask) is not Tensor or mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[3] != length:
        return None
    if mask.shape[0] not in (1, batch) or mask.shape[2] not in (1, length) or not mask.is_cpu:
        return None
    first = mask[:, 0, 0]
    if mask.shape[2] > 1 and mask.stride(2) and not torch.equal(mask[:, 0], first[:, None].expand_as(mask[:, 0])):
        return None
    if mask.dtype is torch.bool:
        keys = torch.zeros_like(first, dtype=torch.float32).masked_fill_(~first, float("-inf"))
    elif mask.is_floating_point():
        keys = first.to(torch.float32)
    else:
        return None
    return keys.expand(batch, length).contiguous()


def _position_bias(encoder: Any, ready: Ready, native: NativeEncoder, x: Tensor) -> Tensor | None:
    if not encoder._family.position_bias:
        return None
    # Another thread may replace it meanwhile.
    cached = ready.position_bias
    if cached is None or cached[0] != x.shape[1]:
        bias = encoder.compute_position_bias(x[:1])[0]
        ready.position_bias = cached = (x.shape[1], native.pad_bias(bias))
    return cached[1]


def requested_encoder() -> str:
    """Read `HF_SPARSE_ENCODER`.

    Raises:
        ValueError: if it is set to something that is not a choice.
    """
    name = os.environ.get(ENV_ENCODER) or "auto"
    if name not in CHOICES:
        raise ValueError(f"{ENV_ENCODER}={name!r} is not a choice: use one of {', '.join(CHOICES)}.")
    return name


def fuse(model: nn.Module) -> nn.Module:
    """Let the native kernels run the encoders of a compressed model, where they know them.

    Args:
        model: changed in place; encoders without compressed layers are left alone. Calling it again changes nothing.

    Returns:
        The model.
    """
    for module in model.modules():
        plain: Any = type(module)
        if find_family(plain) and any(isinstance(m, BlockSparseLinear) for m in module.modules()):
            module.__class__ = _fused_class(plain)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give fused encoders back the class that the model gave them; in place, returns the model."""
    for module in model.modules():
        if isinstance(module, FusedEncoder):
            module.__dict__.pop("_ready", None)
            module.__class__ = type(module).__bases__[1]
    return model


def fused_encoders(model: nn.Module) -> dict[str, str]:
    """Tell of every encoder of a known family whether the native kernels run it, and why (not).

    Args:
        model: as `from_pretrained` gave it.

    Returns:
        {module name: "fused: ..." or "not fused: ..."}, for the dtype and device that the model has now.
    """
    told = {}
    for name, module in model.named_modules():
        if isinstance(module, FusedEncoder):
            ready = _ready(module)
            off = requested_encoder() == "off" or requested_backend() not in ("auto", "cpu")
            reason = "the environment forbids it" if off else ready.reason
            told[name] = f"{'not fused' if off or ready.native is None else 'fused'}: {reason}"
        elif find_family(type(module)):
            compressed = any(isinstance(m, BlockSparseLinear) for m in module.modules())
            told[name] = f"not fused: {'fuse was not called' if compressed else 'it has no compressed layers'}"
    return told


@cache
def _fused_class(plain: type) -> type:
    return type(
        _PREFIX + plain.__name__, (FusedEncoder, plain), {"__module__": __name__, "_family": find_family(plain)}
    )


def __getattr__(name: str) -> type:
    # Pickle finds a class by its name, in a process that may not have fused anything yet.
    for model in (model for family in FAMILIES for model in family.models) if name.startswith(_PREFIX) else ():
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        plain = getattr(module, name.removeprefix(_PREFIX), None)
        if isinstance(plain, type) and find_family(plain):
            return _fused_class(plain)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

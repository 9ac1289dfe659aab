"""A checked checkpoint on the CPU, put into its model without a detour.

transformers takes every tensor through a thread, a conversion and a look-up by name. A compressed model has more
tensors than a dense one and would load slower for it, though every tensor has been matched and checked already.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hf_sparse.core.stored.formats import MASK_SUFFIX, LayerFormat
from hf_sparse.inference.layers.experts import BlockSparseExperts
from hf_sparse.inference.layers.linear import BlockSparseLinear
from hf_sparse.inference.stored.checkpoint import FLOATS, Headers
from hf_sparse.inference.stored.matching import Matches

# The mark by which transformers knows what it need not initialise.
_FILLED = "_is_hf_initialized"
_CPU = (None, {"": "cpu"}, {"": torch.device("cpu")})


def replace_layers(matches: Matches, formats: Mapping[str, LayerFormat]) -> None:
    """Put compressed layers, on the meta device, in the place of dense ones, in the model and in `matches`.

    Args:
        matches: what belongs where in a model on the meta device.
        formats: {name in the checkpoint: geometry}.
    """
    modules = matches.modules
    experts: dict[str, dict[str, LayerFormat]] = {}
    for name, local in matches.layers.items():
        parent, _, child = local.rpartition(".")
        if formats[name].experts:
            experts.setdefault(parent, {})[child] = formats[name]
            continue
        dense: Any = modules[local]
        layer = BlockSparseLinear(formats[name], dense.bias is not None, device="meta", dtype=dense.weight.dtype)
        layer.training = dense.training
        modules[local] = modules[parent]._modules[child] = layer
    for name, parts in experts.items():
        parent, _, child = name.rpartition(".")
        modules[name] = modules[parent]._modules[child] = BlockSparseExperts(modules[name], parts)


def fill(model: Any, headers: Headers, matches: Matches, device_map: Any) -> frozenset[str]:
    """Give a model the tensors of its checkpoint, and hide them from transformers until `unhide`.

    Left to transformers: everything where it is to lie on another device or some layers are to keep float32; tensors
    that are no floats, are tied to others, or have another shape in the model.

    Args:
        model: a `PreTrainedModel` on the meta device, with its compressed layers.
        headers: of its checkpoint.
        matches: which tensor of it belongs where.
        device_map: as `from_pretrained` has it.

    Returns:
        The names in the model of what is left to transformers.
    """
    bitmaps = {key + MASK_SUFFIX: local + MASK_SUFFIX for key, local in matches.weights.items()}
    every = matches.expected.union(bitmaps.values())
    if device_map not in _CPU or _keeps_float32(model):
        return every
    tied = set(model.all_tied_weights_keys or ())
    filled = set()
    for key, local in (matches.tensors | bitmaps).items():
        owner, _, part = local.rpartition(".")
        module = matches.modules.get(owner)
        if module is not None and local not in tied and _fill_one(module, part, headers, key):
            filled.add(local)
    for module in matches.modules.values():
        # Every other module may have to compute what no file holds, such as the frequencies of rotary positions.
        if not module._modules and all(t is None or hasattr(t, _FILLED) for t in _own_tensors(module)):
            vars(module)[_FILLED] = True
    left = every - filled
    _hide(model, left, unexpected=headers.tensors.keys() - matches.tensors.keys() - bitmaps.keys())
    return left


def unhide(model: Any) -> None:
    """End what `fill` began, when transformers has loaded the rest."""
    if "state_dict" in vars(model):
        del model.state_dict
        model._keys_to_ignore_on_load_unexpected = model.__dict__.pop("_ignored_before_filling")


def _fill_one(module: nn.Module, part: str, headers: Headers, key: str) -> bool:
    places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    place = next((place for place in places if place.get(part) is not None), None)
    found = headers.tensors[key]
    if place is None or place[part].shape != found.shape:
        return False
    if key in headers.bitmaps:
        tensor = headers.bitmaps[key]
    elif found.dtype in FLOATS and place[part].dtype.is_floating_point:
        tensor = headers.files[found.file].get_tensor(key).to(place[part].dtype)
    else:
        return False
    place[part] = tensor = nn.Parameter(tensor) if place is module._parameters else tensor
    # Without this mark transformers fills it with random numbers.
    setattr(tensor, _FILLED, True)
    return True


def _own_tensors(module: nn.Module) -> Iterator[Any]:
    yield from module._parameters.values()
    yield from module._buffers.values()


def _hide(model: Any, left: frozenset[str], unexpected: set[str]) -> None:
    # transformers learns from the state_dict what there is to load, and reports the tensors that it has no place for.
    def state_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
        whole = type(model).state_dict(model, *args, **kwargs) if left else {}
        return {key: value for key, value in whole.items() if key in left}

    model.state_dict = state_dict
    model._ignored_before_filling = model._keys_to_ignore_on_load_unexpected
    reported = "|".join(map(re.escape, sorted(unexpected)))
    hidden = rf"^(?!({reported})$)" if unexpected else ""
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), hidden}


def _keeps_float32(model: Any) -> bool:
    kept = (model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict)
    return any(kept) and model.dtype in (torch.float16, torch.bfloat16)

"""What of a checkpoint belongs where in a model, and whether it fits: names, kinds and shapes, before any weight."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_sparse.core.stored.formats import FormatError, LayerFormat
from hf_sparse.core.structure.experts import experts_parts
from hf_sparse.core.structure.targets import find_stacks, is_conv1d, is_linear, weight_view
from hf_sparse.inference.stored.checkpoint import FLOATS, Headers


@dataclass(frozen=True)
class Matches:
    """What of a checkpoint belongs where in a model.

    Attributes:
        layers: {name in the checkpoint: name in the model} of the compressed layers; without those of a head that this
            class does not have.
        weights: the same for the tensors of their kept blocks.
        tensors: {name in the checkpoint: name in the model} of all tensors but the bitmaps.
        expected: names in the model of all tensors that a dense checkpoint of it has.
        modules: {name in the model: module}, dense.
    """

    layers: dict[str, str]
    weights: dict[str, str]
    tensors: dict[str, str]
    expected: frozenset[str]
    modules: dict[str, nn.Module]


def match_modules(model: Any, headers: Headers, formats: dict[str, LayerFormat]) -> Matches:
    """Find the compressed layers in a model and check them and their neighbours against it.

    A checkpoint of a model with a head and one of the bare model differ by the prefix `model.base_model_prefix`; both
    load into both, as always in transformers.

    Args:
        model: a `PreTrainedModel` on the meta device, dense.
        headers: of its checkpoint.
        formats: {name in the checkpoint: geometry}.

    Raises:
        FormatError: if a layer is missing in the model or is no linear of that shape there, or if a tensor beside the
            compressed layers is missing in the checkpoint or has another shape.
    """
    state, modules = model.state_dict(keep_vars=True), dict(model.named_modules())
    local_names = _local_names(model, headers, state)
    matched, weights = {}, {}
    for name, layer in formats.items():
        local = local_names.get(layer.weight_key(name), "")
        if not local:
            if _may_be_absent(model, headers, name):
                continue
            raise FormatError(
                f"config.json lists the compressed layer {name!r}, which {type(model).__name__} as configured lacks."
            )
        weights[layer.weight_key(name)] = local
        matched[name] = local if layer.experts else local.removesuffix(".weight")
        (_check_experts if layer.experts else _check_linear)(modules, matched[name], name, layer)
    names = Counter(local_names.values())
    for local in weights.values():
        if names[local] > 1:
            twice = [key for key, found in local_names.items() if found == local]
            raise FormatError(f"the checkpoint holds {local} twice, as {' and as '.join(twice)}.")
    _check_neighbours(model, headers, state, local_names, set(weights.values()))
    return Matches(matched, weights, local_names, frozenset(state), modules)


def _check_experts(modules: dict[str, Any], local: str, name: str, layer: LayerFormat) -> None:
    owner, _, part = local.rpartition(".")
    module = modules.get(owner)
    if module is None or part not in experts_parts(module):
        raise FormatError(f"config.json lists the compressed experts {name!r}, which are no fused experts here.")
    shape, expected = tuple(getattr(module, part).shape), layer.stored_shape
    if shape != expected:
        raise FormatError(f"{name}: config.json says dense_shape {list(expected)}, the model has {list(shape)}.")


def _check_linear(modules: dict[str, Any], local: str, name: str, layer: LayerFormat) -> None:
    module = modules[local]
    if not is_linear(module):
        raise FormatError(f"config.json lists the compressed layer {name!r}, which is a {type(module).__name__} here.")
    shape, transposed = tuple(weight_view(module).shape), is_conv1d(module)
    if (shape, transposed) != (layer.dense_shape, layer.transposed):
        raise FormatError(
            f"{name}: config.json says dense_shape {list(layer.dense_shape)} and transposed={int(layer.transposed)}, "
            f"the model has {list(shape)} and transposed={int(transposed)}."
        )


def _check_neighbours(
    model: Any, headers: Headers, state: dict[str, Tensor], local_names: dict[str, str], compressed: set[str]
) -> None:
    # What transformers does not find it fills with noise, and only warns. That is meant for new heads; a layer that
    # lost a tensor beside a compressed one is damage, and so is any loss where the class is that of the checkpoint.
    stored = {local: headers.tensors[key] for key, local in local_names.items()}
    same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    stacks = tuple(n + "." for n in find_stacks(model) if any(c.startswith(n + ".") for c in compressed))
    optional = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
    tied = set(model.all_tied_weights_keys or ())
    base = model.base_model_prefix + "." if hasattr(model, model.base_model_prefix) else ""
    for key, expected in state.items():
        found = stored.get(key)
        if found is None:
            if key in tied or any(re.search(pattern, key) for pattern in optional):
                continue
            if same_class or key.startswith(stacks):
                raise FormatError(f"the checkpoint has no tensor {key}, which {type(model).__name__} needs.")
            continue
        if expected.dtype.is_floating_point != (found.dtype in FLOATS):
            raise FormatError(f"{found.file}: {key} has dtype {found.dtype}, expected {expected.dtype}.")
        # Heads may differ in their number of labels, which from_pretrained has an option for.
        if key not in compressed and key.startswith(base) and found.shape != expected.shape:
            raise FormatError(f"{found.file}: {key} has shape {list(found.shape)}, expected {list(expected.shape)}.")


def _local_names(model: Any, headers: Headers, names: Container[str]) -> dict[str, str]:
    prefix = model.base_model_prefix + "."
    local = {}
    for key in headers.tensors:
        # In the order of transformers: it strips a prefix where it can, then tries to add one.
        for candidate in ([key.removeprefix(prefix)] if key.startswith(prefix) else []) + [prefix + key, key]:
            if candidate in names:
                local[key] = candidate
                break
    return local


def _may_be_absent(model: Any, headers: Headers, name: str) -> bool:
    # transformers drops what belongs to the head of another class, and what a class says it does without.
    if any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ()):
        return True
    prefix = model.base_model_prefix + "."
    has_head = any(key.startswith(prefix) for key in headers.tensors)
    same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    return has_head and not same_class and not name.startswith(prefix)

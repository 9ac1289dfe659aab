"""Which layers of student and teacher are compared: the sides of a model, and a map where their depths differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_sparse.core.targets import find_stacks
from hf_sparse.training.distillation.predictions import output

# One entry per student layer: the 0-based teacher layer that it learns from, or None for none.
LayerMap = Sequence[int | None]

# Models of two towers return the outputs of each by a name of its own; with the mask of what it reads.
_TOWERS = {"text": "attention_mask", "vision": None, "audio": None}


@dataclass(frozen=True)
class Side:
    """One side of a model, and what of it is compared.

    Attributes:
        name: "" for models of one stack, "encoder" and "decoder", or "text", "vision" and "audio".
        student, teacher: as many states or maps each.
        mask: [B, T], nonzero = real; None = all real.
    """

    name: str
    student: Sequence[Tensor]
    teacher: Sequence[Tensor]
    mask: Tensor | None


def compared_layers(
    student: Any, teacher: Any, inputs: Mapping[str, Any], kind: str, field: str, layers: str | LayerMap | None = None
) -> list[Side]:
    """Pair what the layers of student and teacher return.

    Args:
        student, teacher: model outputs.
        inputs: what both were called with.
        kind: "hidden_states" or "attentions".
        field: the config field that asks for it, for the error.
        layers: None = one to one; "uniform" or a map, see `resolve_layer_map`. The embedding output, the first of the
            hidden states, is always compared.

    Returns:
        One entry per side that returns `kind`, at least one.

    Raises:
        ValueError: if there is none, or the map does not fit.
    """
    found = []
    for name, mine, theirs, mask in _sides(student, teacher, inputs, kind):
        if mine and theirs and all(x is not None for x in (*mine, *theirs)):
            if layers is not None:
                # Hidden states begin with the output of the embeddings.
                first = 1 if kind == "hidden_states" else 0
                resolved = resolve_layer_map(layers, len(mine) - first, len(theirs) - first)
                learning = [(own, other) for own, other in enumerate(resolved) if other is not None]
                mine = [*mine[:first], *(mine[own + first] for own, _ in learning)]
                theirs = [*theirs[:first], *(theirs[other + first] for _, other in learning)]
            found.append(Side(name, mine, theirs, mask))
    if not found:
        raise ValueError(f"{field} needs {kind}, but student or teacher does not return them: set {field}=0.")
    return found


def resolve_layer_map(layers: str | LayerMap, student: int, teacher: int) -> LayerMap:
    """Give the teacher layer of each student layer.

    Args:
        layers: "uniform": each student layer learns from the last of an equal share of the teacher's; or a map.
        student, teacher: numbers of layers, > 0.

    Returns:
        One entry per student layer.

    Raises:
        ValueError: if a map has another length, or names a layer that the teacher does not have.

    Example:
        >>> resolve_layer_map("uniform", 3, 6), resolve_layer_map([None, 5], 2, 6)
        ([1, 3, 5], [None, 5])
    """
    if isinstance(layers, str):
        return [max((own + 1) * teacher // student - 1, 0) for own in range(student)]
    if len(layers) != student:
        raise ValueError(
            f"layer_map has {len(layers)} entries, the model {student} layers: give one per layer (null = learns from "
            f'none), or "uniform".'
        )
    for entry in layers:
        if entry is not None and not 0 <= int(entry) < teacher:
            raise ValueError(f"layer_map names teacher layer {entry}, the teacher has layers 0 to {teacher - 1}.")
    return layers


def parse_layer_map(value: Any) -> str | LayerMap | None:
    """Read the config field `layer_map`.

    Raises:
        ValueError: if it is neither "uniform" nor a JSON list of layer numbers and nulls.

    Example:
        >>> parse_layer_map("[0, null, 11]")
        [0, None, 11]
    """
    if value is None or value == "uniform":
        return value
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        parsed = None
    numbers = parsed if isinstance(parsed, list) else []
    good = all(x is None or (isinstance(x, int) and not isinstance(x, bool) and x >= 0) for x in numbers)
    if not good or not any(x is not None for x in numbers):
        raise ValueError(
            f'layer_map={value!r} must be "uniform" or a JSON list with one entry per layer of the model, the number '
            f"of the teacher's layer (from 0) or null: [1, 3, null, 7]."
        )
    return numbers


def depths(model: nn.Module) -> list[int]:
    """Count the layers of each stack of a model; layers that share their weights count each time they run."""
    found = [len(stack) for stack in find_stacks(model).values()]
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    return [layers] if len(found) == 1 and isinstance(layers, int) else found


def _sides(student: Any, teacher: Any, inputs: Mapping[str, Any], kind: str) -> list[tuple[str, Any, Any, Any]]:
    mask, decoder_mask = inputs.get("attention_mask"), inputs.get("decoder_attention_mask")
    if decoder_mask is None and inputs.get("labels") is not None:
        # Without a mask of its own the decoder reads the labels shifted by one: padding is where they end.
        decoder_mask = inputs["labels"] != -100
    sides = [
        (side.rstrip("_"), output(student, side + kind), output(teacher, side + kind), real)
        for side, real in (("", mask), ("encoder_", mask), ("decoder_", decoder_mask))
    ]
    for tower, key in _TOWERS.items():
        towers = [output(model, f"{tower}_model_output") for model in (student, teacher)]
        if all(found is not None for found in towers):
            mine, theirs = (output(found, kind) for found in towers)
            sides.append((tower, mine, theirs, inputs.get(key) if key else None))
    return sides

"""Which layers of student and teacher are compared: the sides of a model, and a map where their depths differ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_sparse.core.structure.targets import find_stacks
from hf_sparse.training.distillation.predictions import output

# One entry per student layer: the 0-based teacher layer that it learns from, or None for none.
LayerMap = Sequence[int | None]
# "uniform" or a map, for every side of a model alike; or {side: one of them}.
Layers = str | LayerMap | Mapping[str, str | LayerMap]

# Models of two towers return the outputs of each by a name of its own; with the mask of what it reads.
_TOWERS = {"text": "attention_mask", "vision": None, "audio": None}
SIDES = ("encoder", "decoder", *_TOWERS)


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
    student: Any, teacher: Any, inputs: Mapping[str, Any], kind: str, field: str, layers: Layers | None = None
) -> list[Side]:
    """Pair what the layers of student and teacher return.

    Args:
        student, teacher: model outputs.
        inputs: what both were called with.
        kind: "hidden_states" or "attentions".
        field: the config field that asks for it, for the error.
        layers: None = one to one; "uniform" or a map, see `resolve_layer_map`, or {side: one of these}. The embedding
            output, the first of the hidden states, is always compared.

    Returns:
        One entry per side that returns `kind` and of which something is compared, at least one.

    Raises:
        ValueError: if there is none, or the map does not fit.
    """
    found = []
    for name, mine, theirs, mask in sides_of(student, teacher, inputs, kind):
        if mine and theirs and all(x is not None for x in (*mine, *theirs)):
            if layers is not None:
                # Hidden states begin with the output of the embeddings.
                first = 1 if kind == "hidden_states" else 0
                resolved = resolve_layer_map(layers, len(mine) - first, len(theirs) - first, name)
                learning = [(own, other) for own, other in enumerate(resolved) if other is not None]
                mine = [*mine[:first], *(mine[own + first] for own, _ in learning)]
                theirs = [*theirs[:first], *(theirs[other + first] for _, other in learning)]
            if mine:
                found.append(Side(name, mine, theirs, mask))
    if not found:
        raise ValueError(f"{field} needs {kind}, but student or teacher does not return them: set {field}=0.")
    return found


def resolve_layer_map(layers: Layers, student: int, teacher: int, side: str = "") -> LayerMap:
    """Give the teacher layer of each student layer.

    Args:
        layers: "uniform": each student layer learns from the last of an equal share of the teacher's; or a map; or
            {side: one of these}.
        student, teacher: numbers of layers, > 0.
        side: of the model; "" where it has one alone.

    Returns:
        One entry per student layer.

    Raises:
        ValueError: if a map has another length, names a layer that the teacher does not have, or leaves the side out.

    Example:
        >>> resolve_layer_map("uniform", 3, 6), resolve_layer_map([None, 5], 2, 6)
        ([1, 3, 5], [None, 5])
        >>> resolve_layer_map({"encoder": "uniform", "decoder": [0, 5]}, 2, 6, "decoder")
        [0, 5]
    """
    if isinstance(layers, Mapping):
        if side not in layers:
            raise ValueError(
                f"layer_map names {_listed(layers)}, and not {side or 'the one stack of layers there is'}."
            )
        layers = layers[side]
    if isinstance(layers, str):
        return [max((own + 1) * teacher // student - 1, 0) for own in range(student)]
    if len(layers) != student:
        by_side = f', or a list for each side, {{"{side}": [...], ...}}' if side else ""
        raise ValueError(
            f"layer_map has {len(layers)} entries, the {side or 'model'} {student} layers: give one per layer (null = "
            f'learns from none), or "uniform"{by_side}.'
        )
    for entry in layers:
        if entry is not None and not 0 <= int(entry) < teacher:
            whose = f"the {side} of the teacher" if side else "the teacher"
            raise ValueError(f"layer_map names teacher layer {entry}, {whose} has layers 0 to {teacher - 1}.")
    return layers


def check_sides(layers: Layers | None, sides: Mapping[str, int]) -> None:
    """Refuse a map by side that does not name the sides of a model.

    Args:
        layers: as in `compared_layers`.
        sides: as `depths` gives them.

    Raises:
        ValueError: naming both.
    """
    if isinstance(layers, Mapping) and set(layers) != set(sides):
        has = f"the sides {_listed(sides)}" if len(sides) > 1 else "one stack of layers"
        raise ValueError(
            f"layer_map names {_listed(layers)}, but the model has {has}: give a list for each side that it has, or "
            f'one list or "uniform" for all of it.'
        )


def parse_layer_map(value: Any) -> Layers | None:
    """Read the config field `layer_map`.

    Raises:
        ValueError: if it is neither "uniform" nor a JSON list of layer numbers and nulls, nor one of these by side.

    Example:
        >>> parse_layer_map("[0, null, 11]")
        [0, None, 11]
        >>> parse_layer_map('{"encoder": "uniform", "decoder": [1, 3]}')
        {'encoder': 'uniform', 'decoder': [1, 3]}
    """
    if value is None or value == "uniform":
        return value
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        parsed = None
    maps = list(parsed.values()) if isinstance(parsed, dict) else [parsed]
    good = all(x == "uniform" or _is_map(x) for x in maps) and (
        not isinstance(parsed, dict) or set(parsed) <= {*SIDES}
    )
    # A side may learn from nothing, but not all of them.
    if not good or not any(x is not None for found in maps for x in found):
        raise ValueError(
            f'layer_map={value!r} must be "uniform" or a JSON list with one entry per layer of the model, the number '
            f"of the teacher's layer (from 0) or null: [1, 3, null, 7]. Models of two sides take one for each side: "
            f'{{"encoder": [1, 3], "decoder": "uniform"}}; sides are {_listed(SIDES)}.'
        )
    return parsed


def depths(model: nn.Module) -> dict[str, int]:
    """Count the layers of each side of a model; layers that share their weights count each time they run.

    Returns:
        {side: layers}, in the model's own order; the side is "" where there is one stack alone, and the name of the
        stack where it is none of `SIDES`.
    """
    found = find_stacks(model)
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if len(found) == 1:
        return {"": layers if isinstance(layers, int) else len(*found.values())}
    return {_side_of(name): len(stack) for name, stack in found.items()}


def _side_of(stack: str) -> str:
    parts = (part.removesuffix("_model") for part in stack.split("."))
    return next((part for part in parts if part in SIDES), stack)


def _is_map(value: Any) -> bool:
    return isinstance(value, list) and all(
        x is None or (isinstance(x, int) and not isinstance(x, bool) and x >= 0) for x in value
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _mask_of_decoder(inputs: Mapping[str, Any]) -> Tensor | None:
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        # The decoder reads the labels shifted by one: padding is where they end.
        return labels != -100
    # Without labels per token (BART that classifies, or answers questions) it reads what the encoder reads.
    of_its_own = any(inputs.get(key) is not None for key in ("decoder_input_ids", "decoder_inputs_embeds"))
    return None if of_its_own else inputs.get("attention_mask")


def sides_of(student: Any, teacher: Any, inputs: Mapping[str, Any], kind: str) -> list[tuple[str, Any, Any, Any]]:
    """Give (name, the student's, the teacher's, mask) of every side that models may have; None for what they lack."""
    mask, decoder_mask = inputs.get("attention_mask"), inputs.get("decoder_attention_mask")
    if decoder_mask is None:
        decoder_mask = _mask_of_decoder(inputs)
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

"""Whether hidden states are compared where nobody has said so (`hidden_weight=None`).

They are in models of text, where it was measured to help, and between two models of one class, whose states mean the
same. What a config and a class can tell is looked at before training, the rest at the first outputs. What was asked
for by name is not looked at here: the losses refuse it where it cannot be had.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.inference.compress import compressed_tensors
from hf_sparse.training.distillation.layerwise import depths, sides_of
from hf_sparse.training.distillation.projections import hidden_sizes


def why_not_compared(student: nn.Module, teacher: nn.Module, mapped: bool) -> str | None:
    """Say why the hidden states of two models are not compared; None where nothing stands against it so far.

    Args:
        student: the model to train.
        teacher: the student itself where a copy of it will teach.
        mapped: whether `layer_map` pairs layers of different depths.
    """
    if not isinstance(student, PreTrainedModel):
        return f"{type(student).__name__} is no PreTrainedModel"
    if type(teacher) is not type(student):
        return f"the teacher is a {type(teacher).__name__}, the model a {type(student).__name__}"
    if student.main_input_name != "input_ids":
        return f"{type(student).__name__} does not read text"
    if not _takes_the_wish(type(student)):
        return f"the forward of {type(student).__name__} does not name output_hidden_states"
    for name, value in _numbers_of(student.config.to_dict()):
        # A layer that is skipped leaves no state, now and then.
        if "layerdrop" in name and value > 0.0:
            return f"layers are skipped at random ({name}={value})"
    if compressed_tensors(teacher)[0]:
        return "the teacher is compressed"
    own, others = (list(depths(model).values()) for model in (student, teacher))
    if not mapped and own != others:
        return f"the model has {own} layers and the teacher {others}, and no layer_map pairs them"
    if hidden_sizes(student) != hidden_sizes(teacher):
        return "model and teacher are of different widths"
    return None


def why_not_alike(student: Any, teacher: Any, inputs: Mapping[str, Any], mapped: bool) -> str | None:
    """Say why hidden states that two models returned are not compared; None where they are.

    Args:
        student, teacher: model outputs.
        inputs: what both were called with.
        mapped: whether `layer_map` pairs layers of different depths.
    """
    found = sides_of(student, teacher, inputs, "hidden_states")
    sides = [side for side in found if side[1] is not None and side[2] is not None]
    if not sides:
        return "they are not returned"
    ids = inputs.get("input_ids")
    for _, mine, theirs, mask in sides:
        shapes = [_shapes(mine), _shapes(theirs)]
        if not all(shapes) or any(len(set(x)) != 1 for x in shapes) or set(shapes[0]) != set(shapes[1]):
            return "they are not tensors of one shape"
        if not mapped and len(shapes[0]) != len(shapes[1]):
            return f"the model returns {len(shapes[0])} of them and the teacher {len(shapes[1])}"
        known = ids if mask is None else mask
        if not isinstance(known, Tensor) or math.prod(known.shape) != math.prod(shapes[0][0][:2]):
            return "it is not known which of their tokens are real"
    return None


def _takes_the_wish(model_class: type[nn.Module]) -> bool:
    # The forwards of transformers take it by name or through a decorator; what **kwargs of others mean is not known.
    forward = model_class.forward
    return (
        forward.__module__.startswith("transformers.")
        or "output_hidden_states" in inspect.signature(forward).parameters
    )


def _numbers_of(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers_of(value)
        elif isinstance(value, int | float):
            yield str(name), float(value)


def _shapes(states: Any) -> list[torch.Size]:
    # Empty where they are not what the loss compares: a sequence of [B, T, D].
    if not isinstance(states, list | tuple):
        return []
    fits = all(isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 3 for x in states)
    return [x.shape for x in states] if fits else []

"""Whether hidden states are compared where nobody has said so (`hidden_weight=None`).

They are where it was measured to help, in models that classify text, between two models of one class, whose states
mean the same; not in language models, where they hold a student back that could still learn (docs/tasks.md). What was
asked for by a number is not looked at here: the losses refuse it where it cannot be had.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from hf_sparse.inference.compress import compressed_tensors
from hf_sparse.training.distillation.distill import one_row_per_sample
from hf_sparse.training.distillation.layerwise import depths, sides_of
from hf_sparse.training.distillation.projections import hidden_sizes


def classifies_text(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Tell whether a model is one of transformers that gives classes or scores to texts, and reads nothing else."""
    if not isinstance(model, PreTrainedModel):
        return False
    reads = model.input_modalities
    names = {cls.__name__ for cls in type(model).__mro__}
    known = names & set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())
    return bool(known) and (reads == "text" or set(reads) == {"text"})


def why_not_compared(student: PreTrainedModel, teacher: nn.Module, mapped: bool) -> str | None:
    """Say why the hidden states of two models are not compared; None where nothing stands against it so far.

    Args:
        student: the model to train, one that `classifies_text`.
        teacher: the student itself where a copy of it will teach.
        mapped: whether `layer_map` pairs layers of different depths.
    """
    if type(teacher) is not type(student):
        return f"the teacher is a {type(teacher).__name__}, the model a {type(student).__name__}"
    if not _takes_the_flag(type(student)):
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
    """Say why hidden states that two models returned for a batch are not compared; None where they are.

    Shapes decide and nothing else, so that it is the same in a resumed run, and costs nothing.

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
        known = one_row_per_sample(ids if mask is None else mask)
        if known is None or known.shape != shapes[0][0][:2]:
            return "no mask fits them"
    return None


def _takes_the_flag(model_class: type[nn.Module]) -> bool:
    # The forwards of transformers take output_hidden_states by name or in **kwargs; elsewhere these may be anything.
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

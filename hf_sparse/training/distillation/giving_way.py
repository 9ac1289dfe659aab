"""Where `hidden_weight` gives way: nobody asked for it by name, and hidden states cannot be compared as they are.

What was asked for is never dropped: `check_teacher` and the losses refuse it, and name the way out.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_sparse.inference.compress import compressed_tensors
from hf_sparse.training.checks import HIDDEN_WEIGHT
from hf_sparse.training.config import SparseDistillConfig
from hf_sparse.training.distillation.layerwise import depths, returns_layers
from hf_sparse.training.distillation.projections import needed_projections

logger = logging.getLogger(__name__)


def settle_hidden_weight(config: SparseDistillConfig, student: nn.Module, teacher: nn.Module) -> None:
    """Set `hidden_weight` to 0, and say why, where it is not given and these models cannot be compared by layer.

    Args:
        config: changed in place. Used again with other models, it is settled anew.
        student: the model to train.
        teacher: the student itself where a copy of it will teach.
    """
    if config.hidden_gave_way:
        # A search may have set it since.
        config.hidden_weight, config.hidden_gave_way = config.hidden_weight or HIDDEN_WEIGHT, False
    if _may_give_way(config):
        _give_way(config, _why_not(student, teacher, mapped=config.layer_map is not None))


def settle_by_outputs(config: SparseDistillConfig, student: Any, teacher: Any) -> None:
    """Do the same where the outputs of one of them hold no hidden states, which only a forward can tell."""
    if _may_give_way(config):
        for role, outputs in (("model", student), ("teacher", teacher)):
            if not returns_layers(outputs, "hidden_states"):
                _give_way(config, f"the {role} returns no hidden states")
                return


def _may_give_way(config: SparseDistillConfig) -> bool:
    return not config.hidden_is_given and config.hidden_weight == HIDDEN_WEIGHT


def _give_way(config: SparseDistillConfig, reason: str | None) -> None:
    if reason is not None:
        logger.warning("hidden_weight is not given, and 0 in this run: %s.", reason)
        config.hidden_weight, config.hidden_gave_way = 0.0, True


def _why_not(student: nn.Module, teacher: nn.Module, mapped: bool) -> str | None:
    for role, model in (("model", student), ("teacher", teacher)):
        taken = inspect.signature(model.forward).parameters
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
        if not isinstance(model, PreTrainedModel) or not (open_ended or "output_hidden_states" in taken):
            return f"the {role}, a {type(model).__name__}, does not take output_hidden_states"
    if compressed_tensors(teacher)[0]:
        return "the teacher is compressed, and layers are compared with plain ones (hf_sparse.load_dense loads them)"
    own, others = depths(student), depths(teacher)
    if not mapped and list(own.values()) != list(others.values()):
        return (
            f"model and teacher have {list(own.values())} and {list(others.values())} layers; layer_map says which "
            f"of them are compared"
        )
    if needed_projections(student, teacher, seed=0) is not None:
        return "model and teacher are of another width; hidden_weight, if given, learns a projection"
    return None

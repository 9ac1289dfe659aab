"""Models that read waveforms: what of a batch the losses may look at, and of what their task loss is a mean.

Between the samples of a waveform and the hidden states stand convolutions: a mask over samples has to be brought to
frames, and the labels of CTC stand at no frame in particular.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES

from hf_sparse.training.distillation.predictions import FRAMES, output


def is_ctc(model: nn.Module) -> bool:
    """Tell whether a model is trained with connectionist temporal classification."""
    return type(model).__name__ in MODEL_FOR_CTC_MAPPING_NAMES.values()


def task_unit(model: nn.Module) -> str:
    """Tell of what the task loss of a model is a mean: an entry of `share.UNITS`, or "sum" where it is a sum."""
    if not is_ctc(model):
        return "items"
    return "sum" if getattr(model.config, "ctc_loss_reduction", "sum") == "sum" else "samples"


def seen_by_losses(model: Any, inputs: Mapping[str, Any], outputs: Any) -> Mapping[str, Any]:
    """Give a batch as the distillation losses have to read it.

    Args:
        model: the student.
        inputs: what it was called with.
        outputs: what it returned.

    Returns:
        The inputs themselves for models that read tokens or patches. For waveforms a copy, with the masks of frames,
        "attention_mask" and `FRAMES`, [B, T] in place of the mask of samples, and without CTC's labels. Where a
        decoder answers, whose tokens are no frames, without `FRAMES`.
    """
    ctc, to_frames = is_ctc(model), getattr(model, "_get_feature_vector_attention_mask", None)
    if not ctc and to_frames is None:
        return inputs
    seen = {key: value for key, value in inputs.items() if not (ctc and key == "labels")}
    mask, encoded = seen.pop("attention_mask", None), output(outputs, "encoder_last_hidden_state")
    frames = _frames(outputs) if encoded is None else int(encoded.shape[1])
    if mask is not None and to_frames is not None and frames is not None:
        seen["attention_mask"] = to_frames(frames, mask)
        if encoded is None:
            seen[FRAMES] = seen["attention_mask"]
    return seen


def _frames(outputs: Any) -> int | None:
    logits, hidden = output(outputs, "logits"), output(outputs, "hidden_states")
    if logits is not None and logits.ndim == 3:
        return int(logits.shape[1])
    states = hidden[-1] if hidden else output(outputs, "last_hidden_state")
    return None if states is None else int(states.shape[1])

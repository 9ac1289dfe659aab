"""What of a model's outputs is distilled: the logits of its task, or the embedding where it gives no logits.

Shape letters: B batch, T tokens, V classes or vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_sparse.training.distillation.distill import distillation_loss, embedding_loss

# Name of the mask [B, T] of the frames that stand for speech, which `speech.seen_by_losses` adds.
FRAMES = "frame_mask"
EMBEDDINGS = ("sentence_embedding", "image_embeds", "text_embeds")


def prediction_loss(
    student: Any,
    teacher: Any,
    inputs: Mapping[str, Any],
    config: Any,
    temperature: float,
    shifted: bool,
    pooling: str = "mean",
) -> Tensor:
    """Compute the distillation loss that fits the task of a model, told from its outputs.

    Start and end logits: extractive QA, padding left out. [B, V]: classes, several labels or a score, as
    `config.problem_type` says. [B, T, V]: per token, where a label counts (is not -100), or else at real tokens; for
    frames of speech a mean over those of each sample. No logits: the embeddings by the names of `EMBEDDINGS`, or else
    the pooled last hidden state.

    Args:
        student, teacher: model outputs.
        inputs: what the model was called with.
        config: the student's model config.
        temperature: > 0.
        shifted: whether position i predicts label i + 1 (causal language models).
        pooling: of hidden states: "mean", "cls" or "last".

    Returns:
        A scalar, float32.

    Raises:
        ValueError: if the model gives nothing that could be distilled, or the teacher something else.
    """
    unit = prediction_unit(student, inputs)
    attention_mask = inputs.get("attention_mask")
    if output(student, "start_logits") is not None:
        sides = [(output(student, s), _of_teacher(teacher, s)) for s in ("start_logits", "end_logits")]
        if attention_mask is not None:
            padding = attention_mask == 0
            sides = [(s.masked_fill(padding, -1e4), t.masked_fill(padding, -1e4)) for s, t in sides]
        losses = [distillation_loss(s, t, temperature) for s, t in sides]
        return (losses[0] + losses[1]) / 2
    student_logits = output(student, "logits")
    if student_logits is None:
        return _embeddings(student, teacher, attention_mask, pooling)
    teacher_logits = _of_teacher(teacher, "logits")
    if student_logits.ndim == 2:
        problem = getattr(config, "problem_type", None)
        if problem == "regression" or (problem is None and student_logits.shape[-1] == 1):
            return distillation_loss(student_logits, teacher_logits, kind="regression")
        kind = "multi_label" if problem == "multi_label_classification" else "classes"
        return distillation_loss(student_logits, teacher_logits, temperature, kind)
    frames = inputs.get(FRAMES)
    if frames is not None and frames.shape == student_logits.shape[:-1]:
        # Every recording weighs the same, however long it is.
        return distillation_loss(student_logits, teacher_logits, temperature, mask=frames, per_sample=True)
    mask = None
    if unit == "items":
        mask = inputs["labels"] != -100
    elif unit == "tokens":
        mask = inputs["attention_mask"].bool()
    if shifted:
        # Told by the mask and not by slices of the logits, which would have to be copied.
        positions = torch.ones(student_logits.shape[:2], dtype=torch.bool, device=student_logits.device)
        mask = (positions if mask is None else mask).roll(-1, dims=1)
        mask[:, -1] = False
    return distillation_loss(student_logits, teacher_logits, temperature, mask=mask)


def prediction_unit(student: Any, inputs: Mapping[str, Any]) -> str:
    """Tell of what `prediction_loss` is a mean: an entry of `share.UNITS`.

    Raises:
        ValueError: if the model gives neither logits nor an embedding that could be distilled.
    """
    if output(student, "start_logits") is not None:
        return "samples"
    logits, hidden = output(student, "logits"), output(student, "last_hidden_state")
    if logits is None and (any(output(student, name) is not None for name in EMBEDDINGS) or _is_states(hidden)):
        return "samples"
    if logits is None or logits.ndim not in (2, 3):
        found = "none" if logits is None else f"logits of shape {list(logits.shape)}"
        raise ValueError(
            f"kd_weight needs logits [samples, labels] or [samples, tokens, labels], or an embedding, the model "
            f"returns {found}: set kd_weight=0."
        )
    # Detection models take a list of dictionaries, one per image.
    labels = inputs["labels"] if isinstance(inputs.get("labels"), Tensor) else None
    attention_mask = inputs.get("attention_mask")
    if FRAMES in inputs:
        return "samples"
    if logits.ndim == 3 and labels is not None and labels.shape == logits.shape[:-1]:
        return "items"
    if logits.ndim == 3 and attention_mask is not None and attention_mask.shape == logits.shape[:-1]:
        return "tokens"
    return "samples"


def output(outputs: Any, name: str) -> Any:
    """Give one of a model's outputs, or None; models of transformers return objects, others plain dictionaries."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def pooled(hidden: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """Make one embedding of the hidden states of each sample.

    Args:
        hidden: [B, T, D].
        attention_mask: [B, T], nonzero = real token; None = all real.
        pooling: "mean" of the real tokens, "cls" for the first token, "last" for the last real one.

    Returns:
        [B, D].

    Example:
        >>> hidden = torch.tensor([[[1.0], [3.0], [9.0]]])
        >>> [pooled(hidden, torch.tensor([[1, 1, 0]]), pooling).item() for pooling in ("mean", "cls", "last")]
        [2.0, 1.0, 3.0]
    """
    if attention_mask is None or attention_mask.shape != hidden.shape[:-1]:
        attention_mask = torch.ones(hidden.shape[:-1], dtype=torch.long, device=hidden.device)
    real = attention_mask.ne(0)
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        last = (real * positions).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    weight = real.to(hidden.dtype)[..., None]
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1.0)


def _embeddings(student: Any, teacher: Any, attention_mask: Tensor | None, pooling: str) -> Tensor:
    names = [name for name in EMBEDDINGS if output(student, name) is not None]
    pairs = [(output(student, name), _of_teacher(teacher, name)) for name in names]
    if not pairs:
        states = output(student, "last_hidden_state"), _of_teacher(teacher, "last_hidden_state")
        pairs = [(pooled(states[0], attention_mask, pooling), pooled(states[1], attention_mask, pooling))]
    return torch.stack([embedding_loss(mine, theirs) for mine, theirs in pairs]).mean()


def _of_teacher(teacher: Any, name: str) -> Tensor:
    found = output(teacher, name)
    if found is None:
        raise ValueError(
            f"kd_weight compares {name}, which the model returns and the teacher does not: use a teacher for the same "
            f"task, or set kd_weight=0."
        )
    return found


def _is_states(hidden: Any) -> bool:
    return isinstance(hidden, Tensor) and hidden.ndim == 3

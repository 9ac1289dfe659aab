"""What the student learns from the teacher: losses on logits, hidden states and attention maps. Pure functions.

Every loss is a mean over samples (or, per token, over the tokens that count), so that a micro-batch's share in the
whole batch can be put right by one factor. Padding never counts.

Shape letters: B batch, T tokens, V classes or vocabulary, H heads, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("classes", "multi_label", "regression")


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 2.0,
    kind: str = "classes",
    mask: Tensor | None = None,
) -> Tensor:
    """Compute how far the student's predictions are from the teacher's.

    "classes": temperature^2 * KL(teacher || student) of the softened distributions over the last dimension;
    "multi_label": temperature^2 * the same for each label by itself, mean over labels;
    "regression": mean squared error to the teacher's score.

    Args:
        student_logits: [..., V], floating point.
        teacher_logits: [..., V], same shape, treated as constant.
        temperature: > 0.
        kind: one of "classes", "multi_label", "regression".
        mask: [...] bool, True = counts (tokens that carry a label); None = all.

    Returns:
        A scalar, float32: the mean over what counts.

    Raises:
        ValueError: if the shapes differ or `kind` is unknown.

    Source: Hinton et al. 2015; Sparse Progressive Distillation (ACL 2022) uses the soft cross-entropy, which differs
    by the teacher's constant entropy.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> distillation_loss(logits, logits)
        tensor(0.)
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not known: use one of {list(KINDS)}.")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {list(student_logits.shape)} and teacher logits {list(teacher_logits.shape)} differ in "
            f"shape: teacher and student must have the same labels, or set kd_weight=0."
        )
    student, teacher = student_logits.float(), teacher_logits.detach().float()
    if kind == "regression":
        per_item = (student - teacher).square().mean(-1)
    elif kind == "multi_label":
        student, teacher = student / temperature, teacher / temperature
        soft, other = teacher.sigmoid(), (-teacher).sigmoid()
        entropy = soft * F.logsigmoid(teacher) + other * F.logsigmoid(-teacher)
        cross = soft * F.logsigmoid(student) + other * F.logsigmoid(-student)
        per_item = (entropy - cross).mean(-1) * temperature**2
    else:
        log_student, log_teacher = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
        per_item = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1) * temperature**2
    return per_item.mean() if mask is None else _masked_mean(per_item, mask)


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor | None = None) -> Tensor:
    """Compute the mean squared error between hidden states, summed over layers.

    Args:
        student: one [B, T, D] per layer.
        teacher: as many, same shapes, treated as constant.
        attention_mask: [B, T], nonzero = real token; None = all real.

    Returns:
        A scalar, float32. Each sample counts the same, however many tokens it has.

    Raises:
        ValueError: if the numbers of layers or the shapes differ.

    Source: Sparse Progressive Distillation (ACL 2022), whose released code also counts padding.
    """
    _check_layers("hidden states", student, teacher)
    attention_mask = _one_row_per_sample(attention_mask)
    errors = [(s.float() - t.detach().float()).square().mean(-1) for s, t in zip(student, teacher, strict=True)]
    return torch.stack([_per_sample(error, attention_mask).mean() for error in errors]).sum()


def attention_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor | None = None
) -> Tensor:
    """Compute the mean squared error between attention maps, summed over layers.

    Args:
        student: one [B, H, T, T] of probabilities per layer.
        teacher: as many, same shapes, treated as constant.
        attention_mask: [B, T], nonzero = real token; pairs with padding on either side do not count; None = all real.

    Returns:
        A scalar, float32. Each sample counts the same.

    Raises:
        ValueError: if the numbers of layers or the shapes differ.

    Source: Sparse Progressive Distillation (ACL 2022), post-softmax maps as its released code compares.
    """
    _check_layers("attention maps", student, teacher)
    pairs, attention_mask = None, _one_row_per_sample(attention_mask)
    if attention_mask is not None:
        real = attention_mask.bool()
        pairs = (real[:, :, None] & real[:, None, :]).flatten(1)
    errors = [
        (s.float() - t.detach().float()).square().mean(1).flatten(1) for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack([_per_sample(error, pairs).mean() for error in errors]).sum()


def logits_loss(
    student: Any, teacher: Any, inputs: Mapping[str, Tensor], config: Any, temperature: float, shifted: bool
) -> Tensor:
    """Compute the distillation loss that fits the task of a model, told from its outputs.

    Start and end logits: extractive QA, padding left out. [B, V]: classes, several labels or a score, as
    `config.problem_type` says. [B, T, V]: per token, where a label counts (is not -100), or else at real tokens.

    Args:
        student, teacher: model outputs with `.logits`, or `.start_logits` and `.end_logits`.
        inputs: what the model was called with.
        config: the student's model config.
        temperature: > 0.
        shifted: whether position i predicts label i + 1 (causal language models).

    Returns:
        A scalar, float32.
    """
    attention_mask = inputs.get("attention_mask")
    if output(student, "start_logits") is not None:
        sides = [(output(student, s), output(teacher, s)) for s in ("start_logits", "end_logits")]
        if attention_mask is not None:
            padding = attention_mask == 0
            sides = [(s.masked_fill(padding, -1e4), t.masked_fill(padding, -1e4)) for s, t in sides]
        losses = [distillation_loss(s, t, temperature) for s, t in sides]
        return (losses[0] + losses[1]) / 2
    unit = logits_unit(student, inputs)
    student_logits, teacher_logits = output(student, "logits"), output(teacher, "logits")
    if student_logits.ndim == 2:
        problem = getattr(config, "problem_type", None)
        if problem == "regression" or (problem is None and student_logits.shape[-1] == 1):
            return distillation_loss(student_logits, teacher_logits, kind="regression")
        kind = "multi_label" if problem == "multi_label_classification" else "classes"
        return distillation_loss(student_logits, teacher_logits, temperature, kind)
    mask = None
    if unit == "items":
        mask = inputs["labels"] != -100
    elif unit == "tokens":
        mask = inputs["attention_mask"].bool()
    if shifted:
        student_logits, teacher_logits = student_logits[:, :-1], teacher_logits[:, :-1]
        mask = None if mask is None else mask[:, 1:]
    return distillation_loss(student_logits, teacher_logits, temperature, mask=mask)


def output(outputs: Any, name: str) -> Any:
    """Give one of a model's outputs, or None; models of transformers return objects, others plain dictionaries."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def logits_unit(student: Any, inputs: Mapping[str, Tensor]) -> str:
    """Tell of what `logits_loss` is a mean: an entry of `share.UNITS`.

    Raises:
        ValueError: if the model gives no logits that could be distilled.
    """
    if output(student, "start_logits") is not None:
        return "samples"
    logits = output(student, "logits")
    if logits is None or logits.ndim not in (2, 3):
        found = "none" if logits is None else f"logits of shape {list(logits.shape)}"
        raise ValueError(
            f"kd_weight needs logits [samples, labels] or [samples, tokens, labels], the model returns {found}: "
            f"set kd_weight=0."
        )
    labels, attention_mask = inputs.get("labels"), inputs.get("attention_mask")
    if logits.ndim == 3 and labels is not None and labels.shape == logits.shape[:-1]:
        return "items"
    if logits.ndim == 3 and attention_mask is not None and attention_mask.shape == logits.shape[:-1]:
        return "tokens"
    return "samples"


def _one_row_per_sample(mask: Tensor | None) -> Tensor | None:
    # Multiple choice: [questions, choices, T], where layers return [questions * choices, T, D].
    return mask.flatten(0, -2) if mask is not None and mask.ndim > 2 else mask


def _per_sample(error: Tensor, mask: Tensor | None) -> Tensor:
    # [B, N], [B, N] -> [B]: a mean over the tokens of each sample.
    if mask is None or mask.shape != error.shape:
        return error.flatten(1).mean(1)
    weight = mask.to(error.dtype)
    return (error * weight).sum(1) / weight.sum(1).clamp(min=1.0)


def _masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(error.dtype)
    # torch.where, because 0 * inf at a position that does not count would be NaN.
    return torch.where(mask.bool(), error, 0.0).sum() / weight.sum().clamp(min=1.0)


def _check_layers(what: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    if len(student) != len(teacher):
        raise ValueError(f"the student gives {len(student)} {what}, the teacher {len(teacher)}: they must be as many.")
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        if s.shape != t.shape:
            raise ValueError(f"{what} {i}: the student's have shape {list(s.shape)}, the teacher's {list(t.shape)}.")

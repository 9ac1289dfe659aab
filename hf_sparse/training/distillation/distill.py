"""What the student learns from the teacher: losses on logits, embeddings, hidden states, attention. Pure functions.

Every loss is a mean over samples (or, per token, over the tokens that count), so that a micro-batch's share in the
whole batch can be put right by one factor. Padding never counts.

Shape letters: B batch, T tokens, V classes or vocabulary, H heads, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.training.distillation.chunked import soft_divergence

KINDS = ("classes", "multi_label", "regression")
HIDDEN_FORMS = ("relative", "mse")


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 2.0,
    kind: str = "classes",
    mask: Tensor | None = None,
    per_sample: bool = False,
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
        per_sample: for "classes" of [B, T, V] alone: whether each sample weighs the same, and not each token.

    Returns:
        A scalar, float32: the mean over what counts.

    Raises:
        ValueError: if a shape, dtype or number does not fit, or `kind` is unknown; the message names it.

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
    shape, dtypes = student_logits.shape, (student_logits.dtype, teacher_logits.dtype)
    if not shape or not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(
            f"logits must be floating point, [..., V], not {dtypes[0]} and {dtypes[1]} of shape {list(shape)}: pass "
            f"what the models return as logits, and not the classes that follow from them."
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be above 0; 1 leaves the distributions as they are.")
    if mask is not None and mask.shape != shape[:-1]:
        # It would be broadcast, and count positions that it does not speak of.
        raise ValueError(
            f"mask has shape {list(mask.shape)}, the logits {list(shape)}: give one entry per position, "
            f"{list(shape[:-1])}."
        )
    if per_sample and (kind != "classes" or len(shape) < 3):
        raise ValueError(
            f'per_sample=True weighs the samples of [B, T, V] for kind="classes", not {list(shape)} for '
            f"kind={kind!r}: leave it out."
        )
    if kind == "classes":
        per_item = soft_divergence(student_logits, teacher_logits, temperature)
        if per_sample:
            return _per_sample(per_item, mask).mean()
        return per_item.mean() if mask is None else _masked_mean(per_item, mask)
    student, teacher = student_logits.float(), teacher_logits.detach().float()
    if kind == "regression":
        per_item = (student - teacher).square().mean(-1)
    else:
        student, teacher = student / temperature, teacher / temperature
        soft, other = teacher.sigmoid(), (-teacher).sigmoid()
        entropy = soft * F.logsigmoid(teacher) + other * F.logsigmoid(-teacher)
        cross = soft * F.logsigmoid(student) + other * F.logsigmoid(-student)
        per_item = (entropy - cross).mean(-1) * temperature**2
    return per_item.mean() if mask is None else _masked_mean(per_item, mask)


def hidden_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    attention_mask: Tensor | None = None,
    projection: Callable[[Tensor], Tensor] | None = None,
    form: str = "relative",
) -> Tensor:
    """Compute how far the student's hidden states are from the teacher's, summed over layers.

    "relative": ||student - teacher||^2 / ||teacher||^2 over all real tokens of a sample; "mse": mean squared error.
    The size of hidden states differs between models by orders of magnitude, between those that normalise what a layer
    hands on and those that add to it; dividing by it takes that out of the weight. Where the teacher's states are
    hardly there, less than a thousandth of the student's in squared size, it is that thousandth which divides.

    Args:
        student: one [B, T, D] per layer.
        teacher: as many, same shapes, treated as constant.
        attention_mask: [B, T], nonzero = real token; None = all real.
        projection: makes the student's states as wide as the teacher's; None where they are.
        form: one of "relative", "mse".

    Returns:
        A scalar, float32. Each sample counts the same, however many tokens it has.

    Raises:
        ValueError: if the numbers of layers or the shapes differ, or `form` is unknown.

    Source: "mse" is that of Sparse Progressive Distillation (ACL 2022), whose released code also counts padding.

    Example:
        >>> states = [torch.full((1, 3, 4), 20.0)]
        >>> hidden_loss([0.5 * states[0]], states), hidden_loss([0.5 * states[0]], states, form="mse")
        (tensor(0.2500), tensor(100.))
    """
    if form not in HIDDEN_FORMS:
        raise ValueError(f"form={form!r} is not known: use one of {list(HIDDEN_FORMS)}.")
    if projection is not None:
        student = [projection(states.float()) for states in student]
    _check_layers("hidden states", student, teacher)
    attention_mask = one_row_per_sample(attention_mask)
    losses = []
    for mine, theirs in zip(student, teacher, strict=True):
        theirs = theirs.detach()
        squares = F.mse_loss(mine.float(), theirs.float(), reduction="none").mean(-1)
        error = _per_sample(squares, attention_mask)
        if form == "relative":
            size, own = (_per_sample(_mean_square(x), attention_mask) for x in (theirs, mine.detach()))
            error = error / torch.maximum(size, 1e-3 * own).clamp(min=torch.finfo(torch.float32).tiny)
        losses.append(error.mean())
    return torch.stack(losses).sum()


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
    pairs, attention_mask = None, one_row_per_sample(attention_mask)
    if attention_mask is not None:
        real = attention_mask.bool()
        pairs = (real[:, :, None] & real[:, None, :]).flatten(1)
    errors = [
        (s.float() - t.detach().float()).square().mean(1).flatten(1) for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack([_per_sample(error, pairs).mean() for error in errors]).sum()


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute how far the student's embeddings are from the teacher's, relative to their length.

    Args:
        student: [B, D].
        teacher: [B, D], treated as constant.

    Returns:
        A scalar, float32: the mean over samples of ||student - teacher||^2 / ||teacher||^2.

    Raises:
        ValueError: if the shapes differ.

    Source: Reimers and Gurevych 2020, squared distance; dividing by the length makes one weight fit all models.

    Example:
        >>> embedding_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor(0.6400)
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's embeddings have shape {list(student.shape)}, the teacher's {list(teacher.shape)}: use a "
            f"teacher whose embeddings are as wide, or kd_weight=0 and hidden_weight, which learns a projection."
        )
    mine, theirs = student.float(), teacher.detach().float()
    length = theirs.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((mine - theirs).square().sum(-1) / length).mean()


def one_row_per_sample(mask: Tensor | None) -> Tensor | None:
    """Bring a mask of multiple choice, [questions, choices, T], to the [questions * choices, T] that layers return."""
    return mask.flatten(0, -2) if mask is not None and mask.ndim > 2 else mask


def _mean_square(states: Tensor) -> Tensor:
    # A norm reads the states once, in their dtype, and writes nothing of their size.
    dtype = torch.promote_types(states.dtype, torch.float32)
    return torch.linalg.vector_norm(states, dim=-1, dtype=dtype).float().square() / states.shape[-1]


def _per_sample(error: Tensor, mask: Tensor | None) -> Tensor:
    # [B, N], [B, N] -> [B]: a mean over the tokens of each sample.
    if mask is None or mask.shape != error.shape:
        return error.flatten(1).mean(1)
    weight = mask.to(error.dtype)
    return torch.where(mask.bool(), error, 0.0).sum(1) / weight.sum(1).clamp(min=1.0)


def _masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(error.dtype)
    # torch.where, because 0 * inf at a position that does not count would be NaN.
    return torch.where(mask.bool(), error, 0.0).sum() / weight.sum().clamp(min=1.0)


def _check_layers(what: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    if len(student) != len(teacher):
        raise ValueError(
            f"the student gives {len(student)} {what}, the teacher {len(teacher)}: they must be as many. Models that "
            f"skip layers at random while they train need layerdrop=0 in their config."
        )
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        if s.shape != t.shape:
            raise ValueError(f"{what} {i}: the student's have shape {list(s.shape)}, the teacher's {list(t.shape)}.")

"""The distillation loss of a language model's logits, a few tokens at a time.

With a vocabulary of 150,000 the logits of one batch are the largest tensors of a step. Written plainly the loss makes
four more of that size in float32; here forward and backward go through them in chunks, and the only tensor as large as
the logits that is made is the gradient, in their own dtype.

Shape letters: N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits per chunk: 64 MiB in float32, large enough to fill a GPU.
CHUNK = 2**24


def soft_divergence(student: Tensor, teacher: Tensor, temperature: float, chunk: int | None = None) -> Tensor:
    """Compute temperature^2 * KL(teacher || student) of the softened distributions, for each row.

    Args:
        student: [..., V] logits, floating point.
        teacher: [..., V] logits, same shape, treated as constant.
        temperature: > 0.
        chunk: how many logits are looked at together, > 0; None = `CHUNK`.

    Returns:
        [...], float32, >= 0 up to rounding.

    Example:
        >>> soft_divergence(torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 0.0]]), 2.0)
        tensor([0.])
    """
    rows = max(1, (chunk or CHUNK) // student.shape[-1])
    vocabulary = student.shape[-1]
    flat: Tensor = _SoftDivergence.apply(
        student.reshape(-1, vocabulary), teacher.detach().reshape(-1, vocabulary), temperature, rows
    )
    return flat.view(student.shape[:-1])


class _SoftDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, rows: int) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.temperature, ctx.rows = temperature, rows
        parts = []
        for mine, theirs in zip(student.split(rows), teacher.split(rows), strict=True):
            log_mine = F.log_softmax(mine.float() / temperature, -1)
            log_theirs = F.log_softmax(theirs.float() / temperature, -1)
            divergence = F.kl_div(log_mine, log_theirs, reduction="none", log_target=True).sum(-1)
            parts.append(divergence * temperature**2)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        student, teacher = ctx.saved_tensors
        gradient = torch.empty_like(student)
        pieces = zip(
            gradient.split(ctx.rows), student.split(ctx.rows), teacher.split(ctx.rows), outer[0].split(ctx.rows),
            strict=True,
        )  # fmt: skip
        for target, mine, theirs, weight in pieces:
            # T^2 * KL has the gradient T * (softmax(student / T) - softmax(teacher / T)).
            difference = (mine.float() / ctx.temperature).softmax(-1)
            difference -= (theirs.float() / ctx.temperature).softmax(-1)
            # A row that does not count may hold anything: 0 * NaN would spread.
            counted = torch.where(weight[:, None] != 0, difference * (weight[:, None] * ctx.temperature), 0.0)
            target.copy_(counted)
        return gradient, None, None, None

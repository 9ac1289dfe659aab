"""Blocks of several layers that are one feed-forward unit: scored as one, so that they are pruned together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_sparse.core.structure.feed_forward import FeedForward


def tie_scores(scores: Mapping[str, Tensor], parts: Sequence[FeedForward]) -> dict[str, Tensor]:
    """Give all blocks of a feed-forward unit one score: the geometric mean of what they score by themselves.

    A product, because a unit multiplies: scaling its row up and its column down by the same factor leaves what it
    computes (with ReLU exactly, with other activations nearly) and its score as they are. Equal scores give equal
    masks under a budget per layer.

    Args:
        scores: {name: [R, C]}, >= 0, in blocks of `FeedForward.block_shapes` for the layers of `parts`.
        parts: the feed-forward parts.

    Returns:
        {name: [R, C]}, in the order of `scores`; those of other layers are the same tensors.

    Example:
        >>> part = FeedForward(into=("up",), out="down", units=2)
        >>> tied = tie_scores({"up": torch.tensor([[4.0], [1.0]]), "down": torch.tensor([[1.0, 9.0]])}, [part])
        >>> tied["up"].tolist(), tied["down"].tolist()
        ([[2.0], [3.0]], [[2.0, 3.0]])
    """
    tied = dict(scores)
    for part in parts:
        members = [scores[part.out].flatten()]
        for name in part.into:
            rows = scores[name].view(-1, part.units)
            # Where one linear holds gates and inputs, [2F, D], rows u and F + u belong to unit u.
            members.extend(rows)
        unit = torch.stack(members).pow(1.0 / len(members)).prod(0)
        for name in part.into:
            tied[name] = unit.repeat(scores[name].numel() // part.units).view_as(scores[name])
        tied[part.out] = unit.view_as(scores[part.out])
    return tied

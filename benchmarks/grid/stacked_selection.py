"""Which blocks of many models stay, a row of scores each, as `hf_sparse.training.pruning.selection` does for one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_sparse.training.pruning.selection import num_removed, share_of


def removed(scores: Tensor, sparsity: Sequence[float]) -> list[int]:
    """Give how many blocks go from each row of scores [n, blocks]."""
    return [num_removed(scores.shape[1], s) for s in sparsity]


def keep_highest(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """Keep all but the lowest of every row, ties by position.

    Args:
        scores: [n, blocks], no NaN.
        counts: n, how many go.

    Returns:
        [n, blocks] bool.
    """
    gone = torch.tensor(counts, device=scores.device)[:, None]
    threshold = scores.sort(dim=1).values.gather(1, (gone - 1).clamp(min=0))
    below, tied = scores < threshold, scores == threshold
    left = gone - below.sum(1, keepdim=True)
    return ~(below | (tied & (tied.cumsum(1) <= left))) | (gone == 0)


def decide_inside(scores: Tensor, sparsity: Sequence[float], share: float) -> Tensor:
    """Decide a share of each row's own budget before it competes with the other layers of its model.

    Args:
        scores: [n, blocks], -inf where pruned already.
        sparsity: n, of each model.
        share: in [0, 1].

    Returns:
        [n, blocks]: +inf where a block has to stay, the lowest finite value where it has to go.
    """
    if not share:
        return scores
    own, there = removed(scores, sparsity), scores > float("-inf")
    go = keep_highest(scores, [share_of(count, share) for count in own])
    scores = torch.where(go | ~there, scores, torch.finfo(scores.dtype).min)
    stay = keep_highest(scores, [scores.shape[1] - share_of(scores.shape[1] - count, share) for count in own])
    return torch.where(stay & there, float("inf"), scores)

"""Which blocks stay when a budget is filled: inside one weight, or over all of them at once.

Selection in linear time, without sorting. Ties go by position, the same on every rank and device, as a stable sort
would decide them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

# Scores are told apart 16 bits at a time: a count for each of 65,536 values, whatever the number of blocks.
_DIGIT = 16


def num_removed(num_blocks: int, sparsity: float) -> int:
    """Give how many of `num_blocks` blocks a sparsity in [0, 1) removes: rounded, halves up.

    Example:
        >>> num_removed(10, 0.25)
        3
    """
    return int(sparsity * num_blocks + 0.5)


def keep_highest(scores: Tensor, removed: int) -> Tensor:
    """Keep all but the `removed` lowest of some scores.

    Args:
        scores: [n] float, no NaN.
        removed: in [0, n].

    Returns:
        [n] bool, True = keep.

    Example:
        >>> keep_highest(torch.tensor([3., 1., 1., 2.]), 1)
        tensor([ True, False,  True,  True])
    """
    if removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = torch.kthvalue(scores, removed).values
    below, tied = scores < threshold, scores == threshold
    return ~(below | (tied & (tied.cumsum(0) <= removed - below.sum())))


def keep_highest_of_all(scores: Mapping[str, Tensor], sizes: Mapping[str, int], budget: int) -> dict[str, Tensor]:
    """Remove the lowest of all scores, in order, until the next one would exceed the budget.

    The layers are never put together, so that a large model takes no more memory than its largest layer, and they may
    lie on different devices.

    Args:
        scores: {name: [n] float, no NaN}; n may differ.
        sizes: {name: what removing one block of this layer takes from the budget}, positive.
        budget: how much may be removed in all, >= 0.

    Returns:
        {name: [n] bool, True = keep}.

    Example:
        >>> kept = keep_highest_of_all({"a": torch.tensor([3., 1.]), "b": torch.tensor([2., 9.])}, {"a": 1, "b": 1}, 2)
        >>> kept["a"], kept["b"]
        (tensor([ True, False]), tensor([False,  True]))
    """
    if budget >= sum(sizes[name] * score.numel() for name, score in scores.items()):
        return {name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items()}
    wide = any(score.dtype == torch.float64 for score in scores.values())

    def keys() -> Iterator[tuple[str, Tensor]]:
        for name, score in scores.items():
            yield name, _ordered_bits(score.double() if wide else score.float())

    threshold, left = _first_that_exceeds(keys, sizes, budget, 64 if wide else 32)
    kept = {}
    for name, key in keys():
        tied = key == threshold
        count = int(tied.sum())
        fitting = min(count, left // sizes[name])
        kept[name] = ~((key < threshold) | (tied & (tied.cumsum(0) <= fitting)))
        # What does not fit ends the removal: no later, smaller block slips in instead.
        left = left - fitting * sizes[name] if fitting == count else 0
    return kept


def decide_inside(score: Tensor, removed: int, share: float) -> Tensor:
    """Decide a share of a layer's own budget before it competes with others: its best blocks stay, its worst go.

    Args:
        score: [n] float, no NaN; -inf where pruned already.
        removed: how many blocks a budget of its own would remove, in [0, n].
        share: the part of these that has to go, and of the others that has to stay, in [0, 1].

    Returns:
        [n]: +inf where a block has to stay, the lowest finite value where it has to go, else its score.

    Example:
        >>> decide_inside(torch.tensor([3., 1., 2., 4.]), 2, 0.5).clamp(min=0.)
        tensor([3., 0., 2., inf])
    """
    stay, go = math.ceil(share * (score.numel() - removed)), math.ceil(share * removed)
    there = score > float("-inf")
    # Above what is pruned already, which counts first.
    score = torch.where(keep_highest(score, go) | ~there, score, torch.finfo(score.dtype).min)
    return torch.where(keep_highest(score, score.numel() - stay) & there, float("inf"), score)


def _ordered_bits(score: Tensor) -> Tensor:
    """Give integers in the order of floats: IEEE 754 orders magnitudes as integers, and negative ones backwards."""
    signed, largest = (torch.int32, 2**31 - 1) if score.dtype == torch.float32 else (torch.int64, 2**63 - 1)
    bits = (score + 0.0).view(signed)  # -0.0 becomes 0.0
    return torch.where(bits < 0, bits ^ largest, bits)


def _first_that_exceeds(
    keys: Callable[[], Iterator[tuple[str, Tensor]]], sizes: Mapping[str, int], budget: int, bits: int
) -> tuple[int, int]:
    """Find the lowest key up to which all blocks together exceed the budget, and what is left of it below that key."""
    prefix, left = 0, budget
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        first = shift == bits - _DIGIT
        taken = torch.zeros(2**_DIGIT, dtype=torch.int64)
        for name, key in keys():
            if first:
                digits = (key >> shift) + 2 ** (_DIGIT - 1)  # signed
            else:
                digits = (key[(key >> (shift + _DIGIT)) == prefix] >> shift) & (2**_DIGIT - 1)
            taken += torch.bincount(digits, minlength=2**_DIGIT).cpu() * sizes[name]
        total = taken.cumsum(0)
        digit = int(torch.searchsorted(total, left, right=True))
        left -= int(total[digit - 1]) if digit else 0
        prefix = digit - 2 ** (_DIGIT - 1) if first else (prefix << _DIGIT) | digit
    return prefix, left

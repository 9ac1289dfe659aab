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
    return keep_highest_of_all({"": scores}, {"": 1}, removed)[""]


def keep_highest_of_all(scores: Mapping[str, Tensor], sizes: Mapping[str, int], budget: int) -> dict[str, Tensor]:
    """Remove the lowest of all scores, in order, until the next one would exceed the budget.

    The layers are never put together: besides the result it takes the memory of the largest, and they may lie on
    different devices.

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


def keep_with_shares(
    scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], sizes: Mapping[str, int], sparsity: float, share: float
) -> dict[str, Tensor]:
    """Remove the lowest of all scores, after each layer has decided a share of what its own budget would be.

    So much of what a layer would lose by itself goes first, and so much of what it would keep goes last, its best
    block last of all. The budget is met to within a block: where layers have so few blocks that their shares, rounded
    up, do not fit it, the scores decide among them.

    Args:
        scores: {name: [n] float, no NaN}.
        alive: {name: [n] bool}, False = pruned already, which counts first.
        sizes: {name: what removing one block of this layer takes from the budget}, positive.
        sparsity: fraction to remove, in [0, 1).
        share: in [0, 1]; 0 = all blocks compete.

    Returns:
        {name: [n] bool, True = keep}.

    Example:
        >>> scores = {"a": torch.tensor([1., 2., 3., 4.]), "b": torch.tensor([5., 6., 7., 8.])}
        >>> alive, sizes = {name: score > 0 for name, score in scores.items()}, {"a": 1, "b": 1}
        >>> [keep_with_shares(scores, alive, sizes, 0.5, share)["a"].sum().item() for share in (0.0, 0.5, 1.0)]
        [0, 1, 2]
    """
    tiers = {name: _tiers(score, alive[name], sparsity, share) for name, score in scores.items()}
    left = num_removed(sum(sizes[name] * score.numel() for name, score in scores.items()), sparsity)
    counts = torch.zeros(_TIERS, dtype=torch.int64)
    for name, tier in tiers.items():
        counts += torch.bincount(tier, minlength=_TIERS).cpu() * sizes[name]
    for at, count in enumerate(counts.tolist()):
        if left < count:
            kept = {name: tier > at for name, tier in tiers.items()}
            here = {name: tier == at for name, tier in tiers.items()}
            chosen = keep_highest_of_all({name: scores[name][here[name]] for name in scores}, sizes, left)
            for name, inside in chosen.items():
                kept[name][here[name]] = inside
            return kept
        left -= count
    return {name: torch.zeros_like(tier, dtype=torch.bool) for name, tier in tiers.items()}


_TIERS = 5  # pruned, to go, competing, to stay, the best block


def _tiers(score: Tensor, alive: Tensor, sparsity: float, share: float) -> Tensor:
    """Tell in which order the blocks of a layer go, whatever others score: [n] uint8, the lowest first."""
    blocks, removed = score.numel(), num_removed(score.numel(), sparsity)
    score = torch.where(alive, score, float("-inf"))
    # Rounded up, but not for what floats add to a whole number.
    go, stay = (math.ceil(round(share * count, 6)) for count in (removed, blocks - removed))
    tiers = torch.full_like(score, 2, dtype=torch.uint8)
    if go:
        tiers[~keep_highest(score, go)] = 1
    if stay:
        tiers[keep_highest(score, blocks - stay)] = 3
        tiers[score.argmax()] = 4
    return tiers.masked_fill_(~alive, 0)


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

"""Which blocks stay when a budget is filled: inside one weight, or over all of them at once.

Selection in linear time, without sorting. Ties go by position, the same on every rank and device, as a stable sort
would decide them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Scores are told apart 11 bits at a time: 2,048 counts per layer, whatever its number of blocks.
_DIGIT = 11


class Bounds(NamedTuple):
    """How many blocks of a layer have to go, and how many may at most."""

    least: int
    most: int


def num_removed(num_blocks: int, sparsity: float) -> int:
    """Give how many of `num_blocks` blocks a sparsity in [0, 1) removes: rounded, halves up.

    Example:
        >>> num_removed(10, 0.25)
        3
    """
    return int(sparsity * num_blocks + 0.5)


def share_of(num_blocks: int, share: float) -> int:
    """Give a share, in [0, 1], of `num_blocks` blocks: rounded up, but not for what floats add to a whole number.

    Example:
        >>> share_of(100, 0.07), share_of(5, 0.5)
        (7, 3)
    """
    return math.ceil(round(share * num_blocks, 6))


def keep_highest(scores: Tensor, removed: int, alive: Tensor | None = None) -> Tensor:
    """Keep all but the `removed` lowest of some scores.

    Args:
        scores: [n] float, no NaN where it is alive.
        removed: in [0, n].
        alive: [n] bool, False = pruned already: counts, and goes first; None = all True.

    Returns:
        [n] bool, True = keep.

    Example:
        >>> keep_highest(torch.tensor([3., 1., 1., 2.]), 1)
        tensor([ True, False,  True,  True])
    """
    return keep_highest_of_all({"": scores}, {"": 1}, removed, alive=None if alive is None else {"": alive})[""]


def keep_highest_of_all(
    scores: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    budget: int,
    bounds: Mapping[str, Bounds] | None = None,
    alive: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Remove the lowest of all scores, in order, until the next one would exceed the budget.

    Takes the memory of one more set of scores. The layers may lie on different devices.

    Args:
        scores: {name: [n] float, no NaN where it is alive}; n may differ.
        sizes: {name: what removing one block of this layer takes from the budget}, positive.
        budget: how much may be removed in all, >= 0.
        bounds: {name: how many blocks go from each layer}, the least of them within the budget together; None = any
            number.
        alive: {name: [n] bool}, False = pruned already: counts, and goes first; None = all True.

    Returns:
        {name: [n] bool, True = keep}.

    Example:
        >>> kept = keep_highest_of_all({"a": torch.tensor([3., 1.]), "b": torch.tensor([2., 9.])}, {"a": 1, "b": 1}, 2)
        >>> kept["a"], kept["b"]
        (tensor([ True, False]), tensor([False,  True]))
    """
    if not scores:
        return {}
    bits = 64 if any(score.dtype == torch.float64 for score in scores.values()) else 32
    keys = [_ordered(score, None if alive is None else alive[name], bits) for name, score in scores.items()]
    counts = [len(key) for key in keys]
    least, most = (
        ([0] * len(counts), counts) if bounds is None else zip(*(bounds[name] for name in scores), strict=True)
    )
    size, low, high = (torch.tensor(values) for values in ([sizes[name] for name in scores], least, most))
    threshold, below, upto = _threshold(keys, size, low, high, budget)
    gone = torch.minimum(torch.maximum(below, low), high)
    spare = torch.minimum(torch.maximum(upto, low), high) - gone
    left, kept = budget - int((gone * size).sum()), {}
    for at, (name, key) in enumerate(zip(scores, keys, strict=True)):
        more = min(int(spare[at]), left // int(size[at]))
        # What does not fit ends the removal: no later, smaller block slips in instead.
        left = left - more * int(size[at]) if more == int(spare[at]) else 0
        count = int(gone[at]) + more
        if int(below[at]) <= count <= int(upto[at]):
            kept[name] = _keep_from(key, threshold, count - int(below[at]))
        else:  # at one of its bounds
            own, under = _alone(key, count)
            kept[name] = _keep_from(key, own, count - under)
    return kept


def share_bounds(
    counts: Mapping[str, int], pruned: Mapping[str, int], sizes: Mapping[str, int], sparsity: float, share: float
) -> dict[str, Bounds]:
    """Give the bounds of layers that each decide a share of what their own budget would be.

    So much of what a layer would lose by itself has to go, and so much of what it would keep has to stay, rounded up.
    Where layers have so few blocks that these do not fit the budget together, a block of each stays if that fits, and
    the scores decide about the rest.

    Args:
        counts: {name: blocks}.
        pruned: {name: blocks that are pruned already}.
        sizes: {name: what one block takes from the budget}, positive.
        sparsity: fraction to remove, in [0, 1).
        share: in [0, 1].

    Example:
        >>> share_bounds({"a": 8, "b": 16}, {"a": 0, "b": 0}, {"a": 1, "b": 1}, 0.75, 0.5)
        {'a': Bounds(least=3, most=7), 'b': Bounds(least=6, most=14)}
    """
    own = {name: num_removed(count, sparsity) for name, count in counts.items()}
    budget = num_removed(sum(count * sizes[name] for name, count in counts.items()), sparsity)
    least = {name: share_of(removed, share) for name, removed in own.items()}
    stay = {name: share_of(counts[name] - removed, share) for name, removed in own.items()}
    if sum(max(least[name], pruned[name]) * size for name, size in sizes.items()) > budget:
        least = dict.fromkeys(least, 0)
    for stays in (stay, {name: min(count, 1) for name, count in stay.items()}, dict.fromkeys(stay, 0)):
        most = {name: max(count - stays[name], pruned[name]) for name, count in counts.items()}
        if sum(most[name] * size for name, size in sizes.items()) >= budget:
            break
    return {name: Bounds(least[name], most[name]) for name in counts}


def _ordered(score: Tensor, alive: Tensor | None, bits: int) -> Tensor:
    """Give integers in the order of floats: IEEE 754 orders magnitudes as integers, and negative ones backwards.

    The lowest and the highest of `bits` bits would be NaN: no score has them, so the lowest stands for what is pruned.
    """
    # Adding makes 0.0 of -0.0, and a copy, which is written to below.
    key = ((score.double() if bits == 64 else score.float()) + 0.0).view(torch.int64 if bits == 64 else torch.int32)
    # All bits but the sign turned around where it is set.
    key ^= (key >> (bits - 1)) & torch.iinfo(key.dtype).max
    return key if alive is None else torch.where(alive, key, torch.iinfo(key.dtype).min)


def _keep_from(key: Tensor, threshold: int, ties: int) -> Tensor:
    """Keep what is not below a threshold, less the first so many of those that are equal to it."""
    kept = key >= threshold
    if ties:
        kept[(key == threshold).nonzero().flatten()[:ties]] = False
    return kept


def _alone(key: Tensor, removed: int) -> tuple[int, int]:
    """Find the threshold of one layer by itself, and how many are below it."""
    one, none, all_ = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.tensor([len(key)])
    threshold, below, _ = _threshold([key], one, none, all_, removed)
    return threshold, int(below)


def _threshold(
    keys: Sequence[Tensor], size: Tensor, low: Tensor, high: Tensor, budget: int
) -> tuple[int, Tensor, Tensor]:
    """Find the lowest key up to which all blocks together exceed the budget, each layer within its bounds.

    Args:
        keys: [n] each, integers of one dtype.
        size, low, high: [layers].
        budget: what may be removed.

    Returns:
        (key, how many blocks of each layer are below it, how many up to it); the highest key there can be, below which
        all are, if the budget is not exceeded.
    """
    bits = shift = torch.iinfo(keys[0].dtype).bits
    prefix, below = 0, torch.zeros_like(size)
    while shift:
        first, width = shift == bits, min(_DIGIT, shift)
        if not first:
            keys = [key[(key >> shift) == prefix] for key in keys]
        shift -= width
        base = -(2 ** (width - 1)) if first else prefix << width  # the first digit is signed
        counts = torch.stack([torch.bincount((key >> shift) - base, minlength=2**width).cpu() for key in keys])
        upto = counts.cumsum_(1).add_(below[:, None])
        removed = (torch.minimum(torch.maximum(upto, low[:, None]), high[:, None]) * size[:, None]).sum(0)
        digit = int(torch.searchsorted(removed, budget, right=True))
        if digit == 2**width:
            return torch.iinfo(keys[0].dtype).max, upto[:, -1], upto[:, -1]
        below = upto[:, digit - 1] if digit else below
        prefix = base + digit
    return prefix, below, upto[:, digit]

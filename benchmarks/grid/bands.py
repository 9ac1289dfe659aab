"""A search for the order of rows under which bands of them hold the most beyond a threshold."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_PASSES = 8


def group_rows(profiles: Tensor, height: int) -> Tensor:
    """Order rows so that bands of `height` hold as much as they can beyond 1 per column: sum of max(0, band - 1).

    Starts from the rows as they lie or, if better, halved again and again along the direction in which they differ
    most; then pairs of bands exchange a row each as long as that gains.

    Args:
        profiles: [n, C], >= 0; n a multiple of height.
        height: rows in a band.

    Returns:
        [n], a permutation.
    """
    chance, profiles = torch.Generator().manual_seed(0), profiles.float()
    starts = torch.arange(len(profiles)), _halved(profiles.clamp(max=2 / height), height, chance)
    best = max(starts, key=lambda order: float(_beyond(profiles[order].unflatten(0, (-1, height)).sum(1)).sum()))
    order = best.view(-1, height)
    for _ in range(_PASSES):
        order = order.gather(1, torch.rand(order.shape, generator=chance).argsort(1))
        for place in range(height):
            _exchange_(order, place, profiles)
    return order.flatten()


def _exchange_(order: Tensor, place: int, profiles: Tensor) -> None:
    """Let pairs of bands exchange their rows at a place, those that gain most first, each band once."""
    bands, rows = torch.arange(len(order)), profiles[order[:, place]]
    rest = profiles[order].sum(1) - rows
    # [bands, bands]: what a band would hold with each of the rows.
    with_row = torch.stack([_beyond(rows + own).sum(1) for own in rest])
    now = with_row.diagonal()
    gain = (with_row + with_row.T - now[:, None] - now).triu(1).flatten()
    best, pairs = gain.topk(min(len(gain), 8 * len(order)))
    for pair in pairs[best > 1e-4].tolist():
        one, other = divmod(pair, len(order))
        if bands[one] == one and bands[other] == other:
            bands[one], bands[other] = other, one
    order[:, place] = order[bands, place]


def _halved(profiles: Tensor, height: int, chance: torch.Generator) -> Tensor:
    """Order rows by halving them at the middle of their first principal direction, down to bands."""
    if len(profiles) <= height:
        return torch.arange(len(profiles))
    centred = profiles - profiles.mean(0)
    direction = torch.rand(profiles.shape[1], generator=chance)
    for _ in range(10):  # power iteration
        direction = nn.functional.normalize(centred.T @ (centred @ direction), dim=0)
    order = (centred @ direction).argsort()
    halves = order.tensor_split([math.ceil(len(order) / height / 2) * height])
    return torch.cat([half[_halved(profiles[half], height, chance)] for half in halves])


def _beyond(held: Tensor) -> Tensor:
    return (held - 1.0).clamp_(min=0.0)

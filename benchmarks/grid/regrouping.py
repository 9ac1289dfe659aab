"""Rows regrouped into bands before pruning, for cells of the accuracy grid: like rows share blocks of h x 1.

Feed-forward units may stand in any order, and so may channels inside a head (those of queries and keys in the same
one): what the model computes stays, which rows a block takes together does not. The last linears of both parts of a
layer write to the hidden states, whose order all layers share: their rows stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.grid.bands import group_rows
from hf_sparse.core.structure.targets import find_targets, weight_view
from hf_sparse.training.pruning.selection import keep_highest_of_all, num_removed

BATCHES, BATCH = 40, 32
_ROUNDS = 2

Scores = Mapping[str, Tensor]


class Movable(NamedTuple):
    """Linears whose rows move together, each inside its part, and the linear whose columns follow (None = none)."""

    rows: tuple[str, ...]
    follower: str | None
    parts: int


def movables(model: nn.Module) -> Iterator[Movable]:
    """List what may be regrouped in a `BertForSequenceClassification`."""
    config: Any = model.config
    for i in range(config.num_hidden_layers):
        layer, heads = f"bert.encoder.layer.{i}", config.num_attention_heads
        attention = f"{layer}.attention.self"
        yield Movable((f"{attention}.query", f"{attention}.key"), None, heads)
        yield Movable((f"{attention}.value",), f"{layer}.attention.output.dense", heads)
        yield Movable((f"{layer}.intermediate.dense",), f"{layer}.output.dense", 1)


def draw_batches(rows: Any, collate: Any, count: int = BATCHES, size: int = BATCH) -> Iterator[dict[str, Tensor]]:
    """Draw batches of training rows, the same each time and without touching the global random numbers.

    Args:
        rows: data set of token ids and labels; fewer batches are drawn if it has too few.
        collate: makes a batch of a list of rows.
        count: batches.
        size: rows in each.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: count * size]
    for some in order.split(size):
        yield dict(collate([rows[i] for i in some.tolist()]))


def measure_scores(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], bf16: bool = False) -> dict[str, Tensor]:
    """Score single weights by Fisher information, as the default does: squared weight times mean squared gradient.

    A block's score is the sum over its weights. Gradients are those of the mean loss of a batch under the labels: at
    the start the student is its teacher, and distillation has none.

    Args:
        model: run in eval mode; its mode is put back.
        batches: what it is called with, labels included.
        bf16: whether under autocast.

    Returns:
        {name: [O, I], >= 0} of all linears that are pruned.
    """
    targets = find_targets(model)
    weights: list[Any] = [target.weight for target in targets.values()]
    squares, seen, was_training = [torch.zeros_like(weight) for weight in weights], 0, model.training
    model.eval()
    try:
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(**batch).loss
            for square, grad in zip(squares, torch.autograd.grad(loss, weights), strict=True):
                square.addcmul_(grad, grad)
            seen += 1
    finally:
        model.train(was_training)
    means = zip(targets.items(), squares, strict=True)
    return {name: weight_view(target).detach().square() * square / seen for (name, target), square in means}


def kept_scores(
    scores: Scores, height: int, sparsity: float, orders: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Give the share of all scores that lies in the blocks kept, under one budget over all linears.

    Args:
        scores: {name: [O, I]} of single weights.
        height: of the blocks, which are one column wide; 1 = single weights.
        sparsity: in [0, 1).
        orders: {name: [O]}, in which order its rows stand; as they lie where it has none.

    Returns:
        {"all" and kind of linear: share}.
    """
    bands = _bands(scores, height, orders or {})
    held: dict[str, list[float]] = {}
    for name, mask in _keep(bands, sparsity).items():
        kept, whole = float(bands[name][mask].double().sum()), float(bands[name].double().sum())
        for key in ("all", name.split(".layer.")[1].split(".", 1)[1]):
            both = held.setdefault(key, [0.0, 0.0])
            both[0] += kept
            both[1] += whole
    return {key: kept / whole if whole else 0.0 for key, (kept, whole) in held.items()}


def find_orders(model: nn.Module, scores: Scores, height: int = 8, sparsity: float = 0.9) -> dict[str, Tensor]:
    """Search for the orders of rows under which the blocks kept at a sparsity hold the most.

    Blocks that hold more than a threshold are kept, so at that threshold the gain of an order is the sum of what
    blocks hold beyond it: a sum over bands, which is searched for each layer alone. Then the threshold is taken anew.

    Args:
        model: says what may move; unchanged.
        scores: {name: [O, I]}.
        height: of the bands; divides every linear, and parts that it does not divide stay as they are.
        sparsity: of all linears together.

    Returns:
        {name: [O], a permutation} of all linears whose rows may move.

    Raises:
        ValueError: if the height does not divide a linear.
    """
    for name, score in scores.items():
        if len(score) % height:
            raise ValueError(f"height={height} does not divide the {len(score)} rows of {name}: use one that does.")
    orders = {name: torch.arange(len(scores[name])) for movable in movables(model) for name in movable.rows}
    found = [orders]
    for _ in range(_ROUNDS):
        bands, orders = _bands(scores, height, orders), dict(orders)
        lowest = min(float(bands[name][mask].min()) for name, mask in _keep(bands, sparsity).items() if mask.any())
        for rows, _, parts in movables(model):
            size = len(orders[rows[0]]) // parts
            if size % height or lowest <= 0.0:
                continue
            profiles = torch.cat([scores[name][orders[name]] for name in rows], dim=1) / lowest
            inside = [group_rows(part, height) + i * size for i, part in enumerate(profiles.split(size))]
            orders |= {name: orders[name][torch.cat(inside)] for name in rows}
        found.append(orders)
    return max(found, key=lambda orders: kept_scores(scores, height, sparsity, orders)["all"])


def _bands(scores: Scores, height: int, orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum scores over blocks of height x 1: {name: [O / height, I]}."""
    ordered = {name: score[orders[name]] if name in orders else score for name, score in scores.items()}
    return {name: score.unflatten(0, (-1, height)).sum(1) for name, score in ordered.items()}


def _keep(bands: Scores, sparsity: float) -> dict[str, Tensor]:
    budget = num_removed(sum(band.numel() for band in bands.values()), sparsity)
    kept = keep_highest_of_all({name: band.flatten() for name, band in bands.items()}, dict.fromkeys(bands, 1), budget)
    return {name: mask.view_as(bands[name]) for name, mask in kept.items()}


@torch.no_grad()
def regroup(model: nn.Module, scores: Scores, height: int = 8, sparsity: float = 0.9) -> dict[str, Tensor]:
    """Regroup a model in place, as `find_orders` says: it computes what it did, up to the order of sums.

    Args:
        model: a `BertForSequenceClassification`.
        scores: {name: [O, I]} of its linears, in the order in which they are.
        height: of the blocks it will be pruned in.
        sparsity: to which.

    Returns:
        The orders.
    """
    orders = find_orders(model, scores, height, sparsity)
    for rows, follower, _ in movables(model):
        for name in rows:
            for parameter in model.get_submodule(name).parameters():  # weight and bias
                parameter.copy_(parameter[orders[name]])
        if follower is not None:
            weight: Any = model.get_submodule(follower).weight
            weight.copy_(weight[:, orders[rows[0]]])
    return orders

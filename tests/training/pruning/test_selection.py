"""The selection over many layers, with and without bounds, against one stable sort of all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_sparse.training.pruning.masks import BlockMasks
from hf_sparse.training.pruning.selection import Bounds, keep_highest, keep_highest_of_all, num_removed, share_bounds

INF = float("inf")


def by_sorting(scores: dict[str, Tensor], sizes: dict[str, int], budget: int) -> dict[str, Tensor]:
    """The law: all blocks in one stable order, removed as long as their sizes fit."""
    joined = torch.cat(list(scores.values()))
    size = torch.cat([torch.full((len(score),), sizes[name]) for name, score in scores.items()])
    order = torch.sort(joined, stable=True).indices
    keep = torch.empty_like(joined, dtype=torch.bool)
    keep[order] = size[order].cumsum(0) > budget
    return dict(zip(scores, keep.split([len(score) for score in scores.values()]), strict=True))


def layers(generator: torch.Generator, dtype: torch.dtype, coarse: bool) -> dict[str, Tensor]:
    """One to four layers of up to 40 blocks, with infinities, zeros of both signs and, if coarse, many ties."""
    scores = {}
    for name in "abcd"[: int(torch.randint(1, 5, (), generator=generator))]:
        count = int(torch.randint(1, 41, (), generator=generator))
        score = torch.randn(count, generator=generator, dtype=torch.float64)
        score = (score * 2).round() / 2 if coarse else score * 1e-3
        for value, share in ((-INF, 0.2), (INF, 0.1), (-0.0, 0.1), (0.0, 0.1)):
            score[torch.rand(count, generator=generator) < share] = value
        scores[name] = score.to(dtype)
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_over_layers_as_one_stable_sort(dtype: torch.dtype, coarse: bool, mixed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        scores = layers(generator, dtype, coarse)
        size = torch.randint(1, 5, (len(scores),), generator=generator).tolist()
        sizes = dict(zip(scores, size if mixed else [1] * len(scores), strict=True))
        total = sum(sizes[name] * len(score) for name, score in scores.items())
        budget = int(torch.rand((), generator=generator) * (total + 1))
        right, found = by_sorting(scores, sizes, budget), keep_highest_of_all(scores, sizes, budget)
        assert all(torch.equal(found[name], right[name]) for name in scores)
        if not mixed:
            assert sum(int((~keep).sum()) for keep in found.values()) == budget


def test_scores_that_differ_in_their_last_bit() -> None:
    score = torch.tensor([1.0, 1.0 + 2**-52, 1.0 + 2**-51, 1.0 - 2**-53], dtype=torch.float64)
    found = keep_highest_of_all({"a": score[:2], "b": score[2:]}, {"a": 1, "b": 1}, 2)
    assert (found["a"].tolist(), found["b"].tolist()) == ([False, True], [True, False])


def test_layers_of_two_dtypes_compare_as_numbers() -> None:
    scores = {"a": torch.tensor([0.1, 0.3]), "b": torch.tensor([0.2, 0.4], dtype=torch.float64)}
    found = keep_highest_of_all(scores, {"a": 1, "b": 1}, 2)
    assert (found["a"].tolist(), found["b"].tolist()) == ([False, True], [False, True])


@pytest.mark.parametrize("budget", [3, 4])
def test_everything_may_go(budget: int) -> None:
    found = keep_highest_of_all({"a": torch.ones(2), "b": torch.zeros(1)}, {"a": 1, "b": 1}, budget)
    assert not any(bool(keep.any()) for keep in found.values())


def test_inside_one_layer_as_a_stable_sort() -> None:
    generator = torch.Generator().manual_seed(1)
    for number in range(150):
        (score,) = list(layers(generator, torch.float32, coarse=number % 2 == 0).values())[:1]
        removed = int(torch.rand((), generator=generator) * (len(score) + 1))
        assert torch.equal(keep_highest(score, removed), by_sorting({"a": score}, {"a": 1}, removed)["a"])


def by_tiers(
    scores: dict[str, Tensor], alive: dict[str, Tensor], sizes: dict[str, int], budget: int, bounds: dict[str, Bounds]
) -> dict[str, list[bool]]:
    """The law of bounds: what has to go, then what may go by score, layer and position, as long as sizes fit."""
    kept, blocks = {}, []
    for layer, (name, score) in enumerate(scores.items()):
        values = [float(value) if there else -INF for value, there in zip(score, alive[name], strict=True)]
        order = sorted(range(len(score)), key=lambda at: (bool(alive[name][at]), values[at], at))
        kept[name] = [True] * len(score)
        for rank, at in enumerate(order[: bounds[name].most]):
            blocks.append((rank >= bounds[name].least, bool(alive[name][at]), values[at], layer, at, name))
    for *_, at, name in sorted(blocks):
        if budget < sizes[name]:
            break
        kept[name][at] = False
        budget -= sizes[name]
    return kept


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.07, 0.25, 0.5, 1.0])
def test_shares_are_decided_inside_and_the_rest_competes(share: float, coarse: bool, mixed: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(60):
        scores = layers(generator, torch.float32, coarse)
        alive = {name: torch.rand(len(score), generator=generator) > 0.1 for name, score in scores.items()}
        size = torch.randint(1, 5, (len(scores),), generator=generator).tolist()
        sizes = dict(zip(scores, size if mixed else [1] * len(scores), strict=True))
        sparsity = 0.12 + 0.85 * float(torch.rand((), generator=generator))
        counts = {name: len(score) for name, score in scores.items()}
        pruned = {name: int((~there).sum()) for name, there in alive.items()}
        budget = num_removed(sum(counts[name] * sizes[name] for name in scores), sparsity)
        if sum(pruned[name] * sizes[name] for name in scores) > budget:
            continue
        bounds = share_bounds(counts, pruned, sizes, sparsity, share)
        found = keep_highest_of_all(scores, sizes, budget, bounds, alive)
        assert {n: keep.tolist() for n, keep in found.items()} == by_tiers(scores, alive, sizes, budget, bounds)
        for name, keep in found.items():
            gone = int((~keep).sum())
            assert bounds[name].least <= max(gone, pruned[name]) and gone <= bounds[name].most
        if not mixed:
            assert sum(int((~keep).sum()) for keep in found.values()) == budget


@pytest.mark.parametrize(("layers_", "blocks", "sparsity"), [(24, 9, 0.9), (10, 2, 0.7), (10, 1, 0.4), (12, 3, 0.7)])
def test_where_rounded_shares_do_not_fit_scores_decide(layers_: int, blocks: int, sparsity: float) -> None:
    # The first layers score highest: position is not what they may be emptied by.
    scores = {
        str(n): torch.rand(blocks, generator=torch.Generator().manual_seed(n)) + layers_ - n for n in range(layers_)
    }
    masks = BlockMasks({name: nn.Linear(blocks, 1) for name in scores}, (1, 1), "global", 0.25)
    masks.choose(sparsity, {name: score[None] for name, score in scores.items()})
    kept = [int(mask.sum()) for mask in masks.masks.values()]
    left = layers_ * blocks - num_removed(layers_ * blocks, sparsity)
    assert sum(kept) == left and kept == sorted(kept, reverse=True)
    if left >= layers_:
        assert min(kept) == 1


def test_few_blocks_to_go_are_the_lowest_of_all() -> None:
    masks = BlockMasks({str(n): nn.Linear(9, 1) for n in range(10)}, (1, 1), "global", 0.25)
    # Every layer would have to let one of 9 go, and 5 of 90 is what may go.
    masks.choose(0.06, {str(n): torch.arange(9.0)[None] + 10 * n for n in range(10)})
    assert [int(mask.sum()) for mask in masks.masks.values()] == [4, *[9] * 9]


@pytest.mark.parametrize(("sparsity", "count"), [(0.0, 0), (0.04, 0), (0.05, 1), (0.5, 5), (0.94, 9), (0.95, 10)])
def test_counts_are_rounded_halves_up(sparsity: float, count: int) -> None:
    assert num_removed(10, sparsity) == count

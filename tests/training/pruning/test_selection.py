"""The selection over many layers against one stable sort of all of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_sparse.training.pruning.selection import keep_highest, keep_highest_of_all, keep_with_shares, num_removed

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
    scores: dict[str, Tensor], alive: dict[str, Tensor], sizes: dict[str, int], sparsity: float, share: float
) -> dict[str, list[bool]]:
    """The law of shares: one list of all blocks, by tier, score and position, removed as long as their sizes fit."""
    blocks = []
    for layer, (name, score) in enumerate(scores.items()):
        count, removed = len(score), num_removed(len(score), sparsity)
        order = sorted(
            range(count), key=lambda at: (bool(alive[name][at]), float(score[at]) if alive[name][at] else 0, at)
        )
        go, stay = (math.ceil(round(share * part, 6)) for part in (removed, count - removed))
        for rank, at in enumerate(order):
            tier = 4 if stay and rank == count - 1 else 3 if rank >= count - stay else 1 if rank < go else 2
            blocks.append((tier if alive[name][at] else 0, float(score[at]), layer, at, name))
    budget = num_removed(sum(sizes[name] * len(score) for name, score in scores.items()), sparsity)
    kept = {name: [True] * len(score) for name, score in scores.items()}
    for *_, at, name in sorted(blocks):
        if budget < sizes[name]:
            break
        kept[name][at] = False
        budget -= sizes[name]
    return kept


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.07, 0.25, 0.5, 1.0])
def test_shares_are_decided_inside_and_the_rest_competes(share: float, mixed: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(60):
        # Scores that differ, so that no tie is to be decided, and infinite ones that are nobody's mark.
        scores = {
            name: torch.randperm(97, generator=generator)[: len(score)].float().masked_fill_(score == INF, INF)
            for name, score in layers(generator, torch.float32, coarse=False).items()
        }
        scores = {name: score for name, score in scores.items() if int((score == INF).sum()) < 2}
        if not scores:
            continue
        alive = {name: torch.rand(len(score), generator=generator) > 0.1 for name, score in scores.items()}
        size = torch.randint(1, 5, (len(scores),), generator=generator).tolist()
        sizes = dict(zip(scores, size if mixed else [1] * len(scores), strict=True))
        sparsity = float(torch.rand((), generator=generator) * 0.98)
        found = keep_with_shares(scores, alive, sizes, sparsity, share)
        right = by_tiers(scores, alive, sizes, sparsity, share)
        # What two layers score alike goes in the order of layers; which of two such blocks it is has no say in counts.
        assert {name: int(keep.sum()) for name, keep in found.items()} == {n: sum(keep) for n, keep in right.items()}
        assert all(keep.tolist() == right[name] for name, keep in found.items())


@pytest.mark.parametrize(("layers_", "blocks", "sparsity"), [(24, 9, 0.9), (10, 2, 0.7), (10, 1, 0.4), (12, 3, 0.7)])
def test_where_rounded_shares_do_not_fit_scores_decide(layers_: int, blocks: int, sparsity: float) -> None:
    # The first layers score highest: position is not what they may be emptied by.
    scores = {
        str(n): torch.rand(blocks, generator=torch.Generator().manual_seed(n)) + layers_ - n for n in range(layers_)
    }
    alive, sizes = {name: score > 0 for name, score in scores.items()}, dict.fromkeys(scores, 1)
    kept = [int(keep.sum()) for keep in keep_with_shares(scores, alive, sizes, sparsity, 0.25).values()]
    assert sum(kept) == layers_ * blocks - num_removed(layers_ * blocks, sparsity)
    assert min(kept[: sum(kept)]) >= 1 and kept == sorted(kept, reverse=True)


def test_few_blocks_to_go_are_the_lowest_of_all() -> None:
    scores = {str(n): torch.arange(9.0) + 10 * n for n in range(10)}
    alive, sizes = {name: score >= 0 for name, score in scores.items()}, dict.fromkeys(scores, 1)
    kept = [int(keep.sum()) for keep in keep_with_shares(scores, alive, sizes, 0.06, 0.25).values()]
    # Every layer has to let one of 9 go, and 5 of 90 is what may go.
    assert kept == [8] * 5 + [9] * 5


@pytest.mark.parametrize(("sparsity", "count"), [(0.0, 0), (0.04, 0), (0.05, 1), (0.5, 5), (0.94, 9), (0.95, 10)])
def test_counts_are_rounded_halves_up(sparsity: float, count: int) -> None:
    assert num_removed(10, sparsity) == count

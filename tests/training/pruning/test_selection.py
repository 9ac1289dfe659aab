"""The selection over many layers against one stable sort of all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_sparse.training.pruning.selection import decide_inside, keep_highest, keep_highest_of_all, num_removed

INF, LOWEST = float("inf"), torch.finfo(torch.float32).min


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


@pytest.mark.parametrize(("share", "expected"), [
    (0.0, [-INF, 1.0, 4.0, 3.0, 2.0, 9.0]),
    (0.25, [-INF, 1.0, 4.0, 3.0, 2.0, INF]),
    (0.5, [-INF, LOWEST, INF, 3.0, 2.0, INF]),
    (1.0, [-INF, LOWEST, INF, INF, LOWEST, INF]),
])  # fmt: skip
def test_a_share_is_decided_inside(share: float, expected: list[float]) -> None:
    score = torch.tensor([-INF, 1.0, 4.0, 3.0, 2.0, 9.0])
    assert decide_inside(score, 3, share).tolist() == expected


def test_nothing_that_is_gone_has_to_stay() -> None:
    assert decide_inside(torch.tensor([-INF, -INF, 1.0]), 1, 1.0).tolist() == [-INF, -INF, INF]


@pytest.mark.parametrize(("sparsity", "count"), [(0.0, 0), (0.04, 0), (0.05, 1), (0.5, 5), (0.94, 9), (0.95, 10)])
def test_counts_are_rounded_halves_up(sparsity: float, count: int) -> None:
    assert num_removed(10, sparsity) == count

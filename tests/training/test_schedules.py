"""Contract 4, the pure part: what a step does follows from (config, seed, step, total steps) alone."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest

from hf_sparse import plan_step
from hf_sparse.training.schedules import graft_draws, mask_update_steps

DEFAULTS = {
    "sparsity": 0.8, "sparsity_schedule": "cubic", "sparsity_start": 0.0, "sparsity_end": 0.6, "mask_updates": 100,
    "penalty_weight": 0.0, "penalty_reweights": 4, "graft_start": 1.0, "graft_hold": 0.0, "graft_end": 0.8,
}  # fmt: skip


def config(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**DEFAULTS, **changes})


def sparsities(total: int, **changes: Any) -> list[float]:
    return [plan_step(config(**changes), step, total).sparsity for step in range(total)]


def test_asked_in_any_order_the_plans_are_the_same() -> None:
    settings = config(penalty_weight=0.1, graft_start=0.3, graft_hold=0.1)
    in_order = [plan_step(settings, step, 57) for step in range(57)]
    steps = list(range(57)) * 2
    random.shuffle(steps)
    assert all(plan_step(settings, step, 57) == in_order[step] for step in steps)


def test_cubic_follows_its_formula() -> None:
    found = sparsities(101, sparsity_start=0.1, sparsity_end=0.6, mask_updates=50, sparsity=0.9)
    first, last = 10, 61
    updates = mask_update_steps(config(sparsity_start=0.1, sparsity_end=0.6, mask_updates=50), 101)
    assert updates[0] > first
    assert updates[-1] == last
    assert found[:11] == [0.0] * 11
    for index, step in enumerate(updates, start=1):
        assert found[step] == pytest.approx(0.9 * (1 - (1 - index / 50) ** 3))
    assert found[61:] == [0.9] * 40


def test_linear_follows_its_formula() -> None:
    found = sparsities(21, sparsity_schedule="linear", sparsity_end=0.5, mask_updates=11, sparsity=0.5)
    assert found == pytest.approx([0.5 * min(step, 11) / 11 for step in range(21)])


def test_one_shot_prunes_once_at_its_end() -> None:
    found = sparsities(10, sparsity_schedule="one_shot", sparsity_end=0.5)
    assert found == [0.0] * 5 + [0.8] * 5
    assert [
        plan_step(config(sparsity_schedule="one_shot", sparsity_end=0.5), s, 10).update_masks for s in range(10)
    ] == [step == 5 for step in range(10)]


@pytest.mark.parametrize("schedule", ["cubic", "linear", "one_shot"])
def test_every_run_however_short_ends_at_its_target(schedule: str) -> None:
    grid = itertools.product((1, 2, 3, 5, 7, 100), (0.0, 0.3, 1.0), (0.0, 0.3, 0.55, 1.0), (1, 3, 100))
    for total, start, end, updates in grid:
        if start > end:
            continue
        settings = config(sparsity_schedule=schedule, sparsity_start=start, sparsity_end=end, mask_updates=updates)
        plans = [plan_step(settings, step, total) for step in range(total)]
        where = (total, start, end, updates)
        assert plans[-1].sparsity == 0.8, where
        assert plans[-1].final_sparsity, where
        assert all(a.sparsity <= b.sparsity for a, b in itertools.pairwise(plans)), where
        for before, after in itertools.pairwise(plans):
            assert after.update_masks == (after.sparsity != before.sparsity), where
        assert sum(plan.update_masks for plan in plans) <= updates, where
        reached = min(s for s, plan in enumerate(plans) if plan.final_sparsity)
        assert reached == min(-(-round(end * total * 100) // 100), total - 1), where


@pytest.mark.parametrize(("end", "total"), [(0.55, 100), (0.07, 100), (0.29, 100), (0.57, 100), (0.6, 35)])
def test_rounding_errors_do_not_move_the_end(end: float, total: int) -> None:
    # 0.55 * 100 is 55.00000000000001 in floating point.
    assert mask_update_steps(config(sparsity_end=end), total)[-1] == round(end * total)


@pytest.mark.parametrize(("start", "total"), [(0.29, 100), (0.57, 100), (0.58, 100)])
def test_rounding_errors_do_not_move_the_start(start: float, total: int) -> None:
    # 0.29 * 100 is 28.999999999999996 in floating point.
    settings = config(sparsity_start=start, sparsity_end=1.0, mask_updates=1000)
    assert mask_update_steps(settings, total)[0] == round(start * total) + 1


def test_sparsity_0_never_chooses_masks() -> None:
    plans = [plan_step(config(sparsity=0.0), step, 20) for step in range(20)]
    assert not any(plan.update_masks for plan in plans)
    assert all(plan.final_sparsity and plan.sparsity == 0.0 for plan in plans)


def test_penalty_acts_until_the_last_mask_update_and_is_renewed_in_between() -> None:
    settings = config(penalty_weight=0.5, penalty_reweights=3, sparsity_end=0.6)
    plans = [plan_step(settings, step, 20) for step in range(20)]
    assert [plan.penalty_weight for plan in plans] == [0.5] * 12 + [0.0] * 8
    assert [step for step, plan in enumerate(plans) if plan.update_coefs] == [0, 4, 8]


def test_penalty_without_pruning_acts_to_the_end() -> None:
    plans = [plan_step(config(penalty_weight=0.5, sparsity=0.0), step, 20) for step in range(20)]
    assert all(plan.penalty_weight == 0.5 for plan in plans)
    assert [step for step, plan in enumerate(plans) if plan.update_coefs] == [0, 5, 10, 15]


def test_graft_probability_is_held_and_then_rises_to_1() -> None:
    settings = config(graft_start=0.4, graft_hold=0.25, graft_end=0.75)
    found = [plan_step(settings, step, 20).graft_prob for step in range(20)]
    assert found == pytest.approx([0.4] * 5 + [0.4 + 0.6 * k / 10 for k in range(10)] + [1.0] * 5)
    assert plan_step(settings, 15, 20).graft_prob == 1.0


@pytest.mark.parametrize(("edge", "expected"), [(0.0, [1.0] * 8), (0.5, [0.4] * 4 + [1.0] * 4), (1.0, [0.4] * 8)])
def test_graft_probability_without_a_ramp(edge: float, expected: list[float]) -> None:
    settings = config(graft_start=0.4, graft_hold=edge, graft_end=edge)
    assert [plan_step(settings, step, 8).graft_prob for step in range(8)] == expected


def test_no_grafting_by_default() -> None:
    assert all(plan_step(config(), step, 9).graft_prob == 1.0 for step in range(9))


def test_draws_depend_on_seed_and_step_alone() -> None:
    first = [graft_draws(0.5, 12, seed=3, step=step) for step in range(50)]
    assert [graft_draws(0.5, 12, seed=3, step=step) for step in reversed(range(50))] == first[::-1]
    assert [graft_draws(0.5, 12, seed=4, step=step) for step in range(50)] != first
    assert len({tuple(draw) for draw in first}) > 40


def test_draws_have_their_probability_and_never_touch_the_global_generator() -> None:
    import torch

    state = torch.get_rng_state()
    drawn = [own for step in range(500) for own in graft_draws(0.3, 12, seed=0, step=step)]
    assert torch.equal(state, torch.get_rng_state())
    assert sum(drawn) / len(drawn) == pytest.approx(0.3, abs=0.02)
    assert graft_draws(1.0, 5, 0, 0) == [True] * 5
    assert graft_draws(0.0, 5, 0, 0) == [False] * 5


@pytest.mark.parametrize(("step", "total"), [(-1, 5), (5, 5), (0, 0), (1.5, 5), (0, 5.0)])
def test_a_step_outside_the_run_is_refused(step: Any, total: Any) -> None:
    with pytest.raises(ValueError, match=rf"step={step} .*total_steps={total}"):
        plan_step(config(), step, total)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="sparsity_schedule='exponential' is not known: use one of .*cubic"):
        plan_step(config(sparsity_schedule="exponential"), 0, 5)

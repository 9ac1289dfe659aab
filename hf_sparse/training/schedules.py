"""What is due at a step: a pure function of (config, step, total steps), so that resuming needs no counters.

Step s (0-based) is the one that begins with `state.global_step == s`. Masks and coefficients that a plan calls for are
taken before that step's forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

SCHEDULES = ("cubic", "linear", "one_shot")


class ScheduleConfig(Protocol):
    """The fields of `SparseDistillConfig` that a schedule reads."""

    sparsity: float
    sparsity_schedule: str
    sparsity_start: float
    sparsity_end: float
    mask_updates: int
    penalty_weight: float
    penalty_reweights: int
    graft_start: float
    graft_hold: float
    graft_end: float


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one optimizer step does.

    Attributes:
        step: 0-based optimizer step.
        sparsity: fraction of blocks removed during this step, [0, 1).
        update_masks: whether masks are chosen anew before this step's forward.
        graft_prob: chance that a site runs the student, [0, 1]; 1 = no grafting.
        penalty_weight: weight of the group lasso during this step, >= 0; 0 once pruning has ended.
        update_coefs: whether the reweighting coefficients are taken anew before this step's forward.
        final_sparsity: whether the target sparsity holds from this step on.
    """

    step: int
    sparsity: float
    update_masks: bool
    graft_prob: float
    penalty_weight: float
    update_coefs: bool
    final_sparsity: bool


def plan_step(config: ScheduleConfig, step: int, total_steps: int) -> StepPlan:
    """Plan one optimizer step.

    Args:
        config: a `SparseDistillConfig`, or anything with its schedule fields.
        step: 0 <= step < total_steps.
        total_steps: optimizer steps of the whole run (`state.max_steps`), >= 1.

    Returns:
        The plan. Sparsity is exactly `config.sparsity` from the last mask update on.

    Raises:
        ValueError: if step or total_steps is out of range or no integer, or the schedule is not known.

    Source: cubic sparsity, Zhu and Gupta 2018, eq. 1; graft probability, Sparse Progressive Distillation, ACL 2022.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(
        ...     sparsity=0.8, sparsity_schedule="linear", sparsity_start=0.0, sparsity_end=0.5, mask_updates=2,
        ...     penalty_weight=0.0, penalty_reweights=0, graft_start=0.5, graft_hold=0.0, graft_end=1.0)
        >>> [plan_step(config, step, 8).sparsity for step in range(8)]
        [0.0, 0.0, 0.4, 0.4, 0.8, 0.8, 0.8, 0.8]
        >>> plan_step(config, 4, 8).graft_prob
        0.75
    """
    whole = isinstance(step, int) and isinstance(total_steps, int)
    if not whole or total_steps < 1 or not 0 <= step < total_steps:
        raise ValueError(
            f"step={step!r} is outside a run of total_steps={total_steps!r}: expected integers, 0 <= step < "
            f"total_steps."
        )
    if config.sparsity_schedule not in SCHEDULES:
        raise ValueError(f"sparsity_schedule={config.sparsity_schedule!r} is not known: use one of {list(SCHEDULES)}.")
    updates = mask_update_steps(config, total_steps)
    done = sum(1 for at in updates if at <= step) if config.sparsity else 0
    last_prune_step = updates[-1]
    penalised = config.penalty_weight > 0.0 and (step < last_prune_step or config.sparsity == 0.0)
    return StepPlan(
        step=step,
        sparsity=_sparsity_after(config, done, len(updates)),
        update_masks=bool(config.sparsity) and step in updates,
        graft_prob=_graft_prob(config, step, total_steps),
        penalty_weight=config.penalty_weight if penalised else 0.0,
        update_coefs=penalised and step in _coef_update_steps(config, total_steps),
        final_sparsity=done == len(updates) or not config.sparsity,
    )


def mask_update_steps(config: ScheduleConfig, total_steps: int) -> list[int]:
    """List the steps before which masks are chosen: ascending, distinct, the last one at `sparsity_end`.

    A run shorter than `mask_updates` has one update per step; the last update leaves at least one step to adapt to.
    """
    # Rounded first, because 0.55 * 100 is a little more than 55 in floating point.
    last = min(math.ceil(round(config.sparsity_end * total_steps, 6)), total_steps - 1)
    first = min(math.floor(round(config.sparsity_start * total_steps, 6)), last)
    if config.sparsity_schedule == "one_shot" or first == last:
        return [last]
    count = min(config.mask_updates, last - first)
    return [first + (last - first) * k // count for k in range(1, count + 1)]


def graft_draws(graft_prob: float, num_sites: int, seed: int, step: int) -> list[bool]:
    """Draw, for every site, whether it runs the student in this step.

    The draw depends on seed and step alone: all ranks, all micro-batches and a resumed run draw the same.

    Args:
        graft_prob: chance of the student, [0, 1].
        num_sites: sites of the model, in its own order.
        seed: seed of the run.
        step: optimizer step.

    Returns:
        One bool per site, True = student.

    Example:
        >>> graft_draws(1.0, 3, seed=0, step=7)
        [True, True, True]
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    return (torch.rand(num_sites, generator=generator) < graft_prob).tolist()


def _sparsity_after(config: ScheduleConfig, done: int, count: int) -> float:
    if done == count or done == 0:
        return config.sparsity if done else 0.0
    left = 1.0 - done / count
    return config.sparsity * (1.0 - (left**3 if config.sparsity_schedule == "cubic" else left))


def _graft_prob(config: ScheduleConfig, step: int, total_steps: int) -> float:
    hold, end = round(config.graft_hold * total_steps, 6), round(config.graft_end * total_steps, 6)
    if step >= end:
        return 1.0
    if step <= hold:  # also where there is no ramp, because hold and end are one
        return config.graft_start
    return config.graft_start + (1.0 - config.graft_start) * (step - hold) / (end - hold)


def _coef_update_steps(config: ScheduleConfig, total_steps: int) -> list[int]:
    window = total_steps if config.sparsity == 0.0 else mask_update_steps(config, total_steps)[-1]
    return [window * k // config.penalty_reweights for k in range(config.penalty_reweights)]

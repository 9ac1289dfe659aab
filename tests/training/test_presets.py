"""The constants of the presets, written down a second time, and settings for accidents of the released code."""

from __future__ import annotations

from typing import Any

import pytest

from hf_sparse import SparseDistillConfig, plan_step
from hf_sparse.training.presets import PRESETS

# "README", "default" and "code" are those of the code that the authors released.
SPD: dict[str, Any] = {
    "block_height": 1, "block_width": 1,  # code: the mask is chosen weight by weight
    "sparsity": 0.9,  # README: --sparsity 0.9
    "sparsity_schedule": "cubic", "sparsity_start": 0.0,  # code: Zhu and Gupta 2018 from the first step
    "sparsity_end": 0.5,  # README: --num_prune_epochs 30 of --num_train_epochs 60
    "mask_updates": 12,  # code: an update every twelfth of the pruning epochs, said to be 12
    "importance": "magnitude",  # code: absolute values, inside each matrix
    "penalty_weight": 0.0,  # code: there is none
    "task_weight": 0.0, "kd_weight": 1.0,  # code: the labels' loss is computed and not added
    "kd_temperature": 1.0,  # default of --temperature
    "hidden_weight": 1.0, "hidden_form": "mse", "attention_weight": 1.0,  # code: a plain sum of mean squared errors
    "graft_start": 0.3,  # code: the steps that it reports on MRPC, 3439 and 4606, are 0.7 / 0.0006 apart
    "graft_hold": 0.5,  # README: pruning comes first, then the progressive stage
    "graft_end": 2 / 3,  # the same two steps: 10 epochs after the 30
    "lr_restart": 0.5,  # code: a second schedule once the pruning epochs are over
    "train_only_layers": True,  # code: the optimizer gets the student's layers alone
}  # fmt: skip
BLOCK_STRUCTURED: dict[str, Any] = {
    "block_height": 1, "block_width": 96,  # default of --block_row_division, 8, on BERT-base's 768 columns
    "sparsity": 0.5,  # profile prune_ratios_50, one of five for BERT
    "sparsity_schedule": "one_shot",  # code: one hard prune
    "sparsity_end": 0.5,  # scripts: 2 to 4 epochs with the penalty, 2 to 4 after the cut
    "importance": "magnitude",  # code: norms of groups, inside each matrix
    "penalty_weight": 1e-4, "penalty_form": "loss",  # profile penalty_bert-4; code: added to the loss
    "penalty_reweights": 5,  # code: at the start and at epochs 4, 8, 12 and 16
    "penalty_epsilon": 1e-3,  # code: eps
    "task_weight": 1.0, "kd_weight": 0.0, "hidden_weight": 0.0, "attention_weight": 0.0,  # code: no teacher
    "graft_start": 1.0,
    "lr_restart": 0.5, "reset_optimizer": True,  # scripts: the retraining is a run of its own
}  # fmt: skip


def config(**given: Any) -> SparseDistillConfig:
    return SparseDistillConfig(output_dir="unused", use_cpu=True, report_to="none", **given)


@pytest.mark.parametrize(("preset", "expected"), [("spd", SPD), ("block_structured", BLOCK_STRUCTURED)])
def test_constants_are_those_of_the_papers(preset: str, expected: dict[str, Any]) -> None:
    assert PRESETS[preset] == expected
    found = config(preset=preset)
    assert {name: getattr(found, name) for name in expected} == expected
    # Not set by the presets: AdamW without weight decay or warm-up, clipping at 1.0, linear decay.
    assert (found.weight_decay, found.warmup_steps, found.max_grad_norm) == (0.0, 0, 1.0)
    assert (found.lr_scheduler_type, found.budget_scope) == ("linear", "layer")


def test_settings_for_a_graft_probability_without_a_slope() -> None:
    # The example command: --replacing_rate 0.8 --scheduler_type linear, with the default slope of 0.
    settings = config(preset="spd", graft_start=0.8, graft_hold=1.0, graft_end=1.0)
    assert {plan_step(settings, step, 60).graft_prob for step in range(60)} == {0.8}


def test_settings_for_eleven_mask_updates() -> None:
    # On MRPC, 60 epochs of 114 steps: every 286 steps while pruning, until step 3146.
    settings = config(preset="spd", mask_updates=11, sparsity_end=0.46)
    plans = [plan for plan in (plan_step(settings, step, 6840) for step in range(6840)) if plan.update_masks]
    assert [plan.step for plan in plans] == pytest.approx([286 * k for k in range(1, 12)], abs=1)
    assert [round(plan.sparsity, 3) for plan in plans] == [
        0.224, 0.407, 0.554, 0.668, 0.754, 0.815, 0.857, 0.882, 0.895, 0.899, 0.9,
    ]  # fmt: skip


def test_settings_for_coefficients_that_are_never_renewed() -> None:
    settings = config(preset="block_structured", penalty_reweights=1)
    assert [step for step in range(40) if plan_step(settings, step, 40).update_coefs] == [0]

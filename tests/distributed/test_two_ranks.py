"""Two ranks that train together over gloo, compared with one rank that trains alone. One launch for all tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import two_ranks
from tests.distributed.launching import launch, launched_once
from tests.training.scenarios import TASKS, everything_on, model_for, wider_teacher
from tests.training.test_speech import ctc
from tests.training.test_trainer_options import mean_loss
from tests.training.tiny import assert_same, bert, gradients_of, make_trainer, pad, rows, weights_of

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder of the one launch, and what each rank saw."""
    folder, seen = launched_once("two_ranks.py", 2, tmp_path_factory, start=launch)
    return folder, seen[0], seen[1]


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor], where: str) -> None:
    assert list(first) == list(second), f"{where}: not the same parameters have gradients"
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{where} {n}: {m}"
        )


def test_two_ranks_really_trained_together(ranks: Any) -> None:
    for rank, seen in enumerate(ranks[1:]):
        assert seen["setting"] == {
            "world_size": 2, "backend": "gloo", "wrapper": "DistributedDataParallel", "rank": rank,
        }  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_two_ranks_give_the_gradients_of_one(ranks: Any, tmp_path: Path, task: str) -> None:
    alone = everything_on(task, tmp_path, 8, 1, logging_strategy="steps", logging_steps=1)
    whole = gradients_of(alone)
    logs = [entry for entry in alone.state.log_history if "loss" in entry]
    splits = [key for key in ranks[1]["invariance"] if key.startswith(f"{task} ")]
    assert len(splits) == (2 if task in ("classes", "lm") else 1)
    for split in splits:
        for seen in ranks[1:]:
            found = seen["invariance"][split]
            for step, (first, second) in enumerate(zip(whole, found["gradients"], strict=True)):
                assert_close(first, second, f"{split}, step {step}")
            for mine, theirs in zip(logs, found["logs"], strict=True):
                assert mine == pytest.approx(theirs, rel=2e-4)
            assert_same(alone.pruner.masks.state_dict(), found["masks"])
            assert_close(weights_of(alone.model), found["weights"], f"{split}, final weights")


def test_masks_and_coefficients_are_those_of_rank_0(ranks: Any) -> None:
    first, second = (seen["masks_agree"] for seen in ranks[1:])
    name = "bert.encoder.layer.0.output.dense"
    assert not torch.equal(first["alone"][0][name], second["alone"][0][name]), "left alone they would have differed"
    for step in range(5):
        assert_same(first["agreed"][step], second["agreed"][step])
        assert_same(first["coefs"][step], second["coefs"][step])
    assert_same(first["alone"][-1], first["agreed"][-1])
    assert_same(first["weights"], second["weights"])


@pytest.mark.parametrize("stop", [1, 3, 5, 6])
def test_two_ranks_resume_bit_for_bit(ranks: Any, stop: int) -> None:
    for seen in ranks[1:]:
        assert_same(seen["resume"]["straight"], seen["resume"]["resumed"][stop])
    assert_same(ranks[1]["resume"]["straight"], ranks[2]["resume"]["straight"])


def test_one_rank_goes_on_with_a_checkpoint_of_two(ranks: Any, tmp_path: Path) -> None:
    checkpoint = ranks[0] / "other_world_size" / "checkpoint-3"
    run = {**two_ranks.RESUMED, "per_device_train_batch_size": 4}
    trainer = make_trainer(bert(), tmp_path, rows("classes", 24), **run)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    for seen in ranks[1:]:
        found = seen["other_world_size"]
        assert_same(trainer.pruner.masks.state_dict(), found["masks"])
        for name, weight in weights_of(trainer.model).items():
            # Adam divides by the size of gradients: where those are all but zero, rounding moves weights.
            torch.testing.assert_close(found["weights"][name], weight, rtol=2e-3, atol=2e-4)


def test_samples_that_neither_ranks_nor_steps_divide(ranks: Any) -> None:
    first, second = (seen["uneven"] for seen in ranks[1:])
    assert first["steps"] == second["steps"] == 6
    assert first["zero"] and second["zero"]
    assert_same(first["weights"], second["weights"])


def test_a_checkpoint_of_two_ranks_is_ordinary(ranks: Any) -> None:
    checkpoint = ranks[0] / "resume" / "straight" / "checkpoint-3"
    loaded = type(bert()).from_pretrained(checkpoint)
    assert set(loaded.state_dict()) == set(bert().state_dict())
    assert (checkpoint / "sparsity_state.safetensors").is_file()
    assert not list(checkpoint.glob(".sparsity_state*"))


def test_evaluation_and_the_final_save_of_two_ranks(ranks: Any) -> None:
    folder, first, second = ranks
    mine, theirs = first["evaluation"], second["evaluation"]
    assert mine["best"] == theirs["best"]
    assert int(mine["best"].rsplit("-", 1)[1]) >= 3, "the target is reached in the third step"
    assert_same(mine["weights"], theirs["weights"])
    assert_same(mine["masks"], theirs["masks"])
    loaded = type(bert()).from_pretrained(folder / "evaluation" / "final").eval()
    inputs = pad(rows("classes", 16))
    with torch.no_grad():
        loss = loaded(**inputs).loss.item()
        teacher_loss = bert()(**inputs).loss.item()
    for seen in (mine, theirs):
        assert seen["eval_loss"] == pytest.approx(loss, rel=1e-4)
        assert seen["teacher_loss"] == pytest.approx(teacher_loss, rel=1e-4)
    assert not list((folder / "evaluation" / "final").glob(".saving-*"))


def test_loss_functions_of_the_user_give_the_gradient_of_the_whole_step(ranks: Any) -> None:
    inputs, plain = pad(rows("tagging", 8)), model_for("tagging", 0)
    mean_loss(plain(**inputs), inputs["labels"]).backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    for seen in ranks[1:]:
        assert_close(expected, seen["loss_functions"]["mean_loss"], "mean")
        assert_close(expected, seen["loss_functions"]["sum_loss"], "sum")


def test_activation_checkpointing_and_grafting_go_together(ranks: Any, tmp_path: Path) -> None:
    whole = gradients_of(everything_on("classes", tmp_path, 8, 1))
    for seen in ranks[1:]:
        for first, second in zip(whole, seen["checkpointing"]["gradients"], strict=True):
            assert_close(first, second, "checkpointing")


def test_a_wider_teacher_gives_the_student_and_the_projections_of_one_rank(ranks: Any, tmp_path: Path) -> None:
    alone = wider_teacher(tmp_path, 8)
    for seen in ranks[1:]:
        assert_close(alone["student"], seen["wide"]["student"], "student")
        assert_close(alone["maps"], seen["wide"]["maps"], "projections")
    assert_same(ranks[1]["wide"]["maps"], ranks[2]["wide"]["maps"])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_two_ranks_give_the_gradients_of_ctc_of_one(ranks: Any, tmp_path: Path, reduction: str) -> None:
    whole = gradients_of(ctc(reduction, tmp_path, 8, 1))
    for seen in ranks[1:]:
        for step, (first, second) in enumerate(zip(whole, seen["speech"][reduction], strict=True)):
            assert_close(first, second, f"{reduction}, step {step}")


def test_every_rank_says_that_a_run_ended_off_target(ranks: Any) -> None:
    for seen in ranks[1:]:
        assert "ended off target" in seen["off_target"]["error"]


def test_one_changed_bit_on_one_rank_ends_the_run_and_names_the_layer(ranks: Any) -> None:
    # The masks are chosen before steps 2 and 4 of 6.
    moments = {
        "between": ("before the mask update of step 4", 4),
        "in": ("after the mask update of step 2", 2),
        "after": ("at the end of training", 6),
    }
    for seen in ranks[1:]:
        for moment, (when, steps) in moments.items():
            error, done = seen["tampering"][moment]
            assert f"bert.encoder.layer.1.attention.self.key are not the same on all 2 ranks {when}" in error
            assert done == steps
        assert seen["tampering"]["never"] == ("", 6)

"""Contract 6: evaluation is the student alone under the plain task loss, and "best" means best at the target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.training.scenarios import model_for
from tests.training.tiny import Watch, bert, llama, make_trainer, pad, pruned_zero, rows, t5, weights_of

ALL_LOSSES = {"kd_weight": 2.0, "hidden_weight": 3.0, "attention_weight": 4.0, "task_weight": 0.25,
              "penalty_weight": 1.0, "graft_start": 0.0, "graft_end": 1.0}  # fmt: skip


def plain_loss(model: Any, data: list[dict[str, Any]], batch: int) -> float:
    """The mean over batches, weighted by samples, as plain evaluation computes it."""
    model.eval()
    with torch.no_grad():
        losses = [
            (model(**inputs).loss.item(), len(inputs["input_ids"]))
            for inputs in DataLoader(data, batch, collate_fn=pad)
        ]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


@pytest.mark.parametrize("task", ["classes", "regression", "tagging", "lm", "seq2seq"])
def test_evaluation_is_the_plain_task_loss_of_the_student(tmp_path: Path, task: str) -> None:
    model = t5() if task == "seq2seq" else model_for(task, 0)
    data = rows(task, 12)
    trainer = make_trainer(model, tmp_path, data, **ALL_LOSSES, sparsity=0.0, extra={"eval_dataset": data},
                           per_device_eval_batch_size=5, max_steps=1, eval_strategy="steps", eval_steps=1)  # fmt: skip
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(plain_loss(model, data, 5), rel=1e-6)
    trainer.train()
    # Inside training every layer is grafted (graft_prob 0); its evaluation must not be.
    during = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    expected = plain_loss(model, data, 5)
    assert during["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    prediction = trainer.predict(data)
    assert prediction.metrics["test_loss"] == pytest.approx(expected, rel=1e-6)


def test_evaluation_metrics_hold_no_terms_of_training(tmp_path: Path) -> None:
    data = rows("classes", 8)
    trainer = make_trainer(
        bert(), tmp_path, data, **ALL_LOSSES, extra={"eval_dataset": data}, max_steps=1, sparsity=0.5
    )
    trainer.train()
    assert set(trainer.evaluate()) == {
        "eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch",
    }  # fmt: skip


def test_metrics_of_the_user_see_the_students_logits(tmp_path: Path) -> None:
    data, model = rows("classes", 8), bert()
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    extra = {"eval_dataset": data, "compute_metrics": metrics}
    trainer = make_trainer(model, tmp_path, data, **ALL_LOSSES, extra=extra, max_steps=1, sparsity=0.5)
    trainer.train()
    trainer.evaluate()
    with torch.no_grad():
        logits = model.eval()(**pad(data)).logits
    torch.testing.assert_close(torch.tensor(seen[0].predictions), logits)


class Rigged:
    """`compute_metrics` that gives made-up scores in order, one per evaluation."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = iter(scores)

    def __call__(self, prediction: Any) -> dict[str, float]:
        return {"score": next(self.scores)}


# Target sparsity holds from step 3 of 6 on, so from the evaluation after it: the fourth.
@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([9.0, 8.0, 7.0, 3.0, 5.0, 4.0], 5),
        ([9.0, 8.0, 7.0, 5.0, 3.0, 4.0], 4),
        ([1.0, 1.0, 9.0, 0.1, 0.1, 0.2], 6),
    ],
)
@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_best_checkpoint_is_one_at_the_target(tmp_path: Path, scores: list[float], best: int, strategy: str) -> None:
    data = rows("classes", 16)
    trainer = make_trainer(
        bert(), tmp_path, data, sparsity=0.5, sparsity_end=0.5, max_steps=6, kd_weight=0.0, eval_strategy="steps",
        eval_steps=1, save_strategy=strategy, **({"save_steps": 1} if strategy == "steps" else {}),
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
        extra={"eval_dataset": data, "compute_metrics": Rigged(scores)},
    )  # fmt: skip
    at: dict[int, dict[str, torch.Tensor]] = {}
    trainer.add_callback(Watch(on_step_end=lambda state: at.update({state.global_step: weights_of(trainer.model)})))
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert all(torch.equal(weight, at[best][name]) for name, weight in weights_of(trainer.model).items())
    assert pruned_zero(trainer)
    assert trainer.pruner.masks.off_target(0.5) is None
    if strategy == "best":
        assert not any((tmp_path / f"checkpoint-{step}").exists() for step in (1, 2, 3))


def test_the_only_checkpoint_at_the_target_is_best_however_bad(tmp_path: Path) -> None:
    data = rows("classes", 16)
    trainer = make_trainer(
        bert(), tmp_path, data, sparsity=0.5, sparsity_end=1.0, max_steps=5, kd_weight=0.0, eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="score",
        greater_is_better=True, extra={"eval_dataset": data, "compute_metrics": Rigged([9.0, 8.0, 0.1])},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-5")
    assert pruned_zero(trainer)


def test_the_best_model_brings_its_own_masks(tmp_path: Path) -> None:
    data = rows("classes", 16)
    trainer = make_trainer(
        bert(), tmp_path, data, sparsity=0.5, sparsity_end=0.5, max_steps=6, kd_weight=0.0, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="score",
        greater_is_better=True, extra={"eval_dataset": data, "compute_metrics": Rigged([0, 0, 0, 5, 1, 1])},
    )  # fmt: skip
    trainer.train()
    trainer.save_model(tmp_path / "final")
    loaded = type(trainer.model).from_pretrained(tmp_path / "final").eval()
    inputs = pad(data)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(**inputs).logits, trainer.model.eval()(**inputs).logits, rtol=1e-5, atol=1e-6
        )


def test_sparsity_0_considers_every_checkpoint(tmp_path: Path) -> None:
    data = rows("classes", 16)
    trainer = make_trainer(
        bert(), tmp_path, data, sparsity=0.0, max_steps=3, kd_weight=0.0, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="score",
        greater_is_better=True, extra={"eval_dataset": data, "compute_metrics": Rigged([9.0, 8.0, 7.0])},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")


def test_the_teacher_is_evaluated_as_the_student_is(tmp_path: Path) -> None:
    data, teacher = rows("classes", 8), bert(seed=5)
    student = bert()
    trainer = make_trainer(student, tmp_path, data, teacher, extra={"eval_dataset": data}, max_steps=1, sparsity=0.5)
    metrics = trainer.evaluate_teacher()
    assert metrics["teacher_loss"] == pytest.approx(plain_loss(teacher, data, 8), rel=1e-6)
    assert trainer.model is student
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain_loss(student, data, 8), rel=1e-6)
    assert trainer.evaluate_teacher()["teacher_loss"] == pytest.approx(metrics["teacher_loss"])


def test_without_a_teacher_there_is_none_to_evaluate(tmp_path: Path) -> None:
    trainer = make_trainer(llama(), tmp_path, rows("lm", 8), kd_weight=0.0)
    with pytest.raises(ValueError, match="no teacher to evaluate: neither kd_weight"):
        trainer.evaluate_teacher(rows("lm", 8))

"""What is distilled of models without logits: their embeddings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_sparse.training.distillation.distill import embedding_loss
from hf_sparse.training.distillation.predictions import pooled, prediction_loss, prediction_unit

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1]])


def relative(student: list[float], teacher: list[float]) -> float:
    return sum((s - t) ** 2 for s, t in zip(student, teacher, strict=True)) / sum(t * t for t in teacher)


def loss_of(student: Any, teacher: Any, pooling: str = "mean") -> float:
    inputs = {"attention_mask": MASK}
    assert prediction_unit(student, inputs) == "samples"
    return prediction_loss(student, teacher, inputs, None, 2.0, shifted=False, pooling=pooling).item()


@pytest.mark.parametrize(("pooling", "picked"), [
    ("mean", [[0, 1, 2], [0], [2, 3]]), ("cls", [[0], [0], [0]]), ("last", [[2], [0], [3]]),
])  # fmt: skip
def test_hidden_states_are_pooled_over_real_tokens(pooling: str, picked: list[list[int]]) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    expected = []
    for sample, tokens in enumerate(picked):
        mine, theirs = (states[sample][tokens].mean(0).tolist() for states in (student, teacher))
        expected.append(relative(mine, theirs))
    found = loss_of(SimpleNamespace(last_hidden_state=student), SimpleNamespace(last_hidden_state=teacher), pooling)
    assert found == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_an_embedding_by_name_comes_before_hidden_states() -> None:
    torch.manual_seed(0)
    mine, theirs = torch.randn(3, 5), torch.randn(3, 5)
    states = {"last_hidden_state": torch.randn(3, 4, 5)}
    expected = sum(relative(s, t) for s, t in zip(mine.tolist(), theirs.tolist(), strict=True)) / 3
    found = loss_of({"sentence_embedding": mine, **states}, {"sentence_embedding": theirs, **states})
    assert found == pytest.approx(expected, rel=1e-5)


def test_image_and_text_count_half_each() -> None:
    torch.manual_seed(0)
    students, teachers = ({n: torch.randn(3, 5) for n in ("image_embeds", "text_embeds")} for _ in range(2))
    one_by_one = [embedding_loss(students[name], teachers[name]).item() for name in students]
    assert loss_of(students, teachers) == pytest.approx(sum(one_by_one) / 2, rel=1e-6)


def test_without_a_mask_of_that_shape_every_state_is_real() -> None:
    # Patches of an image, frames of speech behind convolutions.
    hidden = torch.randn(3, 7, 5)
    torch.testing.assert_close(pooled(hidden, MASK, "mean"), hidden.mean(1))
    torch.testing.assert_close(pooled(hidden, None, "last"), hidden[:, -1])


def test_the_gradient_goes_to_the_student_alone() -> None:
    student, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    embedding_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None and student.grad.abs().sum() > 0
    assert embedding_loss(torch.ones(1, 2), torch.zeros(1, 2)).isfinite()


@pytest.mark.parametrize(("student", "teacher", "message"), [
    ({"sentence_embedding": torch.ones(3, 5)}, {"sentence_embedding": torch.ones(3, 6)},
     r"embeddings have shape \[3, 5\], the teacher's \[3, 6\]"),
    ({"sentence_embedding": torch.ones(3, 5)}, {"last_hidden_state": torch.ones(3, 4, 5)},
     "compares sentence_embedding, which the model returns and the teacher does not"),
    ({"logits": torch.ones(3, 5)}, {"last_hidden_state": torch.ones(3, 4, 5)}, "compares logits, which the model"),
])  # fmt: skip
def test_a_teacher_that_gives_something_else_is_refused(student: Any, teacher: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_of(student, teacher)

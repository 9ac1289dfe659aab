"""Contract 8: what is distilled follows the task. Values are compared with formulas written out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sparse import distillation_loss, graft
from hf_sparse.training.distillation.distill import attention_loss, hidden_loss
from hf_sparse.training.distillation.predictions import prediction_loss, prediction_unit
from hf_sparse.training.schedules import graft_draws
from tests.training.scenarios import model_for
from tests.training.tiny import bert, llama, make_trainer, pad, pad_to_10, rows, t5

T = 3.0


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def kl(student: list[float], teacher: list[float], temperature: float = T) -> float:
    """temperature^2 * KL(teacher || student) of two rows of logits."""
    p, q = softmax([t / temperature for t in teacher]), softmax([s / temperature for s in student])
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_classes_are_the_softened_kl() -> None:
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    expected = mean([kl(s, t) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)])
    assert distillation_loss(student, teacher, T).item() == pytest.approx(expected, rel=1e-5)


def test_several_labels_are_one_binary_kl_each() -> None:
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    # A binary distribution is a softmax over [logit, 0].
    expected = mean([kl([s, 0.0], [t, 0.0]) for s, t in pairs])
    assert distillation_loss(student, teacher, T, kind="multi_label").item() == pytest.approx(expected, rel=1e-5)


def test_regression_is_the_squared_distance_to_the_teachers_score() -> None:
    student, teacher = torch.randn(5, 1), torch.randn(5, 1)
    expected = mean(
        [(s - t) ** 2 for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)]
    )
    assert distillation_loss(student, teacher, T, kind="regression").item() == pytest.approx(expected, rel=1e-6)


def test_masked_positions_do_not_count_even_where_they_are_infinite() -> None:
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    kept = [kl(s, t) for s, t in zip(student[mask].tolist(), teacher[mask].tolist(), strict=True)]
    student[0, 1] = float("inf")
    assert distillation_loss(student, teacher, T, mask=mask).item() == pytest.approx(mean(kept), rel=1e-5)
    assert distillation_loss(student, teacher, T, mask=torch.zeros(2, 3, dtype=torch.bool)).item() == 0.0


@pytest.mark.parametrize("kind", ["classes", "multi_label", "regression"])
def test_the_gradient_goes_to_the_student_alone_and_ends_at_the_teacher(kind: str) -> None:
    student, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    distillation_loss(student, teacher, T, kind=kind).backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    same = teacher.detach().clone().requires_grad_()
    loss = distillation_loss(same, teacher, T, kind=kind)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(same.grad, torch.zeros(5, 4), atol=1e-6, rtol=0)


def test_half_precision_logits_are_compared_in_float32() -> None:
    student, teacher = torch.randn(5, 4).bfloat16(), torch.randn(5, 4).bfloat16()
    loss = distillation_loss(student, teacher, T)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(distillation_loss(student.float(), teacher.float(), T).item(), rel=1e-6)


ONES = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: distillation_loss(torch.ones(1, 2), torch.ones(1, 2), kind="ranking"), "kind='ranking' is not known"),
        (lambda: distillation_loss(torch.ones(1, 2), torch.ones(1, 3)), r"\[1, 2\].*\[1, 3\].*kd_weight=0"),
        (lambda: distillation_loss(ONES, ONES, 0.0), "temperature=0.0 must be above 0"),
        (lambda: distillation_loss(ONES, ONES, float("nan")), "temperature=nan must be above 0"),
        (lambda: distillation_loss(ONES.long(), ONES.long()), r"floating point, .* not torch.int64 and torch.int64"),
        (lambda: distillation_loss(ONES.sum(), ONES.sum()), r"logits must be floating point, .* of shape \[\]"),
        (lambda: distillation_loss(ONES, ONES, mask=ONES[:, :1] > 0), r"mask has shape \[4, 1\].* \[4\]\."),
        (lambda: distillation_loss(ONES, ONES, mask=torch.ones(3) > 0), r"mask has shape \[3\], the logits \[4, 3\]"),
        (lambda: distillation_loss(ONES, ONES, per_sample=True), r"per_sample=True .* not .* for kind='classes'"),
        (
            lambda: distillation_loss(ONES[None], ONES[None], kind="regression", per_sample=True),
            r"per_sample=True weighs .* for kind='regression': leave it out",
        ),
        (lambda: hidden_loss([torch.ones(1, 2, 3)], []), "student gives 1 hidden states, the teacher 0"),
        (lambda: hidden_loss([torch.ones(1, 2, 3)], [torch.ones(1, 2, 4)]), r"hidden states 0: .* 3\].* 4\]"),
        (lambda: attention_loss([torch.ones(1, 2, 3, 3)], []), "student gives 1 attention maps"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_by_name(act: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()


def test_hidden_states_count_every_sample_once_and_padding_never() -> None:
    student, teacher = ([torch.randn(2, 3, 4) for _ in range(2)] for _ in range(2))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        tokens = [[(s[b, i] - t[b, i]).square().mean().item() for i in range(int(mask[b].sum()))] for b in range(2)]
        expected += mean([mean(tokens[0]), mean(tokens[1])])
    assert hidden_loss(student, teacher, mask, form="mse").item() == pytest.approx(expected, rel=1e-5)
    student[0][1, 2] += 1000.0
    assert hidden_loss(student, teacher, mask, form="mse").item() == pytest.approx(expected, rel=1e-5)
    assert hidden_loss(student, teacher, form="mse").item() > 1000


def test_relative_hidden_states_do_not_depend_on_their_size_nor_on_padding() -> None:
    student, teacher = ([torch.randn(2, 3, 4) for _ in range(2)] for _ in range(2))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        real = [(s[b, : mask[b].sum()].tolist(), t[b, : mask[b].sum()].tolist()) for b in range(2)]
        shares = []
        for mine, theirs in real:
            pairs = [(x, y) for a, b in zip(mine, theirs, strict=True) for x, y in zip(a, b, strict=True)]
            shares.append(sum((x - y) ** 2 for x, y in pairs) / sum(y**2 for _, y in pairs))
        expected += mean(shares)
    found = hidden_loss(student, teacher, mask, form="relative")
    assert found.item() == pytest.approx(expected, rel=1e-5)
    larger = [[1e3 * states for states in side] for side in (student, teacher)]
    assert hidden_loss(*larger, mask, form="relative").item() == pytest.approx(expected, rel=1e-5)
    student[0][1, 2] += 1000.0
    assert hidden_loss(student, teacher, mask, form="relative").item() == pytest.approx(expected, rel=1e-5)
    # Nothing to be relative to: large, but a number, and so is its gradient.
    nothing = [torch.zeros_like(states) for states in teacher]
    assert hidden_loss(nothing, nothing, mask).item() == 0.0
    weights = torch.full((2, 3, 4), 1e-12, requires_grad=True)
    found = hidden_loss([weights], nothing[:1], mask)
    found.backward()
    assert found.item() == pytest.approx(1000.0) and torch.isfinite(weights.grad).all()
    with pytest.raises(ValueError, match=r"form='cosine' is not known: use one of \['relative', 'mse'\]"):
        hidden_loss(student, teacher, form="cosine")


@pytest.mark.parametrize("form", ["relative", "mse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_hidden_states_of_every_dtype_are_compared_in_float32(dtype: torch.dtype, form: str) -> None:
    # Squares beyond the range of float16, and sums beyond the digits of bfloat16.
    student, teacher = ((3e3 * torch.randn(2, 5, 64)).to(dtype) for _ in range(2))
    student.requires_grad_()
    mine, theirs = student.detach().double(), teacher.double()
    expected = (mine - theirs).square().mean((1, 2))
    if form == "relative":
        expected = expected / theirs.square().mean((1, 2))
    found = hidden_loss([student], [teacher], form=form)
    found.backward()
    assert found.dtype == torch.float32 and student.grad is not None and student.grad.dtype == dtype
    assert found.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert bool(torch.isfinite(student.grad).all()) and bool(student.grad.any())


def test_attention_maps_count_pairs_of_real_tokens() -> None:
    student, teacher = [torch.rand(2, 2, 3, 3)], [torch.rand(2, 2, 3, 3)]
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    samples = []
    for b in range(2):
        real = [i for i in range(3) if mask[b, i]]
        pairs = [
            (student[0][b, h, i, j] - teacher[0][b, h, i, j]).item() ** 2 for h in range(2) for i in real for j in real
        ]
        samples.append(mean(pairs))
    assert attention_loss(student, teacher, mask).item() == pytest.approx(mean(samples), rel=1e-5)


def test_choices_of_a_question_are_padded_one_by_one() -> None:
    # Multiple choice: the mask is [questions, choices, tokens], a layer returns [questions * choices, tokens, ...].
    mask = torch.tensor([[[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [1, 1, 1]]])
    student, teacher = [torch.randn(4, 3, 5)], [torch.randn(4, 3, 5)]
    flat = mask.flatten(0, 1)
    assert hidden_loss(student, teacher, mask).item() == pytest.approx(hidden_loss(student, teacher, flat).item())
    student, teacher = [torch.rand(4, 2, 3, 3)], [torch.rand(4, 2, 3, 3)]
    assert attention_loss(student, teacher, mask).item() == pytest.approx(
        attention_loss(student, teacher, flat).item()
    )


def kd_of(task: str) -> tuple[float, dict[str, Any]]:
    """The distillation loss of one batch by hand, from the logits of two plain models."""
    student, teacher = (t5(seed) if task == "seq2seq" else model_for(task, seed) for seed in (0, 5))
    inputs = (pad_to_10 if task == "qa" else pad)(rows(task, 8))
    with torch.no_grad():
        mine, theirs = student.eval()(**inputs), teacher.eval()(**inputs)
    return _kd_by_hand(task, mine, theirs, inputs), inputs


def _kd_by_hand(task: str, mine: Any, theirs: Any, inputs: dict[str, Tensor]) -> float:
    if task == "qa":
        values = []
        for side in ("start_logits", "end_logits"):
            for b, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
                values.append(kl(mine[side][b, :length].tolist(), theirs[side][b, :length].tolist()))
        return mean(values)
    s, t = mine.logits, theirs.logits
    if task == "classes":
        return mean([kl(a, b) for a, b in zip(s.tolist(), t.tolist(), strict=True)])
    if task == "multi_label":
        pairs = zip(s.flatten().tolist(), t.flatten().tolist(), strict=True)
        return mean([kl([a, 0.0], [b, 0.0]) for a, b in pairs])
    if task == "regression":
        return mean([(a - b) ** 2 for a, b in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True)])
    values, labels = [], inputs["labels"]
    for b in range(len(labels)):
        for i in range(labels.shape[1]):
            # A causal model's position i predicts token i + 1, the others their own.
            at = i - 1 if task in ("lm", "gpt2") else i
            if labels[b, i] != -100 and at >= 0:
                values.append(kl(s[b, at].tolist(), t[b, at].tolist()))
    return mean(values)


@pytest.mark.parametrize(
    "task", ["classes", "multi_label", "regression", "tagging", "qa", "mlm", "lm", "gpt2", "seq2seq"]
)
def test_each_task_is_distilled_in_its_own_way_and_logged(tmp_path: Path, task: str) -> None:
    expected, _ = kd_of(task)
    student, teacher = (t5(seed) if task == "seq2seq" else model_for(task, seed) for seed in (0, 5))
    with torch.no_grad():
        task_loss = student(**(pad_to_10 if task == "qa" else pad)(rows(task, 8))).loss.item()
    trainer = make_trainer(
        student, tmp_path, rows(task, 8), teacher, sparsity=0.0, task_weight=0.5, kd_weight=2.0, kd_temperature=T,
        hidden_weight=0.0, max_steps=1, logging_strategy="steps", logging_steps=1,
        extra={"data_collator": pad_to_10 if task == "qa" else pad},
    )  # fmt: skip
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss_kd"] == pytest.approx(expected, rel=1e-4)
    assert logged["loss_task"] == pytest.approx(task_loss, rel=1e-5)
    assert logged["loss"] == pytest.approx(0.5 * task_loss + 2.0 * expected, rel=1e-4)


def test_without_labels_real_tokens_count() -> None:
    student, teacher = (SimpleNamespace(logits=torch.randn(2, 3, 4)) for _ in range(2))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    kept = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    expected = mean([kl(student.logits[b, i].tolist(), teacher.logits[b, i].tolist()) for b, i in kept])
    found = prediction_loss(student, teacher, {"attention_mask": mask}, None, T, shifted=False)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    # Shifted: the last position predicts nothing, and the one before padding predicts padding.
    kept = [(0, 0), (0, 1), (1, 0)]
    expected = mean([kl(student.logits[b, i].tolist(), teacher.logits[b, i].tolist()) for b, i in kept])
    found = prediction_loss(student, teacher, {"attention_mask": mask}, None, T, shifted=True)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "output",
    [SimpleNamespace(last_hidden_state=torch.ones(2, 3, 4, 4)), SimpleNamespace(logits=torch.ones(2, 3, 4, 4))],
)
def test_outputs_that_cannot_be_distilled_are_refused(output: Any) -> None:
    with pytest.raises(ValueError, match="kd_weight needs logits .* set kd_weight=0"):
        prediction_loss(output, output, {"labels": torch.ones(2)}, None, T, shifted=False)


def layer_by_layer(model: Any, inputs: dict[str, Tensor], layers: list[Any]) -> list[Tensor]:
    """The hidden states of a BERT whose layers are given, by calling its parts in order."""
    mask = torch.finfo(torch.float32).min * (1.0 - inputs["attention_mask"][:, None, None, :].float())
    hidden = [model.bert.embeddings(inputs["input_ids"])]
    for layer in layers:
        out = layer(hidden[-1], mask)
        hidden.append(out[0] if isinstance(out, tuple) else out)
    return hidden


@pytest.mark.parametrize(("seed", "used_before"), [(1, False), (2, False), (3, False), (1, True)])
def test_hidden_states_of_grafted_layers_are_those_that_ran(tmp_path: Path, seed: int, used_before: bool) -> None:
    data, inputs = rows("classes", 8), pad(rows("classes", 8))
    student, teacher = bert(0, num_hidden_layers=3), bert(5, num_hidden_layers=3)
    if used_before:
        for model in (student, teacher):
            model(**inputs, output_hidden_states=True)
    draws = graft_draws(0.5, 3, seed, 0)
    mixed = [(student if own else teacher).bert.encoder.layer[i] for i, own in enumerate(draws)]
    with torch.no_grad():
        mine = layer_by_layer(student.eval(), inputs, mixed)
        theirs = layer_by_layer(teacher.eval(), inputs, list(teacher.bert.encoder.layer))
    expected = hidden_loss(mine, theirs, inputs["attention_mask"]).item()
    trainer = make_trainer(
        student, tmp_path, data, teacher, sparsity=0.0, hidden_weight=1.0, graft_start=0.5, graft_end=1.0, seed=seed,
        max_steps=1, logging_strategy="steps", logging_steps=1,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss_hidden"] == pytest.approx(expected, rel=1e-4)


def test_grafting_every_layer_makes_the_hidden_states_the_teachers(tmp_path: Path) -> None:
    student, teacher = llama(0), llama(5)
    with torch.no_grad():
        # Embeddings and the final norm are the student's own: make them equal, so that only layers can differ.
        student.model.embed_tokens.weight.copy_(teacher.model.embed_tokens.weight)
        student.model.norm.weight.copy_(teacher.model.norm.weight)
    trainer = make_trainer(
        student, tmp_path, rows("lm", 8), teacher, sparsity=0.0, hidden_weight=1.0, attention_weight=1.0,
        graft_start=0.0, graft_end=1.0, max_steps=1, logging_strategy="steps", logging_steps=1,
    )  # fmt: skip
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss_hidden"] == 0.0
    assert logged["loss_attention"] == 0.0
    assert logged["graft_prob"] == 0.0


def test_a_step_logs_every_key_through_the_trainer(tmp_path: Path) -> None:
    reported: list[dict[str, float]] = []

    class Backend:
        def __getattr__(self, name: str) -> Any:
            def event(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
                if name == "on_log":
                    reported.append(dict(kwargs["logs"]))
                return control

            return event

    trainer = make_trainer(
        bert(), tmp_path, rows("classes", 8), bert(5), sparsity=0.5, sparsity_end=0.5, penalty_weight=1e-3,
        hidden_weight=1.0, attention_weight=1.0, graft_start=0.2, graft_end=1.0, max_steps=4,
        logging_strategy="steps", logging_steps=2,
    )  # fmt: skip
    trainer.callback_handler.callbacks.append(Backend())
    trainer.train()
    steps = [entry for entry in reported if "loss" in entry]
    keys = {"sparsity", "graft_prob", "penalty", "loss_task", "loss_kd", "loss_hidden", "loss_attention"}
    assert len(steps) == 2
    assert all(keys <= set(entry) for entry in steps)
    assert [entry["graft_prob"] for entry in steps] == pytest.approx([0.4, 0.8])
    assert [entry["sparsity"] for entry in steps] == [pytest.approx(0.4375), pytest.approx(0.5)]
    for entry in steps:
        parts = 0.5 * entry["loss_task"] + 0.5 * entry["loss_kd"] + entry["loss_hidden"] + entry["loss_attention"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-5)


def test_graft_puts_the_students_layers_back_even_after_an_error() -> None:
    student, teacher = bert(0), bert(5)
    before, keys = list(student.bert.encoder.layer), list(student.state_dict())
    with pytest.raises(KeyError), graft(student, teacher, [False, True]):
        assert student.bert.encoder.layer[0] is teacher.bert.encoder.layer[0]
        assert student.bert.encoder.layer[1] is before[1]
        raise KeyError
    assert list(student.bert.encoder.layer) == before
    assert list(student.state_dict()) == keys


def test_graft_wants_one_draw_per_layer() -> None:
    with (
        pytest.raises(ValueError, match="runs_student has 3 entries for 2 sites"),
        graft(bert(0), bert(5), [True] * 3),
    ):
        pass


def test_plain_dictionaries_are_outputs_too() -> None:
    student, teacher = {"logits": torch.tensor([[1.0, 0.0]])}, {"logits": torch.tensor([[0.0, 1.0]])}
    inputs = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    assert prediction_unit(student, inputs) == "samples"
    expected = distillation_loss(student["logits"], teacher["logits"], temperature=2.0)
    assert torch.equal(prediction_loss(student, teacher, inputs, None, 2.0, shifted=False), expected)

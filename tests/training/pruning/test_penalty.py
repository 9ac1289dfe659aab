"""Contract 3: the value, the gradient and the proximal step of the reweighted group lasso, and when they act."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sparse import group_lasso
from hf_sparse.training.pruning.passes import add_penalty_gradient_, shrink_blocks_
from hf_sparse.training.pruning.penalty import next_coef
from hf_sparse.training.schedules import plan_step
from tests.training.tiny import Watch, bert, gpt2, make_trainer, pad, rows, weights_of

SHAPES = [
    ((6, 10), (1, 1)),
    ((6, 10), (3, 1)),
    ((6, 10), (1, 5)),
    ((6, 10), (2, 5)),
    ((6, 10), (6, 10)),
    ((7, 3), (7, 1)),
]


def blocks_by_hand(weight: Tensor, shape: tuple[int, int]) -> list[list[float]]:
    """The L2 norm of each block, in plain python."""
    h, w = shape
    return [
        [
            math.sqrt(sum(weight[r * h + i, c * w + j].item() ** 2 for i in range(h) for j in range(w)))
            for c in range(weight.shape[1] // w)
        ]
        for r in range(weight.shape[0] // h)
    ]


def penalty_and_gradient(weight: Tensor, shape: tuple[int, int], coef: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a step adds to the gradient of one weight."""
    gradient, coefs = torch.zeros_like(weight), {} if coef is None else {"w": coef}
    value = add_penalty_gradient_(
        {"w": gradient}, {"w": weight}, {"w": shape}, coefs, amount=1.0, scale=None, bitmaps=None
    )
    return value, gradient.detach()


@pytest.mark.parametrize(("size", "shape"), SHAPES)
def test_value_equals_a_double_loop(size: tuple[int, int], shape: tuple[int, int]) -> None:
    weight = torch.randn(size, dtype=torch.float64)
    weight[: shape[0], : shape[1]] = 0.0
    norms = blocks_by_hand(weight, shape)
    assert group_lasso(weight, shape).item() == pytest.approx(sum(map(sum, norms)), rel=1e-12)
    coef = next_coef(weight, shape, 1e-3)
    expected = [[1 / (norm + 1e-3) for norm in row] for row in norms]
    torch.testing.assert_close(coef, torch.tensor(expected, dtype=torch.float64))
    weighted = sum(n / (n + 1e-3) for row in norms for n in row)
    assert group_lasso(weight, shape, coef).item() == pytest.approx(weighted, rel=1e-12)


@pytest.mark.parametrize(("size", "shape"), SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_gradient_equals_autograd(
    size: tuple[int, int], shape: tuple[int, int], weighted: bool, dtype: torch.dtype, tolerance: float
) -> None:
    weight = torch.randn(size, dtype=dtype)
    weight[-shape[0] :, -shape[1] :] = 0.0
    weight.requires_grad_()
    coef = next_coef(torch.randn(size, dtype=dtype), shape, 1e-3) if weighted else None
    loss = group_lasso(weight, shape, coef)
    loss.backward()
    value, gradient = penalty_and_gradient(weight, shape, coef)
    assert value.item() == pytest.approx(loss.item(), rel=tolerance)
    torch.testing.assert_close(gradient, weight.grad)
    assert (gradient[-shape[0] :, -shape[1] :] == 0).all(), "a block of zeros is left alone"


def test_bf16_weights_are_summed_in_float32() -> None:
    weight = torch.full((1, 4096), 0.01, dtype=torch.bfloat16)
    value = group_lasso(weight, (1, 4096))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(64 * weight[0, 0].item(), rel=1e-5)
    expected = torch.full_like(weight, 1 / 64)
    torch.testing.assert_close(penalty_and_gradient(weight, (1, 4096), None)[1], expected)


@pytest.mark.parametrize(("size", "shape"), SHAPES)
def test_proximal_step_equals_its_formula(size: tuple[int, int], shape: tuple[int, int]) -> None:
    weight = torch.randn(size, dtype=torch.float64) * 0.5
    weight[: shape[0], : shape[1]] = 0.0
    before, h, w = weight.clone(), *shape
    coef = torch.rand(size[0] // h, size[1] // w, dtype=torch.float64) * 4
    value = shrink_blocks_({"w": weight}, {"w": shape}, {"w": coef}, {"w": 0.25}, moved=None, bitmaps=None)
    total = 0.0
    for r, row in enumerate(blocks_by_hand(before, shape)):
        for c, norm in enumerate(row):
            total += coef[r, c].item() * norm
            old = before[r * h : (r + 1) * h, c * w : (c + 1) * w]
            shrunk = max(0.0, 1 - 0.25 * coef[r, c].item() / norm) if norm else 0.0
            torch.testing.assert_close(weight[r * h : (r + 1) * h, c * w : (c + 1) * w], old * shrunk)
    assert value.item() == pytest.approx(total, rel=1e-12)


def gpt2_classifier() -> Any:
    return gpt2(kind="ForSequenceClassification")


@pytest.mark.parametrize("make", [bert, gpt2_classifier])
@pytest.mark.parametrize(("accumulate", "backend"), [(1, "auto"), (4, "auto"), (4, "reference")])
def test_steps_equal_autograd_of_the_penalised_loss_with_clipping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, accumulate: int, backend: str
) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", backend)
    data, model, by_hand = rows("classes", 24), make(), make()
    trainer = make_trainer(
        model, tmp_path, torch.utils.data.ConcatDataset([data]), sparsity=0.0, penalty_weight=0.05,
        penalty_reweights=2, kd_weight=0.0, max_steps=3, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
        max_grad_norm=0.5, per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate,
        extra={"data_collator": pad}, logging_strategy="steps", logging_steps=1,
    )  # fmt: skip
    batches = []
    original = trainer.get_batch_samples

    def watch_batches(*args: Any) -> Any:
        samples, count = original(*args)
        batches.append(samples)
        return samples, count

    trainer.get_batch_samples = watch_batches
    trainer.train()
    targets = {name: by_hand.get_submodule(name) for name in trainer.pruner.masks.targets}
    optimizer, coefs, values = torch.optim.SGD(by_hand.parameters(), lr=0.1), {}, []
    for step, samples in enumerate(batches[:3]):
        plan = plan_step(trainer.args, step, 3)
        if plan.update_coefs:
            coefs = {
                n: next_coef(m.weight.t() if make is gpt2_classifier else m.weight, (4, 1), 1e-3)
                for n, m in targets.items()
            }
        optimizer.zero_grad()
        loss = sum(by_hand(**batch).loss * len(batch["labels"]) / 8 for batch in samples)
        penalty = sum(
            group_lasso(m.weight.t() if make is gpt2_classifier else m.weight, (4, 1), coefs[n])
            for n, m in targets.items()
        )
        values.append(penalty.item())
        (loss + 0.05 * penalty).backward()
        norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        assert norm > 0.5, "the step was not clipped"
        optimizer.step()
    for name, weight in weights_of(by_hand).items():
        torch.testing.assert_close(model.get_parameter(name).detach(), weight, rtol=1e-4, atol=1e-6)
    logged = [entry["penalty"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(values, rel=1e-4)


@pytest.mark.parametrize("make", [bert, gpt2_classifier])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_proximal_form_in_training_equals_its_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, backend: str
) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", backend)
    data, model, by_hand = rows("classes", 8), make(), make()
    trainer = make_trainer(
        model, tmp_path, data, sparsity=0.0, penalty_weight=0.5, penalty_form="proximal", penalty_reweights=1,
        kd_weight=0.0, max_steps=2, optim="sgd", learning_rate=0.1, lr_scheduler_type="linear", max_grad_norm=0.0,
        num_train_epochs=1, logging_strategy="steps", logging_steps=1,
    )  # fmt: skip
    trainer.train()
    targets = {name: by_hand.get_submodule(name) for name in trainer.pruner.masks.targets}
    view = {n: (m.weight.t() if make is gpt2_classifier else m.weight) for n, m in targets.items()}
    coefs = {n: next_coef(w, (4, 1), 1e-3) for n, w in view.items()}
    values = []
    for rate in (0.1, 0.05):
        by_hand.zero_grad()
        by_hand(**pad(data)).loss.backward()
        with torch.no_grad():
            for parameter in by_hand.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
            values.append(sum(group_lasso(w, (4, 1), coefs[n]).item() for n, w in view.items()))
            for name, weight in view.items():
                for r in range(weight.shape[0] // 4):
                    for c in range(weight.shape[1]):
                        block = weight[4 * r : 4 * r + 4, c]
                        block *= max(0.0, 1 - rate * 0.5 * coefs[name][r, c].item() / block.norm().item())
    for name, weight in weights_of(by_hand).items():
        torch.testing.assert_close(model.get_parameter(name).detach(), weight, rtol=1e-4, atol=1e-6)
    assert [e["penalty"] for e in trainer.state.log_history if "loss" in e] == pytest.approx(values, rel=1e-4)


def test_coefficients_are_renewed_at_the_planned_steps_only(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), sparsity=0.5, sparsity_end=0.8, penalty_weight=1e-3,
                           penalty_reweights=2, kd_weight=0.0, max_steps=10, sparsity_schedule="one_shot")  # fmt: skip
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def keep(state: Any) -> None:
        live = {n: w.detach().clone() for n, w in trainer.pruner.masks.weights()}
        seen.append(({n: c.clone() for n, c in trainer.pruner.coefs.items()}, live))

    # on_step_begin of this callback runs after the trainer's own.
    trainer.add_callback(Watch(on_step_begin=keep))
    trainer.train()
    renewed = [
        step
        for step in range(10)
        if step == 0 or any(not torch.equal(seen[step][0][n], seen[step - 1][0][n]) for n in seen[0][0])
    ]
    assert renewed == [0, 4]
    for step in renewed:
        coefs, weights = seen[step]
        for name, coef in coefs.items():
            expected = torch.tensor(blocks_by_hand(weights[name].double(), (4, 1))).add(1e-3).reciprocal()
            torch.testing.assert_close(coef, expected.float(), rtol=1e-5, atol=1e-6)


def test_reweights_0_keeps_the_plain_group_lasso(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), sparsity=0.0, penalty_weight=1e-3, kd_weight=0.0,
                           penalty_reweights=0, max_steps=1, logging_strategy="steps", logging_steps=1)  # fmt: skip
    expected = sum(group_lasso(w, (4, 1)).item() for _, w in trainer.pruner.masks.weights())
    trainer.train()
    assert trainer.pruner.coefs == {}
    assert trainer.state.log_history[0]["penalty"] == pytest.approx(expected, rel=1e-5)


def test_penalty_ends_with_pruning(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), sparsity=0.5, sparsity_end=0.5, penalty_weight=1e-3,
                           kd_weight=0.0, max_steps=4, logging_strategy="steps", logging_steps=1)  # fmt: skip
    trainer.train()
    logged = [entry["penalty"] for entry in trainer.state.log_history if "loss" in entry]
    assert [value > 0 for value in logged] == [True, True, False, False]


def test_penalty_reaches_a_layer_that_was_grafted_away(tmp_path: Path) -> None:
    trainer = make_trainer(
        bert(), tmp_path, rows("classes", 8), sparsity=0.0, penalty_weight=0.1, graft_start=0.0, graft_end=1.0,
        max_steps=1, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, penalty_reweights=0,
    )  # fmt: skip
    before = weights_of(trainer.model)
    trainer.train()
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    gradient = penalty_and_gradient(before[name], (4, 1), None)[1]
    torch.testing.assert_close(trainer.model.get_parameter(name).detach(), before[name] - 0.1 * 0.1 * gradient)
    bias = name.replace("weight", "bias")
    assert torch.equal(trainer.model.get_parameter(bias).detach(), before[bias]), "no gradient but the penalty's"


@pytest.mark.parametrize(("weight", "coef", "message"), [
    (torch.ones(8), None, r"floating-point weight \[O, I\], not of torch.float32 of shape \[8\]"),
    (torch.ones(2, 8, 8), None, r"not of torch.float32 of shape \[2, 8, 8\]: pass one weight at a time"),
    (torch.ones(8, 8, dtype=torch.long), None, "not of torch.int64"),
    (torch.ones(8, 8), torch.ones(8), r"coef has shape \[8\], the grid of \[8, 8\] in blocks of \[4, 1\] is \[2, 8\]"),
    (torch.ones(8, 8), torch.ones(1, 1), r"coef has shape \[1, 1\], the grid .* is \[2, 8\]"),
    (torch.ones(8, 8), torch.ones(3, 8), r"coef has shape \[3, 8\], the grid .* is \[2, 8\]"),
])  # fmt: skip
def test_mistakes_are_refused_by_name(weight: Tensor, coef: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_lasso(weight, (4, 1), coef)


@pytest.mark.parametrize("shape", [4, (4,)])
def test_a_block_shape_that_is_no_pair(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"block_shape=\(?4,?\)? is no block shape: use a pair \(h, w\)"):
        group_lasso(torch.ones(8, 8), shape)

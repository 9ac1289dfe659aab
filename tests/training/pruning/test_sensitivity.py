"""Importance by Fisher information: whose squared gradients, what they rank, what a resumed run remembers."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_sparse.training.pruning.sensitivity import DECAY, SquaredGradients
from tests.training.tiny import bert, make_trainer, rows


def test_adams_own_means_are_taken() -> None:
    linear, optimizer = train_linear(torch.optim.AdamW, 3)
    squares = SquaredGradients({"a": linear})
    squares.watch(optimizer)
    assert not squares.own
    assert squares.means(optimizer)["a"] is optimizer.state[linear.weight]["exp_avg_sq"]


def test_for_other_optimizers_the_same_means_are_kept() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3, 2)
    sgd, squares, expected = torch.optim.SGD(linear.parameters(), lr=0.1), SquaredGradients({"a": linear}), 0.0
    for _ in range(4):
        sgd.zero_grad()
        linear(torch.randn(5, 3)).square().sum().backward()
        expected = DECAY * expected + linear.weight.grad.square()  # type: ignore[union-attr]
        sgd.step()
        squares.watch(sgd)
    torch.testing.assert_close(squares.means(sgd)["a"], expected)
    linear.weight.grad.fill_(float("inf"))  # type: ignore[union-attr]
    squares.watch(sgd, torch.tensor(False))
    torch.testing.assert_close(squares.means(sgd)["a"], expected)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_fewer_gradients_are_made_up_for(kind: Any) -> None:
    often, seldom = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    optimizer = kind([often.weight, seldom.weight], lr=0.1)
    squares = SquaredGradients({"often": often, "seldom": seldom})
    for step in range(20):
        # The same gradient throughout: whoever has seen more of them must not count as more sensitive.
        often.weight.grad, seldom.weight.grad = (
            torch.full((2, 3), 0.5),
            torch.full((2, 3), 0.5) if step % 4 == 0 else None,
        )
        optimizer.step()
        squares.watch(optimizer)
    means = squares.means(optimizer)
    torch.testing.assert_close(means["seldom"], means["often"])
    held = squares.own["often"] if kind is torch.optim.SGD else optimizer.state[often.weight]["exp_avg_sq"]
    assert torch.equal(means["often"], held)


def test_skipped_steps_alone_tell_nothing() -> None:
    linear = nn.Linear(3, 2, bias=False)
    optimizer, squares = torch.optim.SGD([linear.weight], lr=0.1), SquaredGradients({"a": linear})
    linear.weight.grad = torch.full((2, 3), float("inf"))
    squares.watch(optimizer, torch.tensor(False))
    assert squares.means(optimizer)["a"].ndim == 0


@pytest.mark.parametrize(("scope", "same"), [("auto", True), ("global", False)])
def test_before_the_first_gradients_layers_are_not_compared(tmp_path: Path, scope: str, same: bool) -> None:
    model = bert()
    with torch.no_grad():
        for module in model.bert.encoder.layer[1].modules():
            if isinstance(module, nn.Linear):
                module.weight *= 0.2
    trainer = make_trainer(model, tmp_path, rows("classes", 8), sparsity=0.75, sparsity_end=0.0, max_steps=1,
                           sparsity_scope=scope, block_height=4)  # fmt: skip
    trainer.train()
    kept = {name: float(mask.float().mean()) for name, mask in trainer.pruner.masks.masks.items()}
    assert (set(kept.values()) == {0.25}) is same


def test_a_linear_without_gradients_counts_as_the_average() -> None:
    linear, optimizer = train_linear(torch.optim.AdamW, 2)
    means = SquaredGradients({"a": linear, "b": nn.Linear(2, 2)}).means(optimizer)
    assert means["b"] == optimizer.state[linear.weight]["exp_avg_sq"].mean()
    before = SquaredGradients({"a": nn.Linear(2, 2)}).means(None)
    assert before["a"] == 1.0


def test_the_means_of_a_conv1d_are_turned_as_its_weight_is() -> None:
    layer = Conv1D(4, 3)
    squares = SquaredGradients({"a": layer})
    layer(torch.randn(2, 3)).sum().backward()
    squares.watch(torch.optim.SGD(layer.parameters()))
    assert layer.weight.shape == (3, 4) and squares.means(None)["a"].shape == (4, 3)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_blocks_go_that_the_loss_minds_least(tmp_path: Path, optim: str) -> None:
    trainer = make_trainer(
        bert(), tmp_path, rows("classes", 40), importance="fisher", sparsity=0.5, sparsity_schedule="one_shot",
        sparsity_end=0.6, optim=optim,
        block_height=4, sparsity_scope="global", layer_share=0.0, learning_rate=1e-3,
    )  # fmt: skip
    seen: dict[str, Any] = {}
    choose = trainer.pruner.masks.choose

    def watch(sparsity: float, scores: Any, share: float | None) -> None:
        weights = dict(trainer.pruner.masks.weights())
        seen["squares"] = {k: v.clone() for k, v in trainer.pruner.squares.means(trainer.optimizer).items()}
        seen["expected"] = {
            name: (weight.detach() ** 2 * seen["squares"][name]).unflatten(0, (-1, 4)).mean(1).sqrt()
            for name, weight in weights.items()
        }
        seen["scores"] = scores
        choose(sparsity, scores, share)

    trainer.pruner.masks.choose = watch  # type: ignore[method-assign]
    trainer.train()
    assert all(square.ndim == 2 and (square > 0).any() for square in seen["squares"].values())
    assert bool(trainer.pruner.squares.own) == (optim == "sgd")
    for name, expected in seen["expected"].items():
        torch.testing.assert_close(seen["scores"][name], expected, rtol=1e-4, atol=1e-12)
    kept = torch.cat([seen["expected"][n][m] for n, m in trainer.pruner.masks.masks.items()])
    gone = torch.cat([seen["expected"][n][~m] for n, m in trainer.pruner.masks.masks.items()])
    assert kept.min() >= gone.max() and len(gone) == pytest.approx(len(kept), abs=1)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_resumed_run_remembers(tmp_path: Path, optim: str) -> None:
    settings = {"importance": "fisher", "sparsity": 0.5, "sparsity_end": 0.9, "optim": optim, "max_steps": 8,
                "save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-2, "save_format": "dense"}  # fmt: skip
    whole = make_trainer(bert(), tmp_path / "whole", rows("classes", 40), **settings)
    whole.train()
    resumed = make_trainer(bert(), tmp_path / "whole", rows("classes", 40), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    for (name, first), second in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(first, second), name


def train_linear(optimizer_class: Any, steps: int) -> tuple[nn.Linear, Any]:
    torch.manual_seed(0)
    linear = nn.Linear(3, 2)
    optimizer = optimizer_class(linear.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        linear(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return linear, optimizer


def test_an_update_by_fisher_holds_one_product_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_sparse.training.distributed import shards

    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    norms = shards.block_norms

    def watched(weight: Tensor, shape: tuple[int, int]) -> Tensor:
        alive.append(sum(ref() is not None for ref in held))
        held.append(weakref.ref(weight))
        return norms(weight, shape)

    monkeypatch.setattr(shards, "block_norms", watched)
    weights = {f"{i}": torch.randn(8, 4) for i in range(4)}
    squares = {name: torch.rand(8, 4) for name in weights}
    found = shards.norms_of_blocks(weights, dict.fromkeys(weights, (4, 1)), lambda name: squares[name].sqrt())
    assert alive == [0, 0, 0, 0]
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], norms(weight * squares[name].sqrt(), (4, 1)))

"""Contract 1: a trainer with everything off is a plain training loop, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup, set_seed

from tests.training.tiny import Watch, assert_same, bert, gradients_of, llama, make_trainer, pad, rows, weights_of

OFF = {"sparsity": 0.0, "penalty_weight": 0.0, "kd_weight": 0.0}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


class Ordered(torch.utils.data.IterableDataset):
    """Rows in their own order: the trainer draws no random numbers to shuffle them."""

    def __init__(self, data: list[dict[str, Any]]) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return iter(self.data)


def hand_loop(
    model: Any, data: list, steps: int, batch: int, accumulate: int, rate: float, clip: float, decay: float
) -> list:
    """What a newcomer would write: AdamW, warm-up and linear decay, clipping, accumulation."""
    plain = [n for n, _ in model.named_parameters() if "bias" in n or "norm" in n.lower()]
    groups = [
        {"params": [p for n, p in model.named_parameters() if n not in plain], "weight_decay": decay},
        {"params": [p for n, p in model.named_parameters() if n in plain], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999), eps=1e-8)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, steps)
    batches = iter(DataLoader(data, batch_size=batch, collate_fn=pad))
    model.train()
    losses = []
    for _ in range(steps):
        total = 0.0
        for _ in range(accumulate):
            loss = model(**next(batches)).loss / accumulate
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_equal_a_hand_written_loop_bit_for_bit(tmp_path: Path, accumulate: int) -> None:
    steps, batch = 6, 4
    data = rows("classes", steps * batch * accumulate)
    by_hand, by_trainer = bert(**DROPOUT), bert(**DROPOUT)
    # 0.05 is far below the norms that occur, so that every step is clipped.
    trainer = make_trainer(
        by_trainer, tmp_path, Ordered(data), **OFF, max_steps=steps, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate, weight_decay=0.1, max_grad_norm=0.05, warmup_steps=1,
        learning_rate=1e-2, lr_scheduler_type="linear", optim="adamw_torch", logging_strategy="steps", logging_steps=1,
    )  # fmt: skip
    trainer.add_callback(Watch(on_train_begin=lambda state: set_seed(123)))
    trainer.train()
    set_seed(123)
    losses = hand_loop(by_hand, data, steps, batch, accumulate, 1e-2, 0.05, 0.1)
    assert_same(weights_of(by_hand), weights_of(by_trainer))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logs] == pytest.approx(losses, rel=1e-6)
    assert all(entry["grad_norm"] > 0.05 for entry in logs), "a step was not clipped: the test would prove less"
    assert trainer.teacher_model is None


@pytest.mark.parametrize("task", ["classes", "regression", "tagging", "qa", "lm"])
def test_loss_and_gradients_equal_the_plain_model(tmp_path: Path, task: str) -> None:
    kinds = {"tagging": "TokenClassification", "qa": "QuestionAnswering", "classes": "SequenceClassification"}

    def make() -> Any:
        if task == "lm":
            return llama()
        return bert(kind=kinds.get(task, "SequenceClassification"), num_labels={"regression": 1, "qa": 2}.get(task, 3))

    data, plain = rows(task, 8), make()
    trainer = make_trainer(make(), tmp_path, Ordered(data), **OFF, max_steps=1, max_grad_norm=0.0,
                           logging_strategy="steps", logging_steps=1)  # fmt: skip
    seen = gradients_of(trainer)
    loss = plain(**pad(data)).loss
    loss.backward()
    assert_same({n: p.grad for n, p in plain.named_parameters() if p.grad is not None}, seen[0])
    assert trainer.state.log_history[0]["loss"] == loss.item()


def test_off_holds_no_teacher_and_prunes_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), **OFF, max_steps=2, save_format="dense")
    trainer.train()
    assert trainer.teacher_model is None
    assert trainer.args.task_weight == 1.0
    assert trainer.pruner.masks.targets == {}
    assert not any((p == 0).any() for p in trainer.model.bert.encoder.parameters())


def test_a_model_without_transformer_layers_trains_when_off(tmp_path: Path) -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.layer(x).squeeze(-1) - labels).square().mean()}

    torch.manual_seed(0)
    model = Plain()
    before = weights_of(model)
    data = [{"x": torch.randn(4), "labels": torch.tensor(1.0)} for _ in range(8)]
    trainer = make_trainer(model, tmp_path, data, extra={"data_collator": None}, **OFF, max_steps=2)
    trainer.train()
    assert not torch.equal(before["layer.weight"], model.layer.weight)
    trainer.save_model(tmp_path / "final")
    assert (tmp_path / "final" / "model.safetensors").is_file()

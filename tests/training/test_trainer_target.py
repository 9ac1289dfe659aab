"""Contract 5: pruned blocks stay exactly zero under any optimizer, and a run ends at its target or raises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from tests.training.tiny import Watch, bert, make_trainer, pruned_zero, rows


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1},
        {"optim": "adamw_torch", "weight_decay": 0.3},
        {"optim": "adafactor"},
        {"optim": "rmsprop", "max_grad_norm": 0.0},
    ],
    ids=lambda settings: settings["optim"],
)
def test_pruned_blocks_are_exactly_zero_after_every_step(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 16), **settings, max_steps=8, sparsity=0.6,
                           sparsity_end=0.5, mask_updates=3, penalty_weight=1e-3)  # fmt: skip
    if settings["optim"] == "sgd":
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    zero, moved = [], []

    def look(state: Any) -> None:
        if trainer.pruner.masks.started:
            zero.append(pruned_zero(trainer))
            moved.append(trainer.model.bert.encoder.layer[0].output.dense.weight.detach().clone())

    trainer.add_callback(Watch(on_step_end=look))
    trainer.train()
    assert zero == [True] * len(zero)
    assert len(zero) >= 6
    assert not torch.equal(moved[-1], moved[-2]), "the kept weights go on learning"
    optimizer = type(trainer.optimizer.optimizer).__name__.lower()
    assert optimizer in (settings["optim"].removesuffix("_torch"), "adamw")


def test_gradients_of_pruned_blocks_do_not_count_in_clipping(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 16), sparsity=0.6, sparsity_end=0.5, mask_updates=2,
                           max_steps=5, penalty_weight=1e-2, per_device_train_batch_size=4, logging_steps=1,
                           gradient_accumulation_steps=2, logging_strategy="steps")  # fmt: skip
    norms, checked = [], []

    def look(state: Any) -> None:
        norms.append(sum(p.grad.square().sum() for p in trainer.model.parameters()).sqrt().item())
        if trainer.pruner.masks.started:
            for name, mask in trainer.pruner.masks.masks.items():
                gradient = trainer.pruner.masks.targets[name].weight.grad
                checked.append(not gradient[~mask.repeat_interleave(4, 0)].any())

    trainer.args.max_grad_norm = 1e9
    trainer.add_callback(Watch(on_pre_optimizer_step=look))
    trainer.train()
    assert len(checked) >= 36
    assert all(checked)
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("schedule", ["cubic", "linear", "one_shot"])
@pytest.mark.parametrize(
    ("steps", "start", "end"), [(1, 0.0, 1.0), (2, 0.0, 0.5), (3, 0.4, 0.4), (3, 1.0, 1.0), (5, 0.2, 0.7)]
)
def test_target_is_reached_within_one_block(
    tmp_path: Path, scope: str, schedule: str, steps: int, start: float, end: float
) -> None:
    # Odd sizes: 15 x 15 and 45 x 15 weights in blocks of 3 x 5.
    model = bert(hidden_size=15, num_attention_heads=3, intermediate_size=45, num_hidden_layers=1)
    trainer = make_trainer(
        model, tmp_path, rows("classes", 8), sparsity=0.7, sparsity_scope=scope, sparsity_schedule=schedule,
        sparsity_start=start, sparsity_end=end, block_height=3, block_width=5, kd_weight=0.0, max_steps=steps,
    )  # fmt: skip
    trainer.train()
    masks = trainer.pruner.masks.masks
    if scope == "layer":
        for name, mask in masks.items():
            assert abs(int((~mask).sum()) - 0.7 * mask.numel()) <= 1, name
    total = sum(mask.numel() for mask in masks.values())
    off = abs(sum(int((~mask).sum()) for mask in masks.values()) - 0.7 * total)
    assert off <= (1 if scope == "global" else len(masks))
    assert pruned_zero(trainer)


@pytest.mark.parametrize(("height", "width"), [(-1, 1), (1, -1), (1, 8), (8, 8), (1, 1)])
def test_block_shapes_of_the_papers(tmp_path: Path, height: int, width: int) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), sparsity=0.5, block_height=height, block_width=width,
                           kd_weight=0.0, max_steps=2)  # fmt: skip
    trainer.train()
    shape = trainer.pruner.masks.block_shapes["bert.encoder.layer.1.intermediate.dense"]
    assert shape == (32 if height == -1 else height, 16 if width == -1 else width)
    assert pruned_zero(trainer)
    assert trainer.pruner.masks.sparsity == pytest.approx(0.5, abs=0.04)


def test_overrides_give_layers_their_own_shape(tmp_path: Path) -> None:
    overrides = '{".*intermediate\\\\.dense": [16, 1], ".*layer\\\\.1.*query": [1, -1]}'
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), sparsity=0.5, block_overrides=overrides,
                           sparsity_scope="global", kd_weight=0.0, max_steps=2)  # fmt: skip
    trainer.train()
    shapes = trainer.pruner.masks.block_shapes
    assert shapes["bert.encoder.layer.0.intermediate.dense"] == (16, 1)
    assert shapes["bert.encoder.layer.1.attention.self.query"] == (1, 16)
    assert shapes["bert.encoder.layer.0.attention.self.query"] == (4, 1)
    assert pruned_zero(trainer)


def test_chosen_layers_alone_are_pruned(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), sparsity=0.5, kd_weight=0.0, max_steps=2,
                           target_modules=r".*\.(query|key)", exclude_modules=r".*layer\.1.*")  # fmt: skip
    trainer.train()
    assert list(trainer.pruner.masks.targets) == [
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.0.attention.self.key",
    ]
    others = [p for n, p in trainer.model.named_parameters() if p.ndim == 2 and ".layer.0.attention.self." not in n]
    assert not any((p == 0).any() for p in others)


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize(("scope", "told"), [
    ("layer", r"bert\.encoder\.layer\.0\S* has lost \d+ of 64 blocks"), ("global", r"sparsity 0\.\d+ over all layers"),
])  # fmt: skip
def test_a_run_that_stops_early_raises(tmp_path: Path, scope: str, told: str) -> None:
    trainer = make_trainer(
        bert(), tmp_path, rows("classes", 8), sparsity=0.5, sparsity_scope=scope, max_steps=8,
        extra={"callbacks": [Stop()]},
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=rf"ended off target: {told}.*sparsity=0\.5"):
        trainer.train()


def test_early_stopping_after_the_target_does_not_raise(tmp_path: Path) -> None:
    data = rows("classes", 16)
    trainer = make_trainer(
        bert(), tmp_path, data, sparsity=0.5, sparsity_end=0.2, max_steps=20, learning_rate=0.0, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
        extra={"eval_dataset": data, "callbacks": [EarlyStoppingCallback(2)]},
    )  # fmt: skip
    trainer.train()
    assert 4 < trainer.state.global_step < 20
    assert pruned_zero(trainer)


def test_a_callback_that_writes_to_pruned_weights_is_found_out(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), sparsity=0.5, max_steps=2)

    def spoil(state: Any) -> None:
        with torch.no_grad():
            trainer.model.bert.encoder.layer[0].output.dense.weight.add_(1.0)

    trainer.add_callback(Watch(on_step_end=spoil))
    with pytest.raises(RuntimeError, match="weights in pruned blocks"):
        trainer.train()


def test_training_twice_does_not_bring_blocks_back(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), sparsity=0.5, max_steps=3)
    trainer.train()
    first = trainer.pruner.masks.state_dict()
    trainer.train()
    assert all(torch.equal(first[name], mask) for name, mask in trainer.pruner.masks.state_dict().items())
    assert pruned_zero(trainer)

"""Stacked cells train as `SparseDistillTrainer` trains each of them: same weights after the last step."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding, set_seed

from benchmarks.grid.stack import OutOfTimeError, Stack, batch_order, on, train
from hf_sparse import SparseDistillConfig, SparseDistillTrainer

CPU = torch.device("cpu")
ROWS, BATCH, EPOCHS = 56, 4, 1

MAGNITUDE = {"importance": "magnitude"}

# Cells of one stack: what differs between them is what a grid varies.
CELLS: dict[str, dict[str, Any]] = {
    "dense": {"sparsity": 0.0, "kd_weight": 0.0, "learning_rate": 1e-3},
    "agp": {"kd_weight": 0.0, "sparsity": 0.5},
    "activation": {"hidden_weight": 1.0, "hidden_form": "mse", "importance": "activation"},
    "tiles": {"block_height": 8, "block_width": 4, "seed": 2},
    "fisher": {"importance": "fisher", "sparsity_scope": "global", "hidden_weight": 1.0},
    "single weights": {"block_height": 1, "block_width": 1, "importance": "activation", "kd_temperature": 4.0},
    "hybrid": {"preset": "hybrid", "block_width": 4, "importance": "activation", "penalty_weight": 1e-3},
    "global": {"sparsity_scope": "global", "layer_share": 0.0, "sparsity": 0.6},
    "shared": {"layer_share": 0.5, "sparsity": 0.6},
    "one shot": {"sparsity_schedule": "one_shot", "sparsity_end": 0.3},
    "lasso": {"penalty_weight": 1e-3, "penalty_reweights": 2},
    "proximal": {"penalty_weight": 1e-2, "penalty_form": "proximal", "seed": 2},
    "grafted": {"graft_start": 0.4, "graft_hold": 0.2, "graft_end": 0.8, "hidden_weight": 1.0, **MAGNITUDE},
    "theseus": {"graft_start": 0.5, "graft_end": 0.7, "kd_weight": 0.0, "seed": 2, **MAGNITUDE},
}


def make_model() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_labels=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3, attn_implementation="sdpa",
    )  # fmt: skip
    set_seed(0)
    model = BertForSequenceClassification(config)
    model.base_model.embeddings.requires_grad_(False)
    return model


def make_rows(count: int = ROWS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    lengths = rng.integers(3, 15, count)
    ids = rng.integers(1, 50, (count, 16))
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = 0
    types = (np.arange(16)[None] >= lengths[:, None] // 2) & (ids > 0)
    return {"ids": ids, "types": types.astype(int), "lengths": lengths, "labels": rng.integers(0, 2, count)}


def make_config(folder: Path, changes: dict[str, Any]) -> SparseDistillConfig:
    settings: dict[str, Any] = {
        # Adam divides by the size of a gradient: where that is rounding alone, an epsilon has to be larger than it.
        "adam_epsilon": 1e-5, "learning_rate": 5e-3, "warmup_steps": 0.1, "mask_updates": 6, "sparsity": 0.75,
        "block_height": 8, "seed": 1,
        **changes,
    }  # fmt: skip
    return SparseDistillConfig(
        output_dir=str(folder), use_cpu=True, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH,
        report_to="none", save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential",
        optim="adamw_torch_fused", logging_steps=1, save_format="dense", weight_decay=0.0, **settings,
    )  # fmt: skip


class _Tokenizer:
    model_input_names = ["input_ids"]
    padding_side = "right"

    def pad(self, features: list[dict[str, Any]], **_: Any) -> dict[str, torch.Tensor]:
        longest = -(-max(len(f["input_ids"]) for f in features) // 8) * 8
        padded = {
            key: [f[key] + [0] * (longest - len(f[key])) for f in features]
            for key in ("input_ids", "token_type_ids", "attention_mask")
        }
        return {
            **{k: torch.tensor(v) for k, v in padded.items()},
            "labels": torch.tensor([f["label"] for f in features]),
        }


def train_alone(config: SparseDistillConfig, rows: dict[str, np.ndarray]) -> SparseDistillTrainer:
    """Run the trainer on the batches that a stack draws for the seed, one after the other."""
    order = [
        i
        for batch in batch_order(torch.as_tensor(rows["lengths"]), BATCH, EPOCHS, [config.seed])
        for i in batch[0].tolist()
    ]
    data = []
    for i in order:
        length = int(rows["lengths"][i])
        data.append({
            "input_ids": rows["ids"][i, :length].tolist(), "token_type_ids": rows["types"][i, :length].tolist(),
            "attention_mask": [1] * length, "label": int(rows["labels"][i]),
        })  # fmt: skip
    config.num_train_epochs = 1
    collate = DataCollatorWithPadding(_Tokenizer())  # type: ignore[arg-type]
    trainer = SparseDistillTrainer(model=make_model(), args=config, train_dataset=data, data_collator=collate)  # type: ignore[arg-type]
    trainer.train()
    return trainer


def make_stack(folder: Path, rows: dict[str, np.ndarray], names: list[str]) -> Stack:
    configs = [make_config(folder, CELLS[name]) for name in names]
    models = [make_model() for _ in names]
    return Stack(
        models, copy.deepcopy(models[0]), configs, [{}] * len(names), [c.seed for c in configs], on(rows, CPU), CPU
    )


@torch.no_grad()
def plain_loss(model: BertForSequenceClassification, rows: dict[str, np.ndarray]) -> float:
    ids, types, labels = (torch.as_tensor(rows[key]) for key in ("ids", "types", "labels"))
    real = torch.arange(ids.shape[1])[None] < torch.as_tensor(rows["lengths"])[:, None]
    return float(model(input_ids=ids, token_type_ids=types, attention_mask=real.long(), labels=labels).loss)


def compare(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4, msg=lambda text: f"{what}: {text}")


def test_a_stack_trains_every_cell_as_the_trainer_does(tmp_path: Path) -> None:
    rows, names = make_rows(), list(CELLS)
    stack = make_stack(tmp_path, rows, names)
    losses: list[torch.Tensor] = []
    for index in stack.batches():
        losses.append(stack.run_step(index)["loss"])
    watched = "bert.encoder.layer.0.output.dense.weight"
    start = dict(make_model().named_parameters())[watched]
    for n, name in enumerate(names):
        trainer = train_alone(make_config(tmp_path, CELLS[name]), rows)
        logged = torch.tensor([logs["loss"] for logs in trainer.state.log_history if "loss" in logs])
        compare(name, torch.stack(losses)[:, n], logged)
        for key, parameter in trainer.student.named_parameters():
            if key in stack.stack.weights:
                compare(f"{name}, {key}", stack.stack.weights[key][n].detach(), parameter.detach())
        assert (stack.stack.weights[watched][n] - start).abs().max() > 0.005, name


def test_batches_hold_every_row_once_per_epoch_and_one_length_for_all_seeds() -> None:
    lengths = torch.as_tensor(make_rows(100)["lengths"])
    batches = list(batch_order(lengths, 4, 2, [1, 2]))
    assert len(batches) == 50
    for seed in (0, 1):
        for epoch in (batches[:25], batches[25:]):
            assert sorted(torch.cat([b[seed] for b in epoch]).tolist()) == list(range(100))
    assert any(not torch.equal(b[0], b[1]) for b in batches)


def test_a_stack_is_measured_as_it_goes_and_stops_at_the_deadline(tmp_path: Path) -> None:
    rows, told = make_rows(128), list[str]()
    stack = make_stack(tmp_path, rows, ["agp", "activation"])
    found = train(stack, 2, on(rows, CPU), on(rows, CPU), on(rows, CPU), time.monotonic() + 600, 5, told.append)
    assert [at["step"] for at in found[1]["dev"]] == [16, 32] and len(told) == 2
    assert found[1]["sparsity_reached"] == pytest.approx(0.75, abs=0.01) and found[1]["dev"][-1]["final_sparsity"]
    assert found[1]["train"][-1]["step"] == 32 and found[1]["train"][-1]["sparsity"] == 0.75
    model = stack.stack.load_into(make_model(), 1)
    assert found[1]["dev"][-1]["dev_loss"] == pytest.approx(plain_loss(model, rows), rel=1e-4)
    late = make_stack(tmp_path, rows, ["dense"])
    with pytest.raises(OutOfTimeError) as stopped:
        train(late, 1, on(rows, CPU), on(rows, CPU), on(rows, CPU), time.monotonic() - 1, 5, told.append)
    assert stopped.value.unfinished[0]["stopped_at"] == 0


def test_what_a_stack_cannot_train_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, {"attention_weight": 1.0})
    with pytest.raises(ValueError, match="attention_weight=1.0 is not trained in stacks"):
        Stack([make_model()], make_model(), [config], [{}], [1], on(make_rows(), CPU), CPU)
    config = make_config(tmp_path, {"feed_forward": "units", "sparsity_scope": "global"})
    with pytest.raises(ValueError, match="feed_forward='units' with sparsity_scope='global' .* is not trained in"):
        Stack([make_model()], make_model(), [config], [{}], [1], on(make_rows(), CPU), CPU)

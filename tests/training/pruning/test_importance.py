"""importance="activation": blocks ranked by what they contribute to the outputs, measured on the step's batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hf_sparse.core.structure.targets import find_targets
from hf_sparse.training.pruning.importance import activation, input_rms
from hf_sparse.training.pruning.pruner import Pruner
from hf_sparse.training.schedules import plan_step
from tests.training.tiny import (
    Recorder,
    assert_same,
    bert,
    gpt2,
    make_trainer,
    pad,
    rows,
    sparse_config,
    t5,
    weights_of,
)


def test_the_score_is_the_size_of_the_products() -> None:
    torch.manual_seed(0)
    weight, rms = torch.randn(8, 6), torch.rand(6)
    found = activation(weight, (4, 2), rms)
    for r in range(2):
        for c in range(3):
            terms = [(weight[4 * r + i, 2 * c + j] * rms[2 * c + j]) ** 2 for i in range(4) for j in range(2)]
            assert found[r, c].item() == pytest.approx((sum(terms).item() / 8) ** 0.5, rel=1e-5)


def test_inputs_are_measured_over_real_tokens_in_eval_mode() -> None:
    model = bert(hidden_dropout_prob=0.5)
    data = rows("classes", 6)
    targets = find_targets(model)
    found = input_rms(model.train(), targets, [pad(data)])
    assert model.training
    # The first linear of a layer reads the embeddings, one sample after the other and without padding.
    model.eval()
    with torch.no_grad():
        embedded = [model.bert.embeddings(torch.tensor([row["input_ids"]]))[0] for row in data]
    expected = torch.cat(embedded).square().mean(0).sqrt()
    torch.testing.assert_close(found["bert.encoder.layer.0.attention.self.query"], expected)
    assert set(found) == set(targets)


def test_the_split_into_micro_batches_does_not_matter() -> None:
    model, data = bert(), rows("classes", 8)
    whole = input_rms(model, find_targets(model), [pad(data)])
    parts = input_rms(model, find_targets(model), [pad(data[:2]), pad(data[2:])])
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[name])


def test_linears_stored_the_other_way_round_and_linears_that_nothing_reaches() -> None:
    model = gpt2()
    for name, value in input_rms(model, find_targets(model), [pad(rows("lm", 2))]).items():
        assert value.shape == (find_targets(model)[name].weight.shape[0],)
    spare = nn.Linear(3, 2)
    assert input_rms(model, {"spare": spare}, [pad(rows("lm", 2))])["spare"].tolist() == [1.0, 1.0, 1.0]


def test_a_run_prunes_what_its_batch_says(tmp_path: Path) -> None:
    model = bert(3)
    start = weights_of(model)
    settings = {"importance": "activation", "sparsity": 0.5, "sparsity_schedule": "one_shot", "sparsity_end": 0.0,
                "max_steps": 2, "disable_tqdm": True, "report_to": "none", "use_cpu": True, "save_strategy": "no",
                "block_height": 4}  # fmt: skip
    recorder = Recorder(
        model, sparse_config(tmp_path, **settings), train_dataset=rows("classes", 24), data_collator=pad
    )
    recorder.train()
    fresh = bert(3)
    rms = input_rms(fresh, find_targets(fresh), [recorder.batches[0]])
    differs = False
    for name, mask in recorder.pruner.masks.masks.items():
        score = activation(start[f"{name}.weight"], (4, 1), rms[name])
        assert torch.equal(mask, score > score.flatten().sort().values[score.numel() // 2 - 1])
        size = start[f"{name}.weight"].view(-1, 4, mask.shape[1]).square().sum(1)
        differs |= not torch.equal(mask, size > size.flatten().sort().values[size.numel() // 2 - 1])
    assert differs, "magnitude would have chosen the same"


def test_resumed_run_equals_straight_through(tmp_path: Path) -> None:
    run = {"importance": "activation", "max_steps": 8, "sparsity": 0.6, "mask_updates": 3, "save_strategy": "steps",
           "save_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}  # fmt: skip
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    straight = make_trainer(bert(**dropout), tmp_path / "straight", rows("classes", 20), **run)
    straight.train()
    torch.manual_seed(999)
    resumed = make_trainer(bert(**dropout), tmp_path / "on", rows("classes", 20), **{**run, "save_strategy": "no"})
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight/checkpoint-2"))
    assert_same(weights_of(straight.model), weights_of(resumed.model))
    assert_same(straight.pruner.masks.state_dict(), resumed.pruner.masks.state_dict())


def test_encoder_decoders_are_measured_on_both_sides() -> None:
    model = t5()
    found = input_rms(model, find_targets(model), [pad(rows("seq2seq", 3))])
    assert len(found) == len(find_targets(model)) and all(bool((value > 0).any()) for value in found.values())


def test_a_loop_of_the_user_that_measures_nothing_is_told_so(tmp_path: Path) -> None:
    model = bert()
    config = sparse_config(tmp_path, importance="activation", sparsity_schedule="one_shot", sparsity_end=0.0)
    with pytest.raises(ValueError, match="importance='activation' looks at a batch: pass measure to begin_step"):
        Pruner(model, config).begin_step(plan_step(config, 0, 2))

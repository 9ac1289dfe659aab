"""Mistakes that were found by attacking the trainer, one test each."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

from hf_sparse import SparseDistillTrainer, graft
from hf_sparse.core.targets import find_targets
from hf_sparse.training.distillation.graft import graft_sites
from hf_sparse.training.pruning.pruner import Pruner
from hf_sparse.training.support import predicts_next
from tests.training.tiny import bert, llama, make_trainer, rows, sparse_config, weights_of


def gpt2() -> tf.GPT2LMHeadModel:
    torch.manual_seed(0)
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16))


def test_older_causal_models_predict_the_next_token() -> None:
    assert predicts_next(gpt2()) and predicts_next(llama())
    assert not predicts_next(bert())


def test_grafting_refuses_another_attention_implementation() -> None:
    student, teacher = llama(), copy.deepcopy(llama())
    student.set_attn_implementation("sdpa")
    teacher.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="student uses 'sdpa', the teacher 'eager'"), graft(student, teacher, [False]):
        pass


def test_a_given_teacher_takes_over_the_attention_of_the_student(tmp_path: Path) -> None:
    student, teacher = llama(seed=0), llama(seed=1)
    student.set_attn_implementation("sdpa")
    teacher.set_attn_implementation("eager")
    trainer = make_trainer(student, tmp_path, rows("lm", 8), teacher=teacher, graft_start=0.1)
    assert trainer.teacher_model.config._attn_implementation == "sdpa"
    assert graft_sites(student, trainer.teacher_model)


def test_the_card_tells_the_format_of_the_file(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path / "run", rows("classes", 8), sparsity=0.8)
    trainer.save_model(tmp_path / "early")
    assert json.loads((tmp_path / "early" / "hf_sparse_card.json").read_text())["save_format"] == "dense"
    assert "quantization_config" not in json.loads((tmp_path / "early" / "config.json").read_text())


def test_resuming_a_finished_run_takes_no_further_step(tmp_path: Path) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    first = make_trainer(bert(), tmp_path, rows("classes", 13), sparsity=0.5, **settings)
    first.train()
    again = make_trainer(bert(), tmp_path, rows("classes", 13), sparsity=0.5, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    for name, weight in weights_of(first.model).items():
        assert torch.equal(weight, weights_of(again.model)[name]), name


def test_linears_that_torch_reads_by_itself_are_no_targets() -> None:
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2)})
    with pytest.raises(ValueError, match="no linear layer that could be pruned inside encoder.layers"):
        find_targets(model)
    with pytest.raises(ValueError, match="encoder.layers.0.linear1, .* nn.TransformerEncoderLayer reads by itself"):
        find_targets(model, target_modules=r"encoder\..*linear.")


def test_frozen_targets_are_refused(tmp_path: Path) -> None:
    model = bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"6 target layer\(s\) are frozen .* bert.encoder.layer.0"):
        Pruner(model, sparse_config(tmp_path, sparsity=0.5))
    config = sparse_config(tmp_path, sparsity=0.5, exclude_modules=r".*layer\.0\..*")
    assert all(".layer.1." in name or ".layer.2." in name for name in Pruner(model, config).masks.targets)


def test_a_run_that_diverged_says_so(tmp_path: Path) -> None:
    trainer: SparseDistillTrainer = make_trainer(bert(), tmp_path, rows("classes", 8), sparsity=0.5)
    with torch.no_grad():
        trainer.model.bert.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="training diverged: bert.encoder.layer.0.output.dense holds NaN"):
        trainer.pruner.check_target()


def test_tags_given_for_the_card_are_in_it(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), sparsity=0.5, max_steps=2)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(tags=["pruned", "mine"], language="en")
    header = (tmp_path / "README.md").read_text().split("---")[1]
    assert "- mine" in header and header.count("- pruned") == 1

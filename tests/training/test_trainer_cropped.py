"""`save_format="cropped"`: the final save is dense and smaller where units died in every layer."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, ModernBertConfig, ModernBertForSequenceClassification

from hf_sparse import SparseDistillTrainer
from tests.training.tiny import SMALL, bert, make_trainer, pad, rows, sparse_config


def test_a_final_save_without_dead_units(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path / "run", rows("classes", 8), max_steps=4, sparsity=0.5, sparsity_end=0.5,
                           feed_forward="units", save_format="cropped")  # fmt: skip
    trainer.train()
    trainer.save_model(tmp_path / "final")
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert config["intermediate_size"] == 16 and "quantization_config" not in config
    given = {name: tensor for name, tensor in pad(rows("classes", 8, seed=9)).items() if name != "labels"}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final").eval()
    with torch.no_grad():
        expected = trainer.model.eval()(**given).logits
        torch.testing.assert_close(loaded(**given).logits, expected, rtol=1e-5, atol=1e-5)
    assert trainer.model.config.intermediate_size == 32
    assert json.loads((tmp_path / "final" / "hf_sparse_card.json").read_text())["save_format"] == "dense"


def test_nothing_to_crop_is_said_and_saved_dense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(bert(), tmp_path / "run", rows("classes", 8), max_steps=2, sparsity=0.2,
                           importance="magnitude", save_format="cropped")  # fmt: skip
    trainer.train()
    with caplog.at_level(logging.WARNING, "hf_sparse"):
        trainer.save_model(tmp_path / "final")
    assert "nothing to remove" in caplog.text
    assert json.loads((tmp_path / "final" / "config.json").read_text())["intermediate_size"] == 32


def test_a_model_that_cannot_be_cropped_is_refused_before_training(tmp_path: Path) -> None:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    model = ModernBertForSequenceClassification(ModernBertConfig(vocab_size=40, **SMALL, **ids))
    with pytest.raises(ValueError, match="ModernBertForSequenceClassification has no layer of a class that can be"):
        SparseDistillTrainer(model, sparse_config(tmp_path, save_format="cropped"))

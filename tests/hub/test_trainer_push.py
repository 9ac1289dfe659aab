"""The trainer's own pushes to the Hub on loopback: with pictures of the run, explained when they are refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_sparse import SparseDistillConfig, SparseDistillTrainer
from hf_sparse.hub.card import render_card
from hf_sparse.hub.facts import FACTS_FILE, CardFacts
from hf_sparse.hub.push import PushError
from tests.hub.conftest import pruned_bert
from tests.hub.loopback_hub import READ_TOKEN, WRITE_TOKEN, LoopbackHub

REPO = "tester/pruned"
ROWS = [{"input_ids": [1, 2, 3, i % 40], "labels": i % 3} for i in range(16)]


def trainer(folder: Path, token: str, **given: object) -> SparseDistillTrainer:
    settings = {"max_steps": 4, "logging_steps": 1, "save_steps": 2, "sparsity": 0.5, "kd_weight": 0.0, **given}
    config = SparseDistillConfig(output_dir=str(folder), use_cpu=True, push_to_hub=True, hub_model_id=REPO,
                                 hub_token=token, disable_tqdm=True, **settings)  # fmt: skip
    return SparseDistillTrainer(pruned_bert(seed=0)[0], config, train_dataset=ROWS)


def test_the_run_is_published_with_its_pictures(hub: LoopbackHub, tmp_path: Path) -> None:
    run = trainer(tmp_path / "out", WRITE_TOKEN)
    run.train()
    run.push_to_hub()
    files = hub.repos[REPO].files
    facts = CardFacts.from_dict(json.loads(files[FACTS_FILE]))
    assert [row["step"] for row in facts.history] == [1, 2, 3, 4]
    assert [row["sparsity"] for row in facts.history][-1] == 0.5
    assert [picture.file for picture in facts.pictures] == ["masks.png", "training.png"]
    assert files["training.png"] == (tmp_path / "out" / "training.png").read_bytes()
    assert files["README.md"].decode() == render_card(facts)
    assert hub.unhandled == []


def test_a_token_that_may_not_write_is_told_before_the_training(hub: LoopbackHub, tmp_path: Path) -> None:
    with pytest.raises(PushError, match=f"refused to take {REPO} .*the token may not write there"):
        trainer(tmp_path / "out", READ_TOKEN)


def test_a_push_that_fails_leaves_the_saved_model(hub: LoopbackHub, tmp_path: Path) -> None:
    run = trainer(tmp_path / "out", WRITE_TOKEN, hub_strategy="end")
    run.train()
    hub.fail("POST .*/commit/", 403, times=99)
    with pytest.raises(PushError, match="the token may not write there.* Local files are untouched"):
        run.push_to_hub()
    hub.faults.clear()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        tokens = torch.tensor([[1, 2, 3, 4]])
        torch.testing.assert_close(loaded(tokens).logits, run.model.eval()(tokens).logits)
    run.push_to_hub()
    assert "quantization_config" in json.loads(hub.repos[REPO].files["config.json"])

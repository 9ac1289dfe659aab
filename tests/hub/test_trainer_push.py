"""The trainer's own pushes to the Hub on loopback: with pictures of the run, explained when they are refused."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from hf_sparse import SparseDistillConfig, SparseDistillTrainer, report
from hf_sparse.hub.card import render_card
from hf_sparse.hub.facts import FACTS_FILE, CardFacts
from hf_sparse.hub.push import PushError
from tests.hub.conftest import pruned_bert, save_tokenizer
from tests.hub.loopback_hub import READ_TOKEN, WRITE_TOKEN, LoopbackHub
from tests.training.tiny import Watch

REPO = "tester/pruned"
ROWS = [{"input_ids": [1, 2, 3, i % 40], "labels": i % 3} for i in range(16)]


def trainer(folder: Path, token: str, **given: object) -> SparseDistillTrainer:
    settings = {"max_steps": 4, "logging_steps": 1, "save_steps": 2, "sparsity": 0.5, "kd_weight": 0.0, **given}
    config = SparseDistillConfig(output_dir=str(folder), use_cpu=True, push_to_hub=True, hub_model_id=REPO,
                                 hub_token=token, disable_tqdm=True, **settings)  # fmt: skip
    evaluated = {"eval_dataset": ROWS[:6]} if "eval_strategy" in given else {}
    return SparseDistillTrainer(pruned_bert(seed=0)[0], config, train_dataset=ROWS, **evaluated)


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


def test_what_a_run_with_push_to_hub_leaves_on_the_hub(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    hub.lfs = True
    given = {"eval_strategy": "steps", "eval_steps": 2, "hub_strategy": "every_save", "hub_always_push": True}
    run = trainer(tmp_path / "out", WRITE_TOKEN, hub_private_repo=True, kd_weight=0.5, **given)
    save_tokenizer(tmp_path / "tokenizer")
    run.processing_class = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    run.compute_metrics = lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}
    # Pushes run beside the training; one that is not done when the next checkpoint is written may be left out.
    run.add_callback(Watch(on_save=lambda state: run.push_in_progress.wait_until_done()))
    run.train()
    metrics = run.evaluate()
    run.save_metrics("eval", metrics)
    run.push_to_hub(tasks="text-classification", dataset="Toy set")
    repo = hub.repos[REPO]
    assert repo.private
    assert [commit.message for commit in repo.branches["main"]][1:] == [
        "Training in progress, step 2", "Training in progress, step 4", "End of training",
    ]  # fmt: skip
    published = {"config.json", "model.safetensors", "tokenizer.json", "README.md", FACTS_FILE, "masks.png",
                 "training.png", "eval_results.json"}  # fmt: skip
    assert published <= set(repo.files)
    assert not [name for name in repo.files if "/" in name or name.endswith((".pt", ".pth"))]
    # The weights took the way of large files, and are the compressed ones.
    assert hashlib.sha256(repo.files["model.safetensors"]).hexdigest() in hub.blobs
    card = ModelCard(repo.files["README.md"].decode())
    result = card.data.eval_results[0]
    assert (result.metric_type, result.metric_value) == ("accuracy", metrics["eval_accuracy"])
    remote = {"cache_dir": tmp_path / "cache", "token": READ_TOKEN}
    loaded = AutoModelForSequenceClassification.from_pretrained(REPO, **remote).eval()
    assert report(loaded).sparsity == 0.5
    assert loaded.hf_quantizer is not None
    with torch.no_grad():
        tokens = torch.tensor([[1, 2, 3, 4]])
        torch.testing.assert_close(loaded(tokens).logits, run.model.eval()(tokens).logits)
    assert hub.unhandled == []


@pytest.mark.parametrize(
    ("pattern", "status"),
    [("POST .*/commit/", None), ("POST .*/commit/", 503), ("POST .*/preupload/", None), ("PUT /_lfs/", 500)],
)
def test_the_last_push_goes_on_after_a_dropped_connection(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, status: int | None
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.lfs = True
    hub.fail("POST /api/repos/create", status)
    run = trainer(tmp_path / "out", WRITE_TOKEN, hub_strategy="end")
    run.train()
    hub.fail(pattern, status, times=2)
    run.push_to_hub()
    assert [fault.times for fault in hub.faults] == [0, 0]
    assert hub.repos[REPO].files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()


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

"""Pushing: dense while training, compressed at the end, and each push a folder that loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer as upstream
from transformers import AutoModelForSequenceClassification

from tests.training.tiny import bert, make_trainer, pad, rows


class Hub:
    """Stands in for the Hub's client: keeps a copy of every folder that is uploaded."""

    def __init__(self, shelf: Path) -> None:
        self.shelf, self.pushes = shelf, []

    def create_repo(self, *args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(repo_id="me/tiny")

    def upload_folder(self, folder_path: str, commit_message: str, ignore_patterns: Any, **kwargs: Any) -> Any:
        copy = self.shelf / str(len(self.pushes))
        if Path(folder_path).name.startswith("checkpoint-"):
            return SimpleNamespace(done=lambda: True, result=lambda: None)
        shutil.copytree(folder_path, copy, ignore=shutil.ignore_patterns(*ignore_patterns))
        self.pushes.append((commit_message, copy))
        return SimpleNamespace(done=lambda: True, result=lambda: None)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr(upstream, "hf_api", lambda: fake)
    return fake


def compressed(folder: Path) -> bool:
    return "quantization_config" in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("save_format", ["compressed", "dense"])
def test_pushes_in_training_are_dense_and_the_last_one_is_final(tmp_path: Path, hub: Hub, save_format: str) -> None:
    trainer = make_trainer(
        bert(), tmp_path / "run", rows("classes", 8), sparsity=0.75, sparsity_end=1.0, max_steps=4, push_to_hub=True,
        hub_model_id="me/tiny", hub_strategy="every_save", hub_always_push=True, save_strategy="steps", save_steps=2,
        save_format=save_format,
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    messages = [message for message, _ in hub.pushes]
    assert messages == ["Training in progress, step 2", "Training in progress, step 4", "End of training"]
    folders = [folder for _, folder in hub.pushes]
    assert [compressed(folder) for folder in folders] == [False, False, save_format == "compressed"]
    with torch.no_grad():
        expected = trainer.model.eval()(**pad(rows("classes", 8))).logits
        for folder in folders:
            loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
            logits = loaded(**pad(rows("classes", 8))).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    names = {file.name for file in folders[-1].iterdir()}
    assert {"README.md", "config.json", "model.safetensors"} <= names
    assert not any(name.startswith((".saving-", "checkpoint-")) for name in names)
    card = (folders[-1] / "README.md").read_text()
    assert "hf_sparse" in card
    assert "0.75" in card or "75" in card


def test_save_model_pushes_when_asked_to(tmp_path: Path, hub: Hub) -> None:
    trainer = make_trainer(bert(), tmp_path / "run", rows("classes", 8), sparsity=0.5, max_steps=1, push_to_hub=True,
                           hub_model_id="me/tiny", hub_strategy="end")  # fmt: skip
    trainer.train()
    trainer.save_model()
    assert [message for message, _ in hub.pushes] == ["Model save"]
    assert compressed(hub.pushes[0][1])


def test_a_token_stays_out_of_the_card(tmp_path: Path, hub: Hub) -> None:
    trainer = make_trainer(bert(), tmp_path / "run", rows("classes", 8), sparsity=0.5, max_steps=1, push_to_hub=True,
                           hub_model_id="me/tiny", hub_token="hf_secretsecret")  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    for file in hub.pushes[-1][1].iterdir():
        if file.suffix in (".md", ".json"):
            assert "hf_secretsecret" not in file.read_text(), file.name

"""The push, by the unmodified client, to a real server on loopback."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_sparse import FormatError, SparseDistillConfig, SparseDistillTrainer
from hf_sparse.hub.card import render_card
from hf_sparse.hub.facts import FACTS_FILE, CardFacts
from hf_sparse.hub.push import PushError, push_folder
from tests.hub.conftest import pruned_bert
from tests.hub.loopback_hub import READ_TOKEN, WRITE_TOKEN, LoopbackHub

REPO = "tester/pruned"

LOAD = """
import sys, json, torch, hf_sparse
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
layer = model.bert.encoder.layer[0].output.dense
print(json.dumps([type(layer).__name__, model(torch.arange(6).reshape(2, 3)).logits.tolist()]))
"""


def push(hub: LoopbackHub, folder: Path, repo: str = REPO, token: str = WRITE_TOKEN, **kwargs: object) -> str:
    return push_folder(folder, repo, token=token, **kwargs)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def logits(source: object, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        model = AutoModelForSequenceClassification.from_pretrained(source, **kwargs)
        return model(torch.arange(6).reshape(2, 3)).logits


def test_push_uploads_everything_but_training_state_and_loads_by_repo_id(
    hub: LoopbackHub, model_folder: Path, tmp_path: Path
) -> None:
    before = digests(model_folder)
    assert push(hub, model_folder, message="first") == f"{hub.url}/{REPO}"
    files = hub.repos[REPO].files
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    assert all(hashlib.sha256(data).hexdigest() == before[path] for path, data in files.items())
    assert hub.repos[REPO].branches["main"][-1].message == "first"
    assert digests(model_folder) == before
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": READ_TOKEN}
    env.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([sys.executable, "-c", LOAD, REPO], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, loaded = json.loads(done.stdout)
    assert name == "BlockSparseLinear"
    assert torch.equal(torch.tensor(loaded), logits(model_folder))
    assert hub.unhandled == []


def test_the_trainer_pushes_model_card_and_facts(hub: LoopbackHub, tmp_path: Path) -> None:
    model, _ = pruned_bert(seed=0)
    rows = [{"input_ids": [1, 2, 3, i % 40], "labels": i % 3} for i in range(16)]
    config = SparseDistillConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=4, save_steps=2, sparsity=0.5, kd_weight=0.0,
        push_to_hub=True, hub_model_id=REPO, hub_token=WRITE_TOKEN, disable_tqdm=True,
    )  # fmt: skip
    trainer = SparseDistillTrainer(model, config, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub(license="mit")
    files = hub.repos[REPO].files
    assert {"config.json", "model.safetensors", "README.md", FACTS_FILE} <= set(files)
    facts = CardFacts.from_dict(json.loads(files[FACTS_FILE]))
    assert files["README.md"].decode() == render_card(facts)
    assert (facts.repo_id, facts.license, facts.sparsity_reached) == (REPO, "mit", 0.5)
    assert facts.file_bytes == len(files["model.safetensors"])
    assert WRITE_TOKEN not in files["README.md"].decode() + files[FACTS_FILE].decode()
    assert hub.unhandled == []


def test_push_private(hub: LoopbackHub, model_folder: Path) -> None:
    push(hub, model_folder, private=True)
    assert hub.repos[REPO].private
    push(hub, model_folder, private=True)
    push(hub, model_folder, "tester/open")
    assert not hub.repos["tester/open"].private


def test_push_refuses_to_publish_what_was_meant_to_be_private(hub: LoopbackHub, model_folder: Path) -> None:
    push(hub, model_folder)
    commits = len(hub.repos[REPO].branches["main"])
    with pytest.raises(ValueError, match="tester/pruned exists and is public"):
        push(hub, model_folder, private=True)
    assert len(hub.repos[REPO].branches["main"]) == commits


def test_push_to_a_branch_leaves_main_alone(hub: LoopbackHub, model_folder: Path) -> None:
    url = push(hub, model_folder, revision="v2")
    assert url == f"{hub.url}/{REPO}/tree/v2"
    assert hub.repos[REPO].files == {}
    assert "model.safetensors" in hub.repos[REPO].branches["v2"][-1].files


def test_push_as_pull_request(hub: LoopbackHub, model_folder: Path) -> None:
    with pytest.raises(PushError, match="no such repository"):
        push(hub, model_folder, create_pr=True)
    push(hub, model_folder)
    (model_folder / "README.md").write_text("# a better card\n")
    url = push(hub, model_folder, create_pr=True, message="Better card")
    assert url == f"{hub.url}/{REPO}/discussions/1"
    assert hub.repos[REPO].pull_requests == ["Better card"]
    assert hub.repos[REPO].files["README.md"] == b"# a card\n"
    assert hub.repos[REPO].branches["refs/pr/1"][-1].files["README.md"] == b"# a better card\n"


def test_older_revision_stays_loadable_and_stale_weights_go(
    hub: LoopbackHub, model_folder: Path, tmp_path: Path
) -> None:
    push(hub, model_folder)
    first = hub.repos[REPO].branches["main"][-1].oid
    expected = logits(model_folder)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder)
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    (model_folder / "model.safetensors").unlink()
    model.save_pretrained(model_folder, max_shard_size="8KB")
    push(hub, model_folder)
    names = [path for path in hub.repos[REPO].files if path.endswith(".safetensors")]
    assert len(names) > 1
    assert "model.safetensors" not in names
    remote = {"cache_dir": tmp_path / "cache", "token": READ_TOKEN}
    assert torch.equal(logits(REPO, revision=first, **remote), expected)
    torch.testing.assert_close(logits(REPO, **remote), expected + 1.0)


def test_push_through_lfs(hub: LoopbackHub, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    hub.lfs = True
    push(hub, model_folder)
    weights = (model_folder / "model.safetensors").read_bytes()
    assert hub.repos[REPO].files["model.safetensors"] == weights
    assert list(hub.blobs.values()) == [weights]


def test_push_survives_a_server_that_stumbles(hub: LoopbackHub, model_folder: Path) -> None:
    push(hub, model_folder)
    (model_folder / "README.md").write_text("# a second card\n")
    hub.fail("POST .*/commit/", status=503)
    push(hub, model_folder)
    assert hub.repos[REPO].files["README.md"] == b"# a second card\n"


@pytest.mark.parametrize(
    ("pattern", "status", "message"),
    [
        ("POST /api/repos/create", 500, "the Hub has trouble"),
        ("POST /api/repos/create", 429, "too many requests"),
        ("POST .*/commit/", 413, "too large"),
        ("POST .*/commit/", 400, "the request was refused"),
        ("POST /api/repos/create", None, "could not be reached, or the connection broke"),
    ],
)
def test_push_failures_are_explained_and_lose_nothing(
    hub: LoopbackHub, model_folder: Path, pattern: str, status: int | None, message: str
) -> None:
    before = digests(model_folder)
    hub.fail(pattern, status, times=99)
    with pytest.raises(PushError, match=message) as caught:
        push(hub, model_folder)
    assert "Local files are untouched" in str(caught.value)
    assert digests(model_folder) == before
    hub.faults.clear()
    push(hub, model_folder)
    assert set(hub.repos[REPO].files) == {"README.md", "config.json", "model.safetensors"}


def test_push_with_a_token_that_may_not_write(hub: LoopbackHub, model_folder: Path) -> None:
    with pytest.raises(PushError, match="may not write there"):
        push(hub, model_folder, token=READ_TOKEN)
    push(hub, model_folder)
    with pytest.raises(PushError, match="may not write there"):
        push(hub, model_folder, revision="v2", token=READ_TOKEN)
    with pytest.raises(PushError, match="may not write there"):
        push(hub, model_folder, "somebody-else/pruned")


def test_push_with_an_unknown_token(hub: LoopbackHub, model_folder: Path) -> None:
    with pytest.raises(PushError, match="token is not valid there"):
        push(hub, model_folder, token="hf_nobody")
    assert hub.repos == {}


def test_push_without_a_token(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sparse.hub.push.get_token", lambda: None)
    with pytest.raises(ValueError, match="There is no access token"):
        push_folder(model_folder, REPO)


def test_push_where_nobody_listens(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        with pytest.raises(PushError, match=f"{endpoint} could not be reached"):
            push_folder(model_folder, REPO, token=WRITE_TOKEN)


@pytest.mark.parametrize("kwargs", [{"revision": "v2"}, {"repo": "bare"}])
def test_pull_request_needs_main_and_a_full_name(hub: LoopbackHub, model_folder: Path, kwargs: dict) -> None:
    with pytest.raises(ValueError, match="create_pr opens a pull request against the main branch"):
        push(hub, model_folder, create_pr=True, **kwargs)


def test_push_refuses_a_folder_that_is_no_model(hub: LoopbackHub, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        push(hub, tmp_path)
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        push(hub, model_folder)
    assert hub.requests == []

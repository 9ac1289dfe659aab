"""The push, by the unmodified client, to a real server on loopback."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, pipeline

from hf_sparse import FormatError, SparseDistillConfig, SparseDistillTrainer
from hf_sparse.hub.card import render_card, write_card
from hf_sparse.hub.facts import FACTS_FILE, CardFacts
from hf_sparse.hub.push import PushError, explained, push_folder
from tests.hub.conftest import pruned_bert, save_tokenizer
from tests.hub.loopback_hub import READ_TOKEN, WRITE_TOKEN, LoopbackHub
from tests.hub.test_facts import FULL

REPO = "tester/pruned"

LOAD = """
import sys, json, torch, hf_sparse
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, pipeline
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
layer = model.bert.encoder.layer[0].output.dense
with torch.no_grad():
    print(json.dumps([type(layer).__name__, model(torch.arange(6).reshape(2, 3)).logits.tolist()]))
"""

CLASSIFY = """
import sys, json, hf_sparse
from transformers import pipeline
told = []
for revision in (sys.argv[2], None):
    classify = pipeline("text-classification", model=sys.argv[1], revision=revision)
    layer = classify.model.bert.encoder.layer[0].output.dense
    told.append([type(layer).__name__, classify("w3 w5 w7")[0]["score"]])
print(json.dumps(told))
"""


def in_fresh_process(hub: LoopbackHub, home: Path, code: str, *arguments: str) -> list:
    """What a program prints that knows nothing of this one, with an empty cache of its own."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": READ_TOKEN}
    env.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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
    name, loaded = in_fresh_process(hub, tmp_path / "home", LOAD, REPO)
    assert name == "BlockSparseLinear"
    assert torch.equal(torch.tensor(loaded), logits(model_folder))
    assert hub.unhandled == []


def test_pipeline_by_repo_id_in_a_fresh_process_and_an_older_revision(
    hub: LoopbackHub, model_folder: Path, tmp_path: Path
) -> None:
    save_tokenizer(model_folder)
    push(hub, model_folder)
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(hub.repos[REPO].files)
    first = hub.repos[REPO].branches["main"][-1].oid
    expected = pipeline("text-classification", model=str(model_folder))("w3 w5 w7")[0]["score"]
    model = AutoModelForSequenceClassification.from_pretrained(model_folder)
    with torch.no_grad():
        model.classifier.bias.add_(torch.tensor([5.0, 0.0, 0.0]))
    model.save_pretrained(model_folder)
    push(hub, model_folder)
    old, new = in_fresh_process(hub, tmp_path / "home", CLASSIFY, REPO, first)
    assert old == ["BlockSparseLinear", pytest.approx(expected, abs=1e-6)]
    assert new[1] > 0.9 > old[1]
    assert hub.unhandled == []


def test_card_pictures_and_results_are_published(hub: LoopbackHub, model_folder: Path) -> None:
    write_card(model_folder, replace(FULL, repo_id=REPO))
    (model_folder / "eval_results.json").write_text('{"eval_accuracy": 0.9125}')
    push(hub, model_folder)
    files = hub.repos[REPO].files
    pictures = {"masks.png", "training.png", "tradeoff.png"}
    assert set(files) == {
        "README.md", "config.json", "model.safetensors", FACTS_FILE, "eval_results.json", *pictures,
    }  # fmt: skip
    for name in pictures:
        assert files[name] == (model_folder / name).read_bytes()
        assert f"]({name})" in files["README.md"].decode()
    card = ModelCard(files["README.md"].decode())
    assert [(x.metric_type, x.metric_value) for x in card.data.eval_results] == [("accuracy", 0.9125), ("f1", 0.5)]
    assert card.data.base_model == "tester/tiny"


def test_the_loopback_hub_refuses_a_card_that_the_hub_would_refuse(hub: LoopbackHub, model_folder: Path) -> None:
    (model_folder / "README.md").write_text("---\nmodel-index:\n- name: x\n  results:\n  - task: {}\n---\n")
    with pytest.raises((PushError, ValueError), match=r"model-index\[0\]\.results\[0\]"):
        push(hub, model_folder)


def test_push_to_hub_of_a_model_in_memory(hub: LoopbackHub, model_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(model_folder)
    model.push_to_hub(REPO, token=WRITE_TOKEN, private=True)
    assert hub.repos[REPO].private
    stored = hub.repos[REPO].files["model.safetensors"]
    assert len(stored) == (model_folder / "model.safetensors").stat().st_size
    remote = {"cache_dir": tmp_path / "cache", "token": READ_TOKEN}
    assert torch.equal(logits(REPO, **remote), logits(model_folder))
    # A card that was published before stays.
    write_card(model_folder, FULL)
    push(hub, model_folder)
    model.push_to_hub(REPO, token=WRITE_TOKEN)
    assert hub.repos[REPO].files["README.md"] == (model_folder / "README.md").read_bytes()


def test_push_to_hub_of_a_model_to_a_branch_and_as_a_pull_request(
    hub: LoopbackHub, model_folder: Path, tmp_path: Path
) -> None:
    push(hub, model_folder)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder)
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    model.push_to_hub(REPO, token=WRITE_TOKEN, revision="v2")
    model.push_to_hub(REPO, token=READ_TOKEN, create_pr=True, commit_message="Better head")
    remote = {"cache_dir": tmp_path / "cache", "token": READ_TOKEN}
    assert torch.equal(logits(REPO, **remote), logits(model_folder))
    for revision in ("v2", "refs/pr/1"):
        assert len(hub.repos[REPO].branches[revision][-1].files["model.safetensors"]) < 20_000
        torch.testing.assert_close(logits(REPO, revision=revision, **remote), logits(model_folder) + 1.0)
    assert hub.repos[REPO].pull_requests == ["Better head"]


def test_the_trainer_pushes_model_card_and_facts(hub: LoopbackHub, tmp_path: Path) -> None:
    model, _ = pruned_bert(seed=0)
    rows = [{"input_ids": [1, 2, 3, i % 40], "labels": i % 3} for i in range(16)]
    config = SparseDistillConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=4, save_steps=2, sparsity=0.5, kd_weight=0.0,
        push_to_hub=True, hub_model_id=REPO, hub_token=WRITE_TOKEN, disable_tqdm=True,
    )  # fmt: skip
    trainer = SparseDistillTrainer(model, config, train_dataset=rows)
    trainer.train()
    # Where the example scripts keep the model that they began with.
    (tmp_path / "out" / "_dense").mkdir()
    (tmp_path / "out" / "_dense" / "model.safetensors").write_bytes(b"dense")
    trainer.push_to_hub(license="mit")
    files = hub.repos[REPO].files
    assert not [name for name in files if "dense" in name]
    assert {"config.json", "model.safetensors", "README.md", FACTS_FILE, "masks.png"} <= set(files)
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


@pytest.mark.parametrize("status", [None, 500, 429])
@pytest.mark.parametrize(
    "pattern", ["POST /api/repos/create", "POST .*/branch/", "GET .*/tree/", "POST .*/preupload/", "POST .*/commit/"]
)
def test_push_goes_on_after_a_dropped_connection(
    hub: LoopbackHub, model_folder: Path, pattern: str, status: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fail(pattern, status)
    assert push(hub, model_folder, revision="v2") == f"{hub.url}/{REPO}/tree/v2"
    assert hub.faults[0].times == 0
    assert set(hub.repos[REPO].branches["v2"][-1].files) == {"README.md", "config.json", "model.safetensors"}


def test_push_goes_on_in_the_middle_of_a_large_file(
    hub: LoopbackHub, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.lfs = True
    hub.fail("POST .*/objects/batch", None)
    hub.fail("PUT /_lfs/", None)
    push(hub, model_folder)
    assert [fault.times for fault in hub.faults] == [0, 0]
    assert hub.repos[REPO].files["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()


def test_a_large_file_that_is_refused_is_not_sent_again_and_again(
    hub: LoopbackHub, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    hub.lfs = True
    hub.fail("PUT /_lfs/", 403, times=99)
    with pytest.raises(PushError, match="the token may not write there"):
        push(hub, model_folder)
    assert sum(line.startswith("PUT /_lfs/") for line in hub.requests) == 1


def test_an_error_of_this_machine_is_not_blamed_on_the_hub() -> None:
    with pytest.raises(PermissionError, match="a local file"), explained(REPO):
        raise PermissionError("a local file")
    with pytest.raises(PushError, match="could not be reached, or the connection broke"), explained(REPO):
        raise ConnectionResetError("reset by peer")


def test_push_waits_for_slow_answers(hub: LoopbackHub, model_folder: Path) -> None:
    hub.delay("POST .*/commit/", seconds=1.5)
    hub.delay("POST .*/preupload/", seconds=0.5)
    push(hub, model_folder)
    assert [fault.times for fault in hub.faults] == [0, 0]
    assert sum("/commit/" in line for line in hub.requests) == 1


def test_a_pull_request_is_opened_once_however_often_the_upload_breaks(
    hub: LoopbackHub, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    push(hub, model_folder)
    (model_folder / "README.md").write_text("# a better card\n")
    hub.fail("POST .*/preupload/", None, times=2)
    hub.fail("POST .*/commit/", None, times=2)
    assert push(hub, model_folder, create_pr=True) == f"{hub.url}/{REPO}/discussions/1"
    assert len(hub.repos[REPO].pull_requests) == 1
    assert hub.repos[REPO].branches["refs/pr/1"][-1].files["README.md"] == b"# a better card\n"


def test_push_says_in_the_log_that_it_tries_again(
    hub: LoopbackHub, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail("POST /api/repos/create", 502)
    with caplog.at_level("WARNING"):
        push(hub, model_folder)
    assert "trying again in 0 seconds" in caplog.text


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
    monkeypatch.setattr("hf_sparse.hub.push.WAITS", (0.0,))
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

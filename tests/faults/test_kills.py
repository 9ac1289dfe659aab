"""kill -9 at random moments, in the middle of saves too: what is resumed ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_sparse.training.checkpoints.whole import MANIFEST, last_whole_checkpoint, what_is_missing
from tests import forking
from tests.faults import child
from tests.training.tiny import assert_same, bert, pad, rows

KILLS = 30


def run_child(folder: Path, kill_at: tuple[Path, int] | None = None, kill_after: float | None = None) -> bool:
    """Run a child, to be killed at a change below a path or after some seconds; tell whether it was killed."""
    begun = forking.server().Event()
    process = forking.start(folder / "log", child.train, folder, kill_at, begun)
    if kill_after is not None:
        while process.is_alive() and not begun.wait(0.01):
            pass
        time.sleep(kill_after)
        process.kill()
    process.join(120)
    ended = process.exitcode
    process.kill()
    process.join()
    assert ended in (0, -9), (folder / "log").read_text()[-3000:]
    return ended == -9


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stops, all its checkpoints kept."""
    folder = tmp_path_factory.mktemp("straight")
    limit, child.RUN["save_total_limit"] = child.RUN["save_total_limit"], None
    try:
        child.train(folder, None, threading.Event())
    finally:
        child.RUN["save_total_limit"] = limit
    return folder


def check_folder(folder: Path, straight: Path) -> int:
    """Assert that checkpoints are equal to those of the other run or known to be broken; count the broken ones."""
    broken = 0
    for checkpoint in folder.glob("run/checkpoint-*"):
        if what_is_missing(checkpoint) is not None:
            broken += 1
            continue
        whole = straight / "run" / checkpoint.name
        assert {f.name for f in checkpoint.iterdir()} == {f.name for f in whole.iterdir()}
        assert_same(load_file(checkpoint / "model.safetensors"), load_file(whole / "model.safetensors"))
        state = "sparsity_state.safetensors"
        assert_same(load_file(checkpoint / state), load_file(whole / state))
        mine, theirs = (
            torch.load(place / "optimizer.pt", weights_only=True)["state"] for place in (checkpoint, whole)
        )
        for index, entry in theirs.items():
            assert_same(dict(entry), dict(mine[index]))
    return broken


def check_final(folder: Path) -> None:
    """Assert that a final save is whole: it loads, and computes what the trained weights compute."""
    inputs, fresh = pad(rows("classes", 8)), bert().eval()
    fresh.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    loaded = type(fresh).from_pretrained(folder / "final").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, fresh(**inputs).logits, rtol=1e-5, atol=1e-6)


def test_thirty_kills_and_the_final_weights_are_those_of_a_run_without(straight: Path, tmp_path: Path) -> None:
    expected = torch.load(straight / "weights.pt", weights_only=True)
    choose, kills, broken, runs = random.Random(5), Counter[str](), 0, 0

    def enough() -> bool:
        """Whether kills were enough, of every kind: how many a run meets before its end depends on the machine."""
        return kills.total() >= KILLS and kills["run"] >= 5 and kills["final"] >= 3 and broken >= 5

    while not enough():
        assert kills.total() < 4 * KILLS, f"{kills}, {broken} checkpoints broken"
        folder = tmp_path / str(runs)
        (folder / "run").mkdir(parents=True)
        killed_here = 0
        while True:
            # At a change to a file of a checkpoint (ten changes each) or of the final model (38), or at any time.
            kind, count = choose.choice(["run", "final", "time"]), choose.randint(1, 38)
            let_go = killed_here == 8 or enough()
            killed = run_child(
                folder,
                kill_at=(folder / kind, count) if kind != "time" and not let_go else None,
                kill_after=choose.uniform(0.0, 0.5) if kind == "time" and not let_go else None,
            )
            broken += check_folder(folder, straight)
            if not killed:
                break
            kills[kind] += 1
            killed_here += 1
        runs += 1
        assert_same(expected, torch.load(folder / "weights.pt", weights_only=True))
        check_final(folder)
        assert last_whole_checkpoint(folder / "run").name == "checkpoint-8"
        assert not list((folder / "final").glob(".saving-*")) and not list((folder / "final").glob(".saved-*"))


@pytest.fixture
def two_checkpoints(tmp_path: Path) -> Path:
    trainer = child.trainer_in(tmp_path, max_steps=2, sparsity_end=0.4)
    trainer.train()
    return tmp_path


def test_a_checkpoint_with_any_file_missing_or_cut_off_is_not_whole(two_checkpoints: Path) -> None:
    checkpoint = two_checkpoints / "checkpoint-2"
    names = list(json.loads((checkpoint / MANIFEST).read_text())["files"])
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
            "sparsity_state.safetensors", "training_args.bin", "config.json"} <= set(names)  # fmt: skip
    assert what_is_missing(checkpoint) is None
    for name in [*names, MANIFEST]:
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).unlink()
        assert name in str(what_is_missing(checkpoint))
        (checkpoint / name).write_bytes(whole[:-1])
        assert name in str(what_is_missing(checkpoint))
        (checkpoint / name).write_bytes(whole)
    assert what_is_missing(checkpoint) is None


def test_an_incomplete_checkpoint_is_skipped_aloud_or_refused_with_the_whole_one(
    two_checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (two_checkpoints / "checkpoint-2" / MANIFEST).unlink()
    trainer = child.trainer_in(two_checkpoints, max_steps=2, sparsity_end=0.4)
    with pytest.raises(ValueError, match=r"checkpoint-2 holds no checkpoint_complete\.json.*Resume from .*tion-1|-1"):
        trainer.train(resume_from_checkpoint=str(two_checkpoints / "checkpoint-2"))
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=True)
    assert "Skipped a checkpoint whose save was interrupted" in caplog.text and "checkpoint-2 holds no" in caplog.text
    assert what_is_missing(two_checkpoints / "checkpoint-2") is None, "it has been written anew"


def test_nothing_to_resume_from_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no whole checkpoint to resume from"):
        child.trainer_in(tmp_path).train(resume_from_checkpoint=True)


def test_older_checkpoints_go_only_when_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_sparse.training.checkpoints import resuming

    seen: list[tuple[list[str], list[str]]] = []
    original = resuming.mark_whole

    def mark(folder: Path, *args: Any) -> None:
        before = sorted(path.name for path in folder.parent.glob("checkpoint-*"))
        original(folder, *args)
        seen.append((before, sorted(path.name for path in folder.parent.glob("checkpoint-*"))))

    monkeypatch.setattr(resuming, "mark_whole", mark)
    trainer = child.trainer_in(tmp_path, save_total_limit=1)
    trainer.train()
    assert seen[3] == (["checkpoint-3", "checkpoint-4"], ["checkpoint-3", "checkpoint-4"])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]
    saved = torch.load(tmp_path / "checkpoint-8" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == trainer.args.save_total_limit == 1

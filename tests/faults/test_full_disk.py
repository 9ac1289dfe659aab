"""A disk that runs full: a clear error, the last good checkpoint left, and the run goes on once there is room."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_sparse.training.checkpoints.whole import last_whole_checkpoint, what_is_missing
from tests.faults import child
from tests.training.tiny import assert_same, weights_of

ROOT = Path(__file__).resolve().parents[2]
MESSAGE = r"checkpoint-3 could not be written: .*MiB were free there.*The last whole checkpoint is .*checkpoint-2"

# In a name space of its own a user may mount a small disk; in there the run fills it.
ON_A_SMALL_DISK = """
import shutil
import sys
from pathlib import Path
from tests.faults import child
from tests.training.scenarios import begin_process
from hf_sparse.training.checkpoints.whole import last_whole_checkpoint, what_is_missing
begin_process()
folder = Path(sys.argv[1])
try:
    child.trainer_in(folder, save_total_limit=None).train()
except OSError as error:
    print("ERROR", error)
whole = last_whole_checkpoint(folder)
print("LEFT", sorted(path.name for path in folder.glob("checkpoint-*")), whole.name, what_is_missing(whole))
for path in folder.glob("checkpoint-*"):
    if path != whole:
        shutil.rmtree(path)
child.trainer_in(folder, save_total_limit=1).train(resume_from_checkpoint=True)
print("DONE", last_whole_checkpoint(folder).name)
"""


@pytest.fixture
def no_large_files() -> Iterator[Any]:
    """Gives a function that forbids files of more bytes than it is told; undone afterwards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(
    tmp_path: Path, no_large_files: Any, file: str
) -> None:
    trainer = child.trainer_in(tmp_path / "run")

    def no_room(state: Any) -> None:
        if state.global_step == 3:
            # Not even the first file fits, or all but the largest.
            size = (tmp_path / "run" / "checkpoint-2" / "model.safetensors").stat().st_size
            no_large_files(size + 1000 if file == "optimizer.pt" else size // 2)

    trainer.add_callback(child.Watch(on_step_end=no_room))
    with pytest.raises(OSError, match=MESSAGE):
        trainer.train()
    no_large_files(resource.RLIM_INFINITY)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-1", "checkpoint-2"}
    assert what_is_missing(tmp_path / "run" / "checkpoint-2") is None
    straight = child.trainer_in(tmp_path / "straight", save_strategy="no")
    straight.train()
    resumed = child.trainer_in(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights_of(straight.model), weights_of(resumed.model))


def test_a_final_save_that_cannot_be_written_leaves_the_last_one(tmp_path: Path, no_large_files: Any) -> None:
    trainer = child.trainer_in(tmp_path / "run", save_strategy="no")
    trainer.train()
    trainer.save_model(tmp_path / "final")
    before = {path.name: path.read_bytes() for path in (tmp_path / "final").iterdir()}
    no_large_files(4000)
    with torch.no_grad():
        trainer.model.classifier.weight.add_(1.0)
    with pytest.raises(Exception, match=r"(?i)file too large|no space"):
        trainer.save_model(tmp_path / "final")
    no_large_files(resource.RLIM_INFINITY)
    assert {path.name: path.read_bytes() for path in (tmp_path / "final").iterdir()} == before


def can_mount() -> bool:
    tool = shutil.which("unshare")
    tried = tool and subprocess.run([tool, "-rm", "mount", "-t", "tmpfs", "t", tempfile.gettempdir()], check=False,
                                    capture_output=True)  # fmt: skip
    return bool(tried) and tried.returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs a user name space in which a tmpfs can be mounted")
def test_a_real_disk_that_is_full(tmp_path: Path) -> None:
    # Room for a few checkpoints of some 200 KB.
    disk, script = tmp_path / "disk", tmp_path / "run.py"
    disk.mkdir()
    script.write_text(ON_A_SMALL_DISK)
    command = f"mount -t tmpfs -o size=700k t {disk} && exec {sys.executable} {script} {disk}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], env=environment, capture_output=True, text=True,
                          timeout=200, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    error, left, end = (re.search(rf"^{word} (.*)$", done.stdout, re.M) for word in ("ERROR", "LEFT", "DONE"))
    assert error and re.search(r"checkpoint-\d could not be written: .*The last whole checkpoint is .*-\d", error[1])
    assert left and left[1].endswith("None") and len(left[1].split("checkpoint-")) >= 3
    assert end and end[1] == "checkpoint-8"


def test_the_last_whole_checkpoint_is_found_by_number(tmp_path: Path) -> None:
    trainer = child.trainer_in(tmp_path, max_steps=10, save_total_limit=None)
    trainer.train()
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-10"

"""20,000 damaged inputs: each loads exactly right or gives a clear error, and nothing else happens.

HF_SPARSE_FUZZ=10 runs ten times as many; `python -m tests.fuzz` runs one kind, or one case again.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forking
from tests.fuzz.__main__ import sweep_into

FACTOR = int(os.environ.get("HF_SPARSE_FUZZ", "1"))
# Kind, seed, inputs: processes of about the same length. A sweep that breaks nothing or everything tests nothing, so
# each kind says which shares of its inputs have to be refused and to load.
SWEEPS = (
    ("weights", 0, 3700), ("weights", 1, 3700), ("config", 0, 5000), ("card", 0, 3500), ("index", 0, 2500),
    ("mixture weights", 0, 800), ("mixture config", 0, 800),
)  # fmt: skip
REFUSED = {"weights": 0.5, "config": 0.5, "mixture weights": 0.5, "mixture config": 0.5, "index": 0.4, "card": 0.4}
LOADED = {"weights": 0.1, "config": 0.08, "mixture weights": 0.1, "mixture config": 0.08, "index": 0.1, "card": 0.08}


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is such a thing: a disk would be written to a hundred thousand times."""
    shared = Path("/dev/shm")
    if not (shared.is_dir() and os.access(shared, os.W_OK)):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="hf_sparse-fuzz-", dir=shared))
    yield folder
    shutil.rmtree(folder)


def test_the_sweeps_add_up() -> None:
    assert sum(count for _, _, count in SWEEPS) >= 20_000


@pytest.mark.parametrize(("kind", "seed", "count"), SWEEPS)
def test_sweep(memory_folder: Path, kind: str, seed: int, count: int) -> None:
    count *= FACTOR
    # A process of its own, so that a crash, a hang or a huge allocation is a result and not the end of the test run.
    process = forking.start(memory_folder / "log", sweep_into, kind, memory_folder, count, seed)
    process.join(900 * FACTOR)
    process.kill()
    process.join()
    said = (memory_folder / "log").read_text()
    number = (memory_folder / "case").read_text().strip() if (memory_folder / "case").exists() else "none"
    # Below 0: a crash, or the alarm of a case that hangs.
    assert process.exitcode == 0, f"ended by {process.exitcode} in case {number}: {said[-3000:]}"
    result = json.loads((memory_folder / "result.json").read_text())
    assert result["wrong"] == 0, said[:6000]
    answers = result["answers"]
    assert sum(answers.values()) == count
    loaded = answers.pop("loaded")
    assert loaded > LOADED[kind] * count
    assert sum(answers.values()) > REFUSED[kind] * count
    assert result["watched"] > count
    # Files of 60 kB; the rest is what Python keeps after so many errors.
    assert result["grown"] < 64 * 2**20

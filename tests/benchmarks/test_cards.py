"""The cards in model_cards/ tell what benchmarks/cards.py gave to their runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cards import CARDS, RUNS, Run, rows_taken
from hf_sparse import SparseDistillConfig
from hf_sparse.hub.facts import FACTS_FILE, read_facts


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_card_tells_what_its_run_was_given(run: Run, tmp_path: Path) -> None:
    facts = read_facts(CARDS / run.name / FACTS_FILE)
    words, defaults = run.prune.split(), SparseDistillConfig(output_dir=str(tmp_path), use_cpu=True)
    for option, value in zip(words[::2], words[1::2], strict=True):
        name = option.removeprefix("--")
        told = facts.recipe.get(name, getattr(defaults, name))
        assert told == value or float(told) == float(value), name
    assert facts.data is not None
    assert facts.data.train_rows == rows_taken(run) == 10_000
    assert facts.data.note == "The first 10,000 rows."

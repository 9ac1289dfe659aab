"""README.md shows what benchmarks/results/ holds, to the letter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.tables import README, RESULTS, fill

RESULT = {
    "command": "make demo",
    "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
    "seconds": {"total": 90.0},
    "table": [{"what": "load", "dense": "2.0 ms", "pruned": "1.0 ms", "ratio": "2.00x faster"}],
    "notes": ["One seed."],
}
MARKED = "above\n<!-- table:demo -->\nold numbers\n<!-- /table:demo -->\nbelow\n"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "demo.json").write_text(json.dumps(RESULT))
    return tmp_path


def test_readme_is_up_to_date() -> None:
    text = README.read_text(encoding="utf-8")
    assert fill(text, RESULTS) == text, "run make tables"


def test_a_table_is_filled_between_its_markers(results: Path) -> None:
    text = fill(MARKED, results)
    assert text.startswith("above\n<!-- table:demo -->\n| | dense |") and text.endswith("below\n")
    assert "| load | 2.0 ms | 1.0 ms | 2.00x faster |" in text
    assert "- One seed.\n- `make demo`, python 3.11.7, torch 2.13.0, transformers 5.23.0; 1.5 minutes." in text
    assert "old numbers" not in text
    assert fill(text, results) == text


@pytest.mark.parametrize(
    "text",
    ["no marker", "<!-- table:demo -->\nno end", MARKED + "<!-- /table:demo2 -->", MARKED.replace("demo", "other")],
)
def test_wrong_markers_are_refused(results: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"tables known \['demo'\]"):
        fill(text, results)


def test_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"demo\.json is missing: run the benchmark"):
        fill(MARKED, tmp_path)

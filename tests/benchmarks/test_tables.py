"""README.md and docs/kernels.md show what benchmarks/results/ holds, to the letter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.tables import DOCUMENTS, RESULTS, fill

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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_documents_are_up_to_date(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert fill(text, RESULTS) == text, "run make tables"


def test_what_is_out_of_date_is_told_or_renewed(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.md", tmp_path / "new.md"
    old.write_text(MARKED)
    new.write_text(fill(MARKED, results))
    monkeypatch.setattr(tables, "DOCUMENTS", (old, new))
    monkeypatch.setattr(tables, "RESULTS", results)
    assert tables.main(["--check"]) == 1 and old.read_text() == MARKED
    assert capsys.readouterr().err == "old.md differs from benchmarks/results/: run make tables.\n"
    assert tables.main([]) == 0 and old.read_text() == new.read_text()
    assert tables.main(["--check"]) == 0


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
    with pytest.raises(ValueError, match=r"tables known \[.*'cpu', .*'demo'.*\]"):
        fill(text, results)


def test_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"demo\.json is missing: run the benchmark"):
        fill(MARKED, tmp_path)

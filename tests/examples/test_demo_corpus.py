"""The text of the demo: clean sentences, no leak between the splits, the same rows every time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from examples.demo.corpus import Corpus, build_corpus
from examples.demo.prose import letters, sentences

GOOD = "This sentence explains in plain English what the {} function number {} is good for."


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages that can be found but not imported, 80 files each, one sentence of their own per file."""
    words = "zero one two three four five six seven eight nine".split()
    for package in ("demo_left", "demo_right"):
        (tmp_path / package / "tests").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported')\n")
        for i in range(80):
            own = GOOD.format(package.removeprefix("demo_"), f"{words[i // 10]} {words[i % 10]}")
            shared = "Here is a sentence which both of these packages have in common."
            text = f'"""{own}"""\n\n\ndef f():\n    """{shared}"""\n'
            (tmp_path / package / f"module_{i}.py").write_text(text)
        (tmp_path / package / "tests" / "test_a.py").write_text(f'"""{GOOD.format("hidden", "test")}"""\n')
        for i in range(10):
            (tmp_path / package / f"newer_{i}.py").write_text("def :\n")
        info = tmp_path / f"{package}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def build(train_rows: int = 40, test_rows: int = 8) -> Corpus:
    return build_corpus(train_rows, test_rows, ("demo_left", "demo_right"))


def test_splits_share_no_file_and_no_sentence(packages: Path) -> None:
    splits = build().splits
    train, test = splits["train"], splits["test"]
    assert len(train) == 40 and len(test) == 8
    assert not set(train["file"]) & set(test["file"])
    keys = [letters(text) for split in (train, test) for text in split["text"]]
    assert len(set(keys)) == len(keys) == 48
    assert not any("in common" in text or "hidden" in text for text in [*train["text"], *test["text"]])


def test_every_prefix_is_balanced_and_labels_name_the_packages(packages: Path) -> None:
    train = build().splits["train"]
    assert list(train["label"]) == [0, 1] * 20
    assert train.features["label"].names == ["demo_left", "demo_right"]
    for text, label in zip(train["text"], train["label"], strict=True):
        assert f"the {('left', 'right')[label]} function" in text


def test_the_same_packages_give_the_same_corpus_and_another_text_another_hash(packages: Path) -> None:
    first, second = build(), build()
    assert first.facts == second.facts
    assert list(first.splits["test"]["text"]) == list(second.splits["test"]["text"])
    assert first.facts["versions"] == {"demo_left": "1.5", "demo_right": "1.5"}
    for path in (packages / "demo_left").glob("module_*.py"):
        path.write_text(path.read_text().replace("plain English", "simple English"))
    assert build().facts["sha256"] != first.facts["sha256"]


def test_files_that_this_python_cannot_parse_are_counted(packages: Path) -> None:
    facts = build().facts
    for package, refused in facts["files_refused"].items():
        assert 1 <= refused <= 10 and facts["files_read"][package] > refused


def test_too_little_text_is_refused_with_the_numbers(packages: Path) -> None:
    with pytest.raises(ValueError, match=r"demo_left 1\.5 has \d+ usable sentences for the train split, 500 are"):
        build(train_rows=1000)


def test_a_missing_package_is_named_with_the_way_out() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"docstrings of no_such_package, which is not installed in .*make"):
        build_corpus(10, 10, ("no_such_package",))


def test_the_real_packages_are_read_without_importing_them() -> None:
    before = set(sys.modules)
    corpus = build_corpus(40, 20)
    assert {len(corpus.splits[split]) for split in ("train", "test")} == {40, 20}
    assert not {name for name in set(sys.modules) - before if name.split(".")[0] in ("sympy", "networkx")}


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("One short line.", []),
        ("There is no full stop at the end of this line", []),
        ("Compute the value of `x_1` for all of the given numbers in order.", []),
        ("Compute `the` value for all of the given numbers in their order.",
         ["Compute the value for all of the given numbers in their order."]),
        ("See the documentation at https://example.org for more of what it can do.", []),
        (">>> print('Here is some code that reads like a sentence of eight words.')", []),
        ("- Here is an item of a list that reads like a sentence of eight words.", []),
        ("Unlike NumPy and pandas, PyTorch keeps the gradient of every operation it runs.",
         ["Unlike this package and this package, this package keeps the gradient of every operation it runs."]),
        ("Deciding this is known to be NP-complete for graphs of every other kind.",
         ["Deciding this is known to be NP-complete for graphs of every other kind."]),
        ("Solve the system of equations that was given before it.\n\nParameters\n----------\n"
         "a : array\n    The matrix of the system of equations that is to be solved.\n\nNotes\n-----\n"
         "The order of the equations does not change what is returned here.",
         ["Solve the system of equations that was given before it.",
          "The order of the equations does not change what is returned here."]),
        ("Solve the system of equations that was given before it.\n\nArgs:\n    a: The matrix of the system of "
         "equations that is to be solved.\n\nReturns:\n    The vector that solves the system of equations at hand.",
         ["Solve the system of equations that was given before it."]),
        ("The first sentence of the two ends here at last. The second\nsentence goes on over two of the lines.",
         ["The first sentence of the two ends here at last.",
          "The second sentence goes on over two of the lines."]),
    ],
)  # fmt: skip
def test_sentences(docstring: str, expected: list[str]) -> None:
    assert sentences(docstring) == expected


def test_letters_ignore_case_digits_and_punctuation() -> None:
    assert letters("Returns the 2-norm (L2).") == letters("returns the 1-norm, L1!")
    assert letters("Returns the norm.") != letters("Returns the form.")

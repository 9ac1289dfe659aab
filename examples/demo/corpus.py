"""Real text that is already on every machine: which package does this sentence of a docstring come from?

Sources are parsed, never imported. A file belongs wholly to the training or wholly to the test split. A sentence is
kept once, and not at all where two packages share it. The names of the packages are masked.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tqdm.auto import tqdm

from examples.demo.prose import letters, sentences

# All of them come with hf_sparse: two it requires itself, the others its requirements do.
PACKAGES = ("networkx", "pandas", "sympy", "transformers")
TEST_SHARE = 0.25
# Rows that another package turns out to share are dropped at the end, so some more are collected.
SPARE = 0.1, 10
# No file may speak for its package, least of all where the score is taken.
PER_FILE = {"train": 60, "test": 15}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A classification set and where it came from.

    Attributes:
        splits: "train" and "test", each balanced, with columns text (str), label (class index) and file (str, relative
            to site-packages).
        facts: versions of the packages, rows, files read, files the parser refused, SHA-256 of all rows.
    """

    splits: DatasetDict
    facts: dict[str, Any]


def build_corpus(train_rows: int, test_rows: int, packages: Sequence[str] = PACKAGES) -> Corpus:
    """Read docstrings until every package has given its share of both splits.

    The same versions of the packages give the same rows in the same order.

    Args:
        train_rows: rows of the training split, at least one per package; rounded down to a multiple of the packages.
        test_rows: the same for the test split.
        packages: names of installed packages; the labels, in this order.

    Raises:
        ModuleNotFoundError: if a package is not installed.
        ValueError: if a package has too little text.
    """
    wanted = {"train": train_rows // len(packages), "test": test_rows // len(packages)}
    read = {package: _read_package(package, wanted) for package in packages}
    owners = Counter(key for found in read.values() for split in wanted for key in found.rows[split])
    splits = {}
    for split, count in wanted.items():
        columns = []
        for label, package in enumerate(packages):
            own = [(*row, label) for key, row in read[package].rows[split].items() if owners[key] == 1]
            if len(own) < count:
                raise ValueError(
                    f"{package} {importlib.metadata.version(package)} has {len(own)} usable sentences for the {split} "
                    f"split, {count} are needed. Ask for fewer rows or leave the package out."
                )
            columns.append(own[:count])
        # One row of each package in turn: every prefix is balanced.
        splits[split] = [row for turn in zip(*columns, strict=True) for row in turn]
    digest = hashlib.sha256("\n".join(f"{s}\t{r[2]}\t{r[0]}" for s in wanted for r in splits[s]).encode()).hexdigest()
    facts = {
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "rows": {split: len(rows) for split, rows in splits.items()},
        "files_read": {package: found.files for package, found in read.items()},
        "files_refused": {package: found.refused for package, found in read.items()},
        "sha256": digest,
    }
    features = Features(text=Value("string"), file=Value("string"), label=ClassLabel(names=list(packages)))
    made = {
        split: Dataset.from_dict(dict(zip(("text", "file", "label"), zip(*rows, strict=True), strict=True)), features)
        for split, rows in splits.items()
    }
    return Corpus(splits=DatasetDict(made), facts=facts)


@dataclass
class _Found:
    rows: dict[str, dict[str, tuple[str, str]]]
    files: int = 0
    refused: int = 0


def _read_package(package: str, wanted: dict[str, int]) -> _Found:
    root = package_folder(package)
    paths = {f"{package}/{path.relative_to(root).as_posix()}": path for path in root.rglob("*.py")}
    # Test helpers say little about what a package is for, and there are thousands of them.
    names = [name for name in paths if not {"tests", "test", "testing"} & set(name.split("/"))]
    found = _Found(rows={"train": {}, "test": {}})
    need = {split: count + int(count * SPARE[0]) + SPARE[1] for split, count in wanted.items()}
    with tqdm(total=sum(need.values()), desc=f"reading {package}", unit=" sentences") as bar:
        for name in sorted(names, key=_draw):
            split = "test" if _draw(name) < TEST_SHARE else "train"
            other = found.rows["train" if split == "test" else "test"]
            if len(found.rows[split]) >= need[split]:
                continue
            docstrings = _docstrings(paths[name])
            found.files, found.refused = found.files + 1, found.refused + (docstrings is None)
            texts = {letters(text): text for docstring in docstrings or [] for text in sentences(docstring)}
            fresh = [key for key in texts if key not in other and key not in found.rows[split]]
            found.rows[split].update((key, (texts[key], name)) for key in fresh[: PER_FILE[split]])
            done = sum(min(len(found.rows[s]), need[s]) for s in need)
            bar.update(done - bar.n)
    return found


def package_folder(package: str) -> Path:
    """Find where a package is installed, without importing it.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the corpus is made from the docstrings of {package}, which is not installed in {sys.prefix}. It comes "
            f"with hf_sparse's own requirements: pip install '.[demo]', or make demo."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _docstrings(path: Path) -> list[str] | None:
    # A package may ship files for a newer Python than this one; they are counted as refused.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]


def _draw(name: str) -> float:
    # Uniform in [0, 1), the same on every machine.
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48

"""The house rules that hold the code together, read from its source alone: floors, doors, size, docstrings.

Floors, from the ground up: core, inference, hub, training, cli. A module imports from its own floor and from those
below it; training reaches into hub for the model card of a run, hub never into training.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("core", "inference", "hub", "training", "cli")
CORE_PACKAGES = ("torch", "safetensors", "hf_sparse", *sys.stdlib_module_names)
MAX_LINES = 300

# What only one place may import, and that place.
DOORS = {
    "huggingface_hub": "hf_sparse/hub/",
    "triton": "hf_sparse/inference/kernels/",
    "torch.distributed": "hf_sparse/training/distributed/",
}


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every dotted name that a module imports or reaches through an imported package, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                # `from torch import distributed` imports torch.distributed.
                yield f"{node.module or ''}.{alias.name}", node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}", node.lineno
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def floor_of(path: str) -> str:
    """The floor of a file "hf_sparse/core/blocks.py": "core"; "" for the roof, hf_sparse/__init__.py."""
    part = path.split("/")[1].removesuffix(".py")
    return part if part in FLOORS else ""


def violations(path: str, source: str) -> list[str]:
    """What a file does against the rules: one line each."""
    tree, floor, found = ast.parse(source), floor_of(path), []

    def report(line: int, what: str) -> None:
        found.append(f"{path}:{line}: {what}")

    if len(source.splitlines()) > MAX_LINES:
        report(MAX_LINES + 1, f"the module has more than {MAX_LINES} lines")
    if not ast.get_docstring(tree):
        report(1, "the module has no docstring")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            report(node.lineno, "relative import")
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            report(node.lineno, "star import")
    for name, line in set(imports(tree)):
        for package, place in DOORS.items():
            if within(name, package) and not path.startswith(place):
                report(line, f"{package} outside {place}")
        if name == "transformers.Trainer" or within(name, "transformers.trainer"):
            if floor not in ("training", "cli"):
                report(line, f"{name} outside training")
        other = name.split(".")[1] if within(name, "hf_sparse") and "." in name else ""
        if other in FLOORS and floor and FLOORS.index(other) > FLOORS.index(floor):
            report(line, f"{floor} imports {other}, a floor above it")
        if floor and floor != "cli" and name.startswith("hf_sparse.") and other not in (*FLOORS, "version"):
            report(line, f"{floor} imports {name} from the roof: import it from its own module")
    if floor == "core":
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                if module.split(".")[0] not in CORE_PACKAGES:
                    report(node.lineno, f"core imports {module}: only torch, safetensors and the standard library")
    if not floor:
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and within(node.module or "", "hf_sparse.training"):
                report(node.lineno, "importing hf_sparse would import the trainer")
    for name, line in undocumented(tree):
        report(line, f"{name} has no docstring")
    return sorted(set(found))


def undocumented(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Public functions, classes and methods without a docstring."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield prefix + node.name, node.lineno
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node, f"{prefix}{node.name}.")


def sources() -> dict[str, str]:
    files = sorted((ROOT / "hf_sparse").rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def test_the_house_keeps_its_rules() -> None:
    files = sources()
    assert len(files) > 30
    assert {floor_of(path) for path in files} == {*FLOORS, ""}
    found = [violation for path, source in files.items() for violation in violations(path, source)]
    assert not found, "\n".join(found)


CLEAN = '"""A module."""\n\nfrom __future__ import annotations\n'


@pytest.mark.parametrize(
    ("path", "code", "expected"),
    [
        ("core/a.py", "from hf_sparse.inference.layers.linear import x", "core imports inference"),
        ("core/a.py", "def f():\n    '''F.'''\n    import hf_sparse.training.pruning.masks", "core imports training"),
        ("inference/a.py", "from hf_sparse.training.pruning import masks", "inference imports training"),
        ("inference/a.py", "from hf_sparse.hub.card import write_card", "inference imports hub"),
        (
            "inference/a.py",
            "import importlib\nimportlib.import_module('hf_sparse.training.config')",
            "imports training",
        ),
        ("hub/a.py", "from hf_sparse.training.checkpoints.facts import run_facts", "hub imports training"),
        ("training/a.py", "from hf_sparse.cli import main", "training imports cli"),
        ("inference/kernels/a.py", "from hf_sparse.cli.bench import x", "inference imports cli"),
        ("training/a.py", "from hf_sparse import report", "training imports hf_sparse.report from the roof"),
        ("core/a.py", "import transformers", "core imports transformers"),
        ("core/a.py", "from numpy import array", "core imports numpy"),
        ("training/a.py", "from huggingface_hub import HfApi", "huggingface_hub outside hf_sparse/hub/"),
        ("cli/a.py", "import huggingface_hub.errors", "huggingface_hub outside hf_sparse/hub/"),
        ("inference/a.py", "import triton.language as tl", "triton outside hf_sparse/inference/kernels/"),
        ("training/a.py", "import torch.distributed as dist", "torch.distributed outside"),
        ("training/a.py", "from torch import distributed", "torch.distributed outside"),
        ("training/a.py", "import torch\nx = torch.distributed.is_initialized()", "torch.distributed outside"),
        ("training/a.py", "from torch.distributed import barrier", "torch.distributed outside"),
        (
            "inference/a.py",
            "from transformers.trainer import Trainer",
            "transformers.trainer.Trainer outside training",
        ),
        ("hub/a.py", "from transformers import Trainer", "transformers.Trainer outside training"),
        ("training/a.py", "from . import masks", "relative import"),
        ("training/a.py", "from .masks import BlockMasks", "relative import"),
        ("training/a.py", "from torch.nn import *", "star import"),
        ("training/a.py", "x = 1\n" * 301, "more than 300 lines"),
        ("training/a.py", "def public():\n    return 1", "public has no docstring"),
        (
            "training/a.py",
            "class Public:\n    '''C.'''\n\n    def method(self):\n        return 1",
            "Public.method has no",
        ),
        ("training/a.py", "class Public:\n    pass", "Public has no docstring"),
        ("__init__.py", "from hf_sparse.training.trainer import SparseDistillTrainer", "would import the trainer"),
    ],
)
def test_a_violation_is_found(path: str, code: str, expected: str) -> None:
    assert any(expected in violation for violation in violations(f"hf_sparse/{path}", CLEAN + code))


def test_a_missing_module_docstring_is_found() -> None:
    assert violations("hf_sparse/core/a.py", "x = 1\n") == ["hf_sparse/core/a.py:1: the module has no docstring"]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (
            "core/a.py",
            "import math\nimport torch\nfrom safetensors import safe_open\nfrom hf_sparse.core.blocks import x",
        ),
        ("inference/a.py", "import transformers\nfrom hf_sparse.core.blocks import x"),
        ("hub/a.py", "from huggingface_hub import HfApi\nfrom hf_sparse.core.report import report"),
        (
            "training/a.py",
            "from hf_sparse.hub.card import x\nfrom hf_sparse.inference.compress import y\nimport accelerate",
        ),
        ("training/distributed/a.py", "import torch.distributed as dist"),
        ("inference/kernels/a.py", "import triton\ndef _private():\n    return 1"),
        ("cli/a.py", "from hf_sparse.training.config import x\nfrom hf_sparse import report"),
        ("training/a.py", "class _Private:\n    def method(self):\n        return 1"),
        ("training/a.py", "def f():\n    '''F.'''\n    def inner():\n        return 1\n    return inner"),
        (
            "__init__.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hf_sparse.training.trainer import x",
        ),
    ],
)
def test_what_is_allowed_is_not_reported(path: str, code: str) -> None:
    assert violations(f"hf_sparse/{path}", CLEAN + code) == []

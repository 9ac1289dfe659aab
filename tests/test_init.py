"""The public surface of the package, and what importing it costs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

import hf_sparse

# A name is added here on purpose or not at all.
PUBLIC = {
    "BlockMasks",
    "BlockSparseConfig",
    "BlockSparseLinear",
    "SparseDistillConfig",
    "SparseDistillTrainer",
    "compress",
    "decompress",
    "distillation_loss",
    "graft",
    "group_lasso",
    "load_dense",
    "plan_step",
    "report",
}

FRESH = """
import json, sys
import hf_sparse
print(json.dumps({
    "heavy": sorted({"transformers.trainer", "triton", "datasets", "evaluate", "typer"} & set(sys.modules)),
    "training": sorted(name for name in sys.modules if name.startswith("hf_sparse.training")),
    "cuda": sys.modules["torch"].cuda.is_initialized(),
    "registered": "hf_sparse" in sys.modules["transformers.quantizers.auto"].AUTO_QUANTIZER_MAPPING,
    "listed": sorted(set(dir(hf_sparse)) & set(hf_sparse.__all__)),
    "lazy": hf_sparse.SparseDistillTrainer.__name__,
    "trainer": "transformers.trainer" in sys.modules,
}))
"""


def test_public_names_are_frozen() -> None:
    assert set(hf_sparse.__all__) == PUBLIC
    assert len(hf_sparse.__all__) == len(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(hf_sparse, name)
    assert value.__name__ == name
    assert len(value.__doc__.splitlines()[0]) > 20


def test_star_import_gives_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from hf_sparse import *", names)
    assert set(names) - {"__builtins__"} == PUBLIC


def test_unknown_names_are_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'hf_sparse' has no attribute 'sparsify'"):
        hf_sparse.sparsify  # noqa: B018 (the look-up is what is tested)
    with pytest.raises(ImportError, match="sparsify"):
        exec("from hf_sparse import sparsify", {})


def test_lazy_names_are_looked_up_once() -> None:
    assert hf_sparse.plan_step is importlib.import_module("hf_sparse.training.schedules").plan_step
    assert "plan_step" in vars(hf_sparse)


def test_importing_is_light_and_registers_the_loader() -> None:
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found == {
        "heavy": [],
        "training": [],
        "cuda": False,
        "registered": True,
        "listed": sorted(PUBLIC),
        "lazy": "SparseDistillTrainer",
        "trainer": True,
    }


def test_version_and_error_are_at_hand() -> None:
    assert hf_sparse.__version__.count(".") == 2
    assert issubclass(hf_sparse.FormatError, ValueError)

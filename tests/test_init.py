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
    "SparseDistillSeq2SeqConfig",
    "SparseDistillSeq2SeqTrainer",
    "SparseDistillTrainer",
    "compress",
    "crop",
    "decompress",
    "distillation_loss",
    "export",
    "graft",
    "group_lasso",
    "load_dense",
    "plan_step",
    "report",
}

FRESH = """
import importlib, json, sys
watching = lambda: sum(type(f).__name__ == "_Watcher" for f in sys.meta_path)
import hf_sparse
import hf_sparse.registration
print(json.dumps({
    "heavy": sorted({"torch", "transformers", "triton", "datasets", "evaluate", "typer"} & set(sys.modules)),
    "training": sorted(name for name in sys.modules if name.startswith("hf_sparse.training")),
    "finders": watching(),
    "registered": "hf_sparse" in importlib.import_module("transformers.quantizers.auto").AUTO_QUANTIZER_MAPPING,
    "finders_left": watching(),
    "cuda": sys.modules["torch"].cuda.is_initialized(),
    "again": "hf_sparse" in importlib.reload(hf_sparse).registration._register.__module__,
    "too_early": "transformers.trainer" in sys.modules,
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
        "finders": 1,
        "registered": True,
        "finders_left": 0,
        "cuda": False,
        "again": True,
        "too_early": False,
        "listed": sorted(PUBLIC),
        "lazy": "SparseDistillTrainer",
        "trainer": True,
    }


def test_transformers_may_be_imported_first() -> None:
    code = (
        "import transformers.quantizers.auto as auto, hf_sparse\n"
        "from hf_sparse.inference.loading import BlockSparseQuantizer\n"
        "assert auto.AUTO_QUANTIZER_MAPPING['hf_sparse'] is BlockSparseQuantizer"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def test_version_and_error_are_at_hand() -> None:
    assert hf_sparse.__version__.count(".") == 2
    assert issubclass(hf_sparse.FormatError, ValueError)

"""own_training_loop.py and load_and_time.py, run as a user runs them."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_sparse
from hf_sparse.core.structure.targets import find_targets
from tests.examples.conftest import EXAMPLES


def run(script: str, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    run("own_training_loop.py", "--smoke", folder)
    return folder


def test_the_training_loop_saves_a_pruned_model_that_loads(folder: Path) -> None:
    report = hf_sparse.report(folder / "pruned")
    assert report.sparsity == pytest.approx(0.8, abs=0.005)
    assert {layer.block_shape for layer in report.layers} == {(8, 1)}
    pruned = AutoModelForSequenceClassification.from_pretrained(folder / "pruned")
    batch = AutoTokenizer.from_pretrained(folder / "pruned")(["filler1 witty filler2"], return_tensors="pt")
    assert pruned(**batch).logits.shape == (1, 2)


def test_the_training_loop_trains_what_it_keeps(folder: Path) -> None:
    before = AutoModelForSequenceClassification.from_pretrained(folder / "dense")
    after = hf_sparse.load_dense(AutoModelForSequenceClassification, folder / "pruned")
    for name, layer in find_targets(after).items():
        kept = layer.weight != 0
        assert not torch.equal(layer.weight[kept], before.get_submodule(name).weight[kept]), name


def test_the_training_loop_refuses_missing_paths(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("own_training_loop.py", "model")
    assert "give MODEL TRAIN.csv OUTPUT" in capsys.readouterr().err


def test_load_and_time_compares_before_it_times(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("load_and_time.py", folder / "pruned", "--seconds", 0, "--batches", 1, 3, "--length", 9)
    out = capsys.readouterr().out
    assert "12 layers, sparsity 79.88%" in out
    assert float(re.search(r"largest difference between the logits: (\S+)", out)[1]) < 1e-6
    assert re.findall(r"^(dense|hf_sparse) +batch (\d+) +[\d.]+ ms", out, re.M) == [
        ("dense", "1"),
        ("hf_sparse", "1"),
        ("dense", "3"),
        ("hf_sparse", "3"),
    ]


def test_load_and_time_has_a_smoke_run(capsys: pytest.CaptureFixture[str]) -> None:
    run("load_and_time.py", "--smoke", "--seconds", 0)
    assert "hf_sparse  batch 8" in capsys.readouterr().out


def test_load_and_time_wants_a_folder_or_smoke(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("load_and_time.py")
    assert "give a folder, or --smoke" in capsys.readouterr().err

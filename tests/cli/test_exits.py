"""`hf-sparse crop` and `hf-sparse export`: what they write, and what they refuse."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_sparse import load_dense
from hf_sparse.inference.exits.structure import croppable_layers
from tests.test_cli import TOKENS, Done

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime")), reason="onnx or onnxruntime is not installed"
)


@pytest.fixture
def half_dead(dense: Path, cli: Callable[..., Done]) -> Path:
    """The compressed folder of a model whose first 16 of 32 units are dead in both layers."""
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    with torch.no_grad():
        for layer in croppable_layers(model):
            layer.get("intermediate.dense").weight[:16] = 0
            layer.get("intermediate.dense").bias.normal_()
    model.save_pretrained(dense)
    assert cli("compress", dense, dense.parent / "small").code == 0
    return dense.parent / "small"


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_dense(AutoModelForSequenceClassification, folder).eval()(input_ids=TOKENS).logits


def test_crop(cli: Callable[..., Done], half_dead: Path, tmp_path: Path) -> None:
    done = cli("crop", half_dead, tmp_path / "cropped", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    # 16 units were silenced, and a few others are not read in either layer.
    assert told["before"] == {"intermediate_size": 32} and 8 < told["after"]["intermediate_size"] <= 16
    config = json.loads((tmp_path / "cropped" / "config.json").read_text())
    assert config["intermediate_size"] == told["after"]["intermediate_size"] and "quantization_config" not in config
    assert (tmp_path / "cropped" / "vocab.txt").read_text() == "a b c"
    torch.testing.assert_close(logits(tmp_path / "cropped"), logits(half_dead), rtol=1e-5, atol=1e-6)
    assert "intermediate_size 32 -> 24" in cli("crop", half_dead, tmp_path / "more", "--multiple", 24).out


def test_crop_refuses_what_has_nothing_to_crop(cli: Callable[..., Done], dense: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    for layer in croppable_layers(model):
        torch.nn.init.normal_(layer.get("output.dense").weight)
    model.save_pretrained(dense)
    done = cli("crop", dense, tmp_path / "cropped")
    assert done.code == 1 and "has no units that are dead in every layer" in done.err
    assert not (tmp_path / "cropped").exists()


@needs_onnx
def test_export(cli: Callable[..., Done], half_dead: Path, tmp_path: Path) -> None:
    import onnxruntime

    done = cli("export", half_dead, tmp_path / "onnx", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["to"] == "onnx" and told["largest_difference"]["logits"] < 1e-5
    assert set(told["files"]) == {"config.json", "model.onnx", "vocab.txt"}
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    given = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    names = [i.name for i in session.get_inputs()]
    given |= {name: torch.zeros_like(TOKENS) for name in names if name not in given}
    found = session.run(None, {name: given[name].numpy() for name in names})[0]
    torch.testing.assert_close(torch.from_numpy(found), logits(half_dead), rtol=1e-4, atol=1e-5)
    zeros = cli("export", half_dead, tmp_path / "zeros", "--no-crop")
    assert zeros.code == 0 and "checked: logits within" in zeros.out
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("onnx", "zeros")]
    assert sizes[0] < sizes[1]


def test_export_refuses(cli: Callable[..., Done], small: Path, tmp_path: Path) -> None:
    done = cli("export", small, tmp_path / "out", "--to", "tflite")
    assert done.code == 1 and "to='tflite' is not known: use one of onnx, openvino, torch" in done.err
    assert not (tmp_path / "out").exists()
    done = cli("export", small, small, "--to", "onnx")
    assert done.code == 1 and "is the source itself" in done.err

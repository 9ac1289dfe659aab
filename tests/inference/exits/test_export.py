"""What is exported computes what the model computes, in the engine that it was exported for."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sparse import compress, export
from hf_sparse.inference.exits import export as module
from hf_sparse.inference.exits.export import export_program
from hf_sparse.inference.exits.samples import ExportError, dynamic_axes, sample_inputs
from hf_sparse.inference.exits.structure import CropError, croppable_layers
from tests.inference import models
from tests.inference.exits.test_crop import kill

FAMILIES = ("bert", "roberta", "distilbert", "electra", "gpt2", "llama", "vit", "t5")


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{missing} not installed")


def compressed(family: str) -> tuple[Any, Any]:
    """A compressed model, and the dense one with the same zeros."""
    dense, masks = models.pruned(family)
    small = models.make(family)
    small.load_state_dict(dense.state_dict())
    return compress(small, masks=masks), dense


def first_output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def in_onnxruntime(file: Path, inputs: dict[str, Tensor]) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    wanted = [given.name for given in session.get_inputs()]
    return torch.from_numpy(session.run(None, {name: inputs[name].numpy() for name in wanted})[0])


@needs("onnx", "onnxruntime")
@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_of_a_compressed_model(family: str, tmp_path: Path) -> None:
    small, dense = compressed(family)
    errors = export(small, tmp_path)
    assert set(errors) >= {"logits"} and all(error < 1e-4 for error in errors.values())
    for batch, length in ((1, 5), (4, 17)):
        given = sample_inputs(dense, batch, length, seed=3)
        torch.testing.assert_close(
            in_onnxruntime(tmp_path / "model.onnx", given), first_output(dense, given), rtol=1e-4, atol=1e-5
        )
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert small.hf_quantizer is not None


@needs("onnx", "openvino")
def test_openvino_through_onnx(tmp_path: Path) -> None:
    import openvino

    small, dense = compressed("bert")
    export(small, tmp_path, to="openvino")
    assert {file.name for file in tmp_path.iterdir()} == {"openvino_model.xml", "openvino_model.bin", "config.json"}
    compiled = openvino.Core().compile_model(
        str(tmp_path / "openvino_model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    given = sample_inputs(dense, 4, 17, seed=3)
    found = compiled({i.get_any_name(): given[i.get_any_name()].numpy() for i in compiled.inputs})["logits"]
    torch.testing.assert_close(torch.from_numpy(found), first_output(dense, given), rtol=1e-4, atol=1e-5)


@needs("onnx", "onnxruntime")
def test_what_died_is_cut_away_layer_by_layer(tmp_path: Path) -> None:
    model = models.make("bert")
    kill(model)
    export(model, tmp_path / "cut")
    export(model, tmp_path / "zeros", crop=False)
    given = sample_inputs(model, 4, 17, seed=3)
    for name in ("cut", "zeros"):
        found = in_onnxruntime(tmp_path / name / "model.onnx", given)
        torch.testing.assert_close(found, first_output(model, given), rtol=1e-4, atol=1e-5)
    # Of each layer went 13 of 32 units and one of two heads, with their biases: 4 bytes a weight.
    gone = 2 * (13 * (16 + 16 + 1) + 4 * 8 * 16 + 3 * 8) * 4
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("zeros", "cut")]
    assert sizes[0] - sizes[1] == pytest.approx(gone, abs=400)
    layer = croppable_layers(model)[0]
    assert layer.get(layer.feed_forward.up).out_features == 32


@needs("onnx", "onnxruntime")
def test_bfloat16_becomes_float32_and_the_model_keeps_its_bits(tmp_path: Path) -> None:
    small, _ = compressed("bert")
    small.to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    export(small, tmp_path)
    given = sample_inputs(small, 4, 17)
    found = in_onnxruntime(tmp_path / "model.onnx", given)
    torch.testing.assert_close(found, first_output(small, given).float(), rtol=5e-2, atol=5e-2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_a_torch_program_needs_no_hf_sparse(tmp_path: Path) -> None:
    for family in ("bert", "gpt2"):
        small, dense = compressed(family)
        export(small, tmp_path / family, to="torch")
        given = sample_inputs(dense, 4, 17, seed=3)
        case = {"inputs": given, "expected": first_output(dense, given)}
        torch.save(case | {"options": {"use_cache": False} if family == "gpt2" else {}}, tmp_path / family / "case.pt")
    code = f"""
import sys, torch
for folder in {[str(tmp_path / "bert"), str(tmp_path / "gpt2")]}:
    case = torch.load(folder + "/case.pt")
    program = torch.export.load(folder + "/model.pt2")
    with torch.no_grad():
        found = program.module()(**case["inputs"], **case["options"])
    torch.testing.assert_close(list(found.values())[0] if isinstance(found, dict) else found[0], case["expected"],
                               rtol=1e-5, atol=1e-5)
    print("the same")
assert "hf_sparse" not in sys.modules
"""
    # The outputs are an object of transformers, whose module has to be there.
    command = [sys.executable, "-c", "import transformers.modeling_outputs" + code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["the same"] * 2


def test_a_program_keeps_blocks_packed_or_calls_the_kernels() -> None:
    small, dense = compressed("bert")
    given = sample_inputs(dense, 4, 17, seed=3)
    packed = export_program(small)
    shapes = [tuple(p.shape) for p in packed.state_dict.values()]
    assert sum(len(shape) == 3 for shape in shapes) == 12
    native = export_program(small, kernels=True)
    for program in (packed, native):
        with torch.no_grad():
            found = program.module()(**given).logits
        torch.testing.assert_close(found, first_output(dense, given), rtol=1e-5, atol=1e-5)
    called = [str(node.target) for node in native.graph.nodes if "hf_sparse" in str(node.target)]
    assert len(called) in (0, 12)  # none where no native library is live
    assert not any("hf_sparse" in str(node.target) for node in packed.graph.nodes)


def test_plain_torch_export_of_a_fresh_model_says_what_to_do() -> None:
    small, _ = compressed("bert")
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="exits.export.export_program, which lets layers get ready"),
    ):
        torch.export.export(small, (), sample_inputs(small), strict=False)


# Refusals


def test_what_cannot_be_exported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.make("bert")
    with pytest.raises(ExportError, match="to='tensorrt' is not known: use one of onnx, openvino, torch"):
        export(model, tmp_path, to="tensorrt")
    with pytest.raises(CropError, match="ModernBertForSequenceClassification has no layer"):
        export(models.make("modernbert"), tmp_path, crop=True, to="torch")
    model.main_input_name = "input_values"
    with pytest.raises(ExportError, match="takes input_values, for which no inputs can be made up: give inputs="):
        export(model, tmp_path, to="torch")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match=r"onnx is not installed: pip install 'hf-sparse\[bench\]'"):
        export(models.make("bert"), tmp_path)
    assert not list(tmp_path.iterdir())


@needs("onnx", "onnxruntime")
def test_wrong_values_are_refused_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, uneven: bool) -> Any:
        model.classifier.bias.data += 1.0
        return model

    monkeypatch.setattr(module, "crop_model", broken)
    with pytest.raises(ExportError, match="the export computes another logits: the largest error is 1"):
        export(models.make("bert"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_given_inputs_are_taken(tmp_path: Path) -> None:
    model = models.make("bert")
    given = {"input_ids": torch.randint(3, 50, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    assert list(export(model, tmp_path, to="torch", inputs=given)) == ["logits"]


def test_axes_are_named() -> None:
    assert dynamic_axes(sample_inputs(models.make("t5"))) == {
        "input_ids": {0: "batch", 1: "length"},
        "attention_mask": {0: "batch", 1: "length"},
        "decoder_input_ids": {0: "batch", 1: "decoder_length"},
    }
    assert dynamic_axes(sample_inputs(models.make("vit"))) == {"pixel_values": {0: "batch"}}
    assert list(sample_inputs(models.make("bert"))) == ["input_ids", "attention_mask", "token_type_ids"]

"""The engines that are compared with: right values for every size, and a reason where there is none."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hf_sparse.inference.measuring.bench import token_inputs
from hf_sparse.inference.measuring.engines import ENGINES, DenseEngines, Unavailable, make_engines
from tests.inference import models
from tests.inference.measuring.test_bench import Toy

INPUTS = token_inputs([1, 3], [5, 9], models.VOCAB)


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{missing} not installed")


def truths(model: nn.Module) -> list[Tensor]:
    with torch.inference_mode():
        return [model(**given)[0] for given in INPUTS]


@needs("onnx", "onnxruntime", "openvino")
def test_engines_compute_what_the_model_does() -> None:
    model = models.make("bert")
    with torch.inference_mode():
        engines, skipped = make_engines(model, ["onnxruntime", "openvino"], INPUTS, truths(model))
        assert list(engines) == ["onnxruntime", "openvino"] and not skipped
        for engine in engines.values():
            for given, expected in zip(INPUTS, truths(model), strict=True):
                torch.testing.assert_close(engine(given), expected, rtol=1e-4, atol=1e-5)
    assert not any(module.training for module in model.modules())


@needs("onnx", "openvino")
def test_the_model_keeps_its_dtype_and_its_bits() -> None:
    model = models.make("bert").to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        engines, skipped = make_engines(model, ["onnxruntime", "openvino"], INPUTS, truths(model))
    assert skipped.pop("onnxruntime") == "it does not compute in bfloat16 on a CPU"
    assert "openvino" in engines or "bfloat16" in skipped["openvino"]
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_torch_compile() -> None:
    torch._dynamo.reset()
    model = Toy().eval()
    with torch.inference_mode():
        engines, skipped = make_engines(model, ["torch_compile"], INPUTS[:1], truths(model)[:1])
    assert list(engines) == ["torch_compile"] and not skipped


@pytest.mark.parametrize("package", ["onnxruntime", "openvino", "onnx"])
def test_what_is_not_installed_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    names = ["onnxruntime", "openvino"] if package == "onnx" else [package]
    engines, skipped = make_engines(Toy().eval(), names, INPUTS, truths(Toy()))
    assert not engines and all("is not installed" in reason for reason in skipped.values())


def test_an_engine_with_wrong_values_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy().eval()

    def wrong(given: Mapping[str, Tensor]) -> Tensor:
        return model(**given)[0] + 1.0

    monkeypatch.setattr(DenseEngines, "make", lambda self, name: wrong)
    engines, skipped = make_engines(model, ["openvino"], INPUTS, truths(model))
    assert not engines and skipped["openvino"].startswith("wrong values: the largest error is")


def test_an_engine_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, name: str) -> None:
        raise KeyError("no such layer")

    monkeypatch.setattr(DenseEngines, "make", fail)
    engines, skipped = make_engines(Toy().eval(), list(ENGINES), INPUTS, truths(Toy()))
    assert not engines and set(skipped.values()) == {"KeyError: 'no such layer'"}


@needs("onnx")
def test_a_model_that_cannot_be_exported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*_: object, **__: object) -> None:
        raise RuntimeError("no operator\nfor this")

    monkeypatch.setattr(torch, "onnx", SimpleNamespace(export=export))
    with pytest.raises(Unavailable, match="torch cannot export the model as ONNX: no operator$"):
        _ = DenseEngines(Toy().eval(), threads=1).onnx

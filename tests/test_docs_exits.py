"""Every line of Python of docs/exits.md runs, in its order."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import hf_sparse
from hf_sparse import compress
from hf_sparse.inference.exits.samples import sample_inputs
from hf_sparse.inference.exits.structure import FEED_FORWARD
from tests.inference import models
from tests.inference.exits.test_crop import kill

DOCUMENT = Path(hf_sparse.__file__).parents[1] / "docs" / "exits.md"


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
def test_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = models.make("bert")
    kill(model)
    compress(model, block_shape=(1, -1)).save_pretrained("out/model")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, DOCUMENT.name, "exec"), names)
    given = sample_inputs(model, 3, 9)
    with torch.no_grad():
        expected = model(**given).logits
        for name in ("dense", "cropped"):
            found = names[name].eval()(**given).logits  # type: ignore[attr-defined]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for program in (names["program"], names["fast"].module()):  # type: ignore[attr-defined]
            torch.testing.assert_close(program(**given).logits, expected, rtol=1e-5, atol=1e-5)  # type: ignore[operator]
    assert (tmp_path / "out" / "onnx" / "model.onnx").is_file()
    assert names["cropped"].config.intermediate_size == 19  # type: ignore[attr-defined]


def test_the_families_of_the_document_are_those_that_are_known() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    spoken = {"XLMRoberta": "XLM-R", "TransformerBlock": "DistilBERT", "DebertaV2": "DeBERTa-v2"}
    spoken |= {"Gemma2": "Gemma 2", "Gemma3": "Gemma 2 and 3"}
    for name in FEED_FORWARD:
        stem = re.sub(r"(Encoder|Decoder)?(Layer|Block)$", "", name) if name != "TransformerBlock" else name
        if stem == "GPT2":
            stem = "GPT-2"
        assert spoken.get(stem, stem).lower() in text.lower(), stem

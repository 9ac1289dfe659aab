"""Files written once by an earlier version load as they did then, and the text of the format says the same."""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from hf_sparse import load_dense, report
from hf_sparse.core.stored.packing import pack
from hf_sparse.inference.compress import compressed_experts, compressed_layers
from tests.golden.make_v1 import digest

V1, V2 = Path(__file__).parent / "v1", Path(__file__).parent / "v2"
SPEC = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
MODELS = {"bert": tf.AutoModelForSequenceClassification, "gpt2": tf.AutoModelForCausalLM}


def expected(name: str) -> dict[str, Any]:
    return json.loads((V1 / name / "expected.json").read_text(encoding="utf-8"))


def spec_block(language: str, containing: str) -> str:
    """A fenced block of docs/format.md."""
    blocks = re.findall(rf"```{language}\n(.*?)```", SPEC, re.DOTALL)
    return next(block for block in blocks if containing in block)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_day_they_were_written(name: str) -> None:
    model = MODELS[name].from_pretrained(V1 / name)
    digests = {layer_name: digest(layer.dense_weight()) for layer_name, layer in compressed_layers(model).items()}
    assert digests == expected(name)["dense_sha256"]
    dense = load_dense(MODELS[name], V1 / name)
    for layer_name, value in digests.items():
        module = dense.get_submodule(layer_name)
        weight = module.weight.t() if isinstance(module, tf.pytorch_utils.Conv1D) else module.weight
        assert digest(weight) == value


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["dense", "torch", "reference"])
def test_logits_are_those_of_the_day_they_were_written(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", backend)
    model = MODELS[name].from_pretrained(V1 / name, dtype=torch.float64)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(expected(name)["input_ids"])).logits
    # In float64, so that the order of sums on another machine cannot show.
    torch.testing.assert_close(logits, torch.tensor(expected(name)["logits"], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_files_of_version_1_are_written_as_they_were(name: str, tmp_path: Path) -> None:
    MODELS[name].from_pretrained(V1 / name).save_pretrained(tmp_path)
    assert split(tmp_path / "model.safetensors") == split(V1 / name / "model.safetensors")
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (V1 / name, tmp_path))
    assert json.dumps(new["quantization_config"]) == json.dumps(old["quantization_config"])


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file; the order of the strings in a header is nobody's promise."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def test_experts_are_those_of_the_day_they_were_written() -> None:
    told = json.loads((V2 / "mixtral" / "expected.json").read_text(encoding="utf-8"))
    model = tf.AutoModelForCausalLM.from_pretrained(V2 / "mixtral")
    digests = {name: digest(layer.dense_weight()) for name, layer in compressed_layers(model).items()}
    for name, experts in compressed_experts(model).items():
        digests |= {f"{name}.{part}": digest(weight) for part, weight in experts.dense_weights().items()}
    assert digests == told["dense_sha256"]
    dense = load_dense(tf.AutoModelForCausalLM, V2 / "mixtral")
    for name, value in digests.items():
        assert digest(dense.get_parameter(name if "experts" in name else name + ".weight")) == value
    model.set_experts_implementation("eager")
    with torch.no_grad():
        logits = model.to(torch.float64)(input_ids=torch.tensor(told["input_ids"])).logits
    torch.testing.assert_close(logits, torch.tensor(told["logits"], dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_reader_of_the_spec_reads_experts() -> None:
    names: dict[str, Any] = {}
    exec(spec_block("python", "def read_dense"), names)
    found = names["read_dense"](str(V2 / "mixtral"))
    model = tf.AutoModelForCausalLM.from_pretrained(V2 / "mixtral")
    expected = {name: layer.dense_weight() for name, layer in compressed_layers(model).items()}
    for name, experts in compressed_experts(model).items():
        expected |= {f"{name}.{part}": weight.flatten(0, 1) for part, weight in experts.dense_weights().items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(torch.tensor(rows), expected[name]) for name, rows in found.items())


def test_the_golden_mixture_covers_the_corners() -> None:
    config = json.loads((V2 / "mixtral" / "config.json").read_text())["quantization_config"]
    shapes = {name: entry["dense_shape"] for name, entry in config["modules"].items() if "experts" in name}
    assert config["format_version"] == 2
    assert len(shapes) == 3 and all(len(shape) == 3 for shape in shapes.values())
    assert len({tuple(config["modules"][name]["block_shape"]) for name in shapes}) == 3
    metadata = split(V2 / "mixtral" / "model.safetensors")[0]["__metadata__"]
    assert metadata["hf_sparse_format_version"] == "2"
    model = tf.AutoModelForCausalLM.from_pretrained(V2 / "mixtral")
    down = compressed_experts(model)["model.layers.0.mlp.experts"].dense_weights()["down_proj"]
    assert not down[0].any() and down[1].any()


def test_golden_files_cover_the_corners() -> None:
    layers = [layer for name in MODELS for layer in report(V1 / name).layers]
    assert any(layer.kept_blocks == 0 for layer in layers)
    assert any(layer.kept_blocks == layer.total_blocks - 1 for layer in layers)
    assert any(layer.total_blocks % 8 for layer in layers)
    assert len({layer.block_shape for layer in layers}) >= 6
    modules = json.loads((V1 / "gpt2" / "config.json").read_text())["quantization_config"]["modules"]
    assert all(entry["transposed"] == 1 for entry in modules.values())


def test_the_reader_of_the_spec_reads_the_golden_files() -> None:
    names: dict[str, Any] = {}
    exec(spec_block("python", "def read_dense"), names)
    found = names["read_dense"](str(V1 / "bert"))
    model = MODELS["bert"].from_pretrained(V1 / "bert")
    layers = compressed_layers(model)
    assert set(found) == set(layers)
    for name, layer in layers.items():
        assert torch.equal(torch.tensor(found[name]), layer.dense_weight())


def test_the_example_of_the_spec(tmp_path: Path) -> None:
    weight = torch.zeros(4, 6)
    weight[:2, 2:4] = torch.tensor([[1.0, 2], [3, 4]])
    weight[2:, :2] = torch.tensor([[5.0, 6], [7, 8]])
    weight[2:, 4:] = torch.tensor([[9.0, 10], [11, 12]])
    mask = torch.tensor([[False, True, False], [True, False, True]])
    values, bitmap = pack(weight, mask, (2, 2))
    written = spec_block("text", "q.weight_block_mask")
    hexes = re.findall(r"\b[0-9a-f]{8}\b", written)
    assert bytes.fromhex("".join(hexes)) == struct.pack("<12f", *values.flatten().tolist())
    assert bytes.fromhex(written.split()[-1]) == bytes(bitmap.tolist())
    config = json.loads(spec_block("json", "quantization_config"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"q.weight": values, "q.weight_block_mask": bitmap}, tmp_path / "model.safetensors")
    names: dict[str, Any] = {}
    exec(spec_block("python", "def read_dense"), names)
    assert names["read_dense"](str(tmp_path)) == {"q": weight.tolist()}
    assert [layer.kept_blocks for layer in report(tmp_path).layers] == [3]


def test_the_checksum_is_what_the_spec_says() -> None:
    tensors = load_file(V1 / "bert" / "model.safetensors")
    names = sorted(name for name in tensors if name.endswith("_block_mask"))
    data = b"".join(name.encode() + bytes(tensors[name].tolist()) for name in names)
    header = (V1 / "bert" / "model.safetensors").read_bytes()
    metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    assert metadata == {
        "format": "pt",
        "hf_sparse_format_version": "1",
        "hf_sparse_masks_crc32": f"{zlib.crc32(data):08x}",
    }

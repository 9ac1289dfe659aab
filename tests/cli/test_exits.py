"""`hf-sparse crop` and `hf-sparse export`: what they write, and what they refuse."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

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


def layers_of(folder: Path) -> tuple[AutoModelForSequenceClassification, list]:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    layers = croppable_layers(model)
    with torch.no_grad():
        for layer in layers:
            for name in ("intermediate.dense", "output.dense"):
                layer.get(name).weight.normal_()
                layer.get(name).bias.normal_()
    return model, layers


def test_layers_stay_as_large_as_the_one_that_needs_most(
    cli: Callable[..., Done], dense: Path, tmp_path: Path
) -> None:
    model, layers = layers_of(dense)
    with torch.no_grad():
        for layer, dead in zip(layers, (20, 9), strict=True):
            layer.get("intermediate.dense").weight[:dead] = 0
    model.save_pretrained(dense)
    done = cli("crop", dense, tmp_path / "cropped", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert (told["after"], told["dead_units_left"]) == ({"intermediate_size": 23}, 11)
    # Plainly, without anything of hf_sparse.
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "cropped").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=TOKENS).logits, logits(dense), rtol=1e-5, atol=1e-5)
    done = cli("crop", dense, tmp_path / "again")
    assert "intermediate_size 32 -> 23" in done.out
    assert "11 dead units stay, because all layers are as large as the one that needs most: `hf-sparse exp" in done.err


def test_crop_refuses_what_has_nothing_to_crop(cli: Callable[..., Done], dense: Path, tmp_path: Path) -> None:
    model, layers = layers_of(dense)
    model.save_pretrained(dense)
    done = cli("crop", dense, tmp_path / "cropped")
    assert done.code == 1 and "has no dead unit, so nothing can be cropped" in done.err
    with torch.no_grad():
        layers[0].get("intermediate.dense").weight[:20] = 0
        layers[1].get("intermediate.dense").weight[:2] = 0
    model.save_pretrained(dense)
    done = cli("crop", dense, tmp_path / "cropped", "--multiple", 8)
    assert done.code == 1 and len(done.err.splitlines()) <= 3
    assert "has 22 dead units, but bert.encoder.layer.1 needs 30 of its 32 in multiples of 8, and a config" in done.err
    done = cli("crop", dense, tmp_path / "cropped", "--multiple", 0)
    assert done.code == 1 and "--multiple 0 must be at least 1" in done.err
    assert not (tmp_path / "cropped").exists()


def test_heads_alone_are_cropped_where_the_config_counts_them(cli: Callable[..., Done], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
                         intermediate_size=32, vocab_size=40, tie_word_embeddings=False)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight[:4] = 0
        expected = model(input_ids=TOKENS).logits
    model.save_pretrained(tmp_path / "model")
    done = cli("crop", tmp_path / "model", tmp_path / "cropped")
    assert done.code == 0, done.err
    assert "num_attention_heads 4 -> 2, num_key_value_heads 2 -> 1, " in done.out and "intermediate" not in done.out
    with torch.no_grad():
        found = LlamaForCausalLM.from_pretrained(tmp_path / "cropped")(input_ids=TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_plain_transformers_cannot_read_back_is_not_left(
    cli: Callable[..., Done], half_dead: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if a class of transformers had a size that the config does not tell.
    monkeypatch.setattr("hf_sparse.inference.exits.crop._write_config", lambda model, changes: None)
    monkeypatch.setattr("hf_sparse.inference.exits.crop.sizes_told", lambda model, left=[2, 1]: {"a": left.pop(0)})
    done = cli("crop", half_dead, tmp_path / "cropped")
    assert done.code == 1 and "Traceback" not in done.err
    assert not (tmp_path / "cropped").exists()


def test_a_folder_inside_the_source_is_written_once(cli: Callable[..., Done], half_dead: Path) -> None:
    inside = half_dead / "exits" / "cropped"
    for _ in range(2):
        assert cli("crop", half_dead, inside, "--force").code == 0
    assert sorted(path.name for path in inside.iterdir()) == [
        "1_Pooling",
        "config.json",
        "model.safetensors",
        "vocab.txt",
    ]


@needs_onnx
def test_export(cli: Callable[..., Done], half_dead: Path, tmp_path: Path) -> None:
    import onnxruntime

    done = cli("export", half_dead, tmp_path / "onnx", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["to"] == "onnx" and told["largest_difference"]["logits"] < 1e-5
    assert set(told["files"]) == {"config.json", "model.onnx", "vocab.txt", "1_Pooling/config.json"}
    # What makes it a model of sentence-transformers comes along.
    assert (tmp_path / "onnx" / "1_Pooling" / "config.json").is_file()
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


def test_an_export_replaces_an_earlier_one_and_tells_of_itself_alone(
    cli: Callable[..., Done], small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli("export", small, out, "--to", "torch").code == 0
    (out / "model.onnx").write_bytes(b"of another model")
    (small / "vocab.txt").write_text("d e f")
    told = json.loads(cli("export", small, out, "--to", "torch", "--force", "--json").out)
    assert set(told["files"]) == {"config.json", "model.pt2", "vocab.txt", "1_Pooling/config.json"}
    assert (out / "vocab.txt").read_text() == "d e f"


def test_export_refuses(cli: Callable[..., Done], small: Path, tmp_path: Path) -> None:
    done = cli("export", small, tmp_path / "out", "--to", "tflite")
    assert done.code == 2 and "'tflite' is not one of 'onnx', 'openvino', 'torch'" in done.err
    assert not (tmp_path / "out").exists()
    done = cli("export", small, small, "--to", "onnx")
    assert done.code == 1 and "is the source itself" in done.err

"""What loading fills by itself, what it leaves to transformers, and that nobody sees the difference."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from hf_sparse import compress
from hf_sparse.inference import loading
from hf_sparse.inference.compress import compressed_layers
from hf_sparse.inference.stored import direct
from tests.inference import models


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[frozenset[str]]:
    """What each load leaves to transformers."""
    seen: list[frozenset[str]] = []

    def fill(*arguments: Any) -> frozenset[str]:
        seen.append(direct.fill(*arguments))
        return seen[-1]

    monkeypatch.setattr(loading, "fill", fill)
    return seen


def saved(folder: Path, family: str = "bert") -> Any:
    model, masks = models.pruned(family)
    compress(model, masks).save_pretrained(folder)
    return model


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}], ids=str)
def test_on_the_cpu_nothing_is_left(device_map: Any, tmp_path: Path, left: list[frozenset[str]]) -> None:
    model = saved(tmp_path)
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path, device_map=device_map)
    assert left == [frozenset()]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert all(isinstance(p, torch.nn.Parameter) and p.requires_grad for p in loaded.parameters())
    assert not loaded.training and not any(module.training for module in loaded.modules())


def test_nothing_of_it_stays_behind(tmp_path: Path) -> None:
    saved(tmp_path)
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert "state_dict" not in vars(model) and "_ignored_before_filling" not in vars(model)
    untouched = tf.BertForSequenceClassification(tf.BertConfig(**models.TEXT))
    assert model._keys_to_ignore_on_load_unexpected == untouched._keys_to_ignore_on_load_unexpected


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "modernbert"])
def test_both_ways_give_the_same_model(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, family)
    ours = models.auto_class(family).from_pretrained(tmp_path)
    monkeypatch.setattr(direct, "_CPU", ())
    theirs, info = models.auto_class(family).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for kind in ("named_parameters", "named_buffers"):
        expected = dict(getattr(theirs, kind)())
        found = dict(getattr(ours, kind)())
        assert list(found) == list(expected)
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]) and tensor.dtype == expected[name].dtype
            assert tensor.requires_grad == expected[name].requires_grad


def test_layers_that_keep_float32_are_left(tmp_path: Path, left: list[frozenset[str]]) -> None:
    saved(tmp_path, "t5")
    model = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert left[0] >= set(model.state_dict())
    layers = compressed_layers(model)
    assert {layer.weight.dtype for name, layer in layers.items() if name.endswith("wo")} == {torch.float32}
    assert {layer.weight.dtype for name, layer in layers.items() if name.endswith("wi")} == {torch.float16}


def test_tied_weights_are_left(tmp_path: Path, left: list[frozenset[str]]) -> None:
    saved(tmp_path, "llama")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert left == [frozenset({"lm_head.weight"})]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_new_head_is_left_and_reported(tmp_path: Path, left: list[frozenset[str]]) -> None:
    saved(tmp_path)
    model, info = tf.AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert "cls.predictions.bias" in left[0] and "cls.predictions.transform.dense.weight" in info["missing_keys"]
    assert all(name.startswith("cls.") for name in left[0])
    assert set(info["unexpected_keys"]) == {
        "classifier.weight",
        "classifier.bias",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    }
    assert torch.isfinite(model.cls.predictions.transform.dense.weight).all()


def test_what_has_no_place_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "bert.extra": torch.ones(2)}, file, metadata={"format": "pt"})
    _, info = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"bert.extra"}
    assert not info["missing_keys"]


def test_the_mask_that_is_checked_is_the_mask_that_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path)
    checked = {}
    check = loading.check_bitmaps

    def remember(headers: Any, formats: Any) -> None:
        check(headers, formats)
        checked.update(headers.bitmaps)

    monkeypatch.setattr(loading, "check_bitmaps", remember)
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert len(checked) == len(compressed_layers(model)) == 12
    for name, layer in compressed_layers(loaded).items():
        assert layer.weight_block_mask.data_ptr() == checked[name + ".weight_block_mask"].data_ptr()


def test_another_device_is_left(tmp_path: Path, left: list[frozenset[str]], caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path, device_map={"": "meta"})
    assert left[0] == frozenset(model.state_dict())

"""Cropping gives the same outputs with fewer weights, in every family that it knows, and refuses the others."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from hf_sparse import compress, crop
from hf_sparse.core.structure.targets import weight_view
from hf_sparse.inference.compress import compressed_layers
from hf_sparse.inference.exits.structure import CropError, croppable_layers
from tests.inference import models

BART = {
    "vocab_size": 50, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 24, "max_position_embeddings": 24,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": 2,
}  # fmt: skip
OTHERS = {
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**models.TEXT, num_key_value_heads=1, head_dim=8)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**models.TEXT, num_key_value_heads=1, head_dim=8, sliding_window=8)
    ),
    "deberta": lambda: tf.DebertaV2ForSequenceClassification(tf.DebertaV2Config(**models.TEXT)),
}
CROPPABLE = ["bert", "roberta", "distilbert", "electra", "mpnet", "vit", "gpt2", "llama", "t5", *OTHERS]
HEADED = ["bert", "roberta", "distilbert", "electra"]


def make(family: str) -> Any:
    if family not in OTHERS:
        return models.make(family)
    torch.manual_seed(0)
    model = OTHERS[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def outputs(model: Any, family: str) -> Tensor:
    if family not in OTHERS:
        return models.outputs(model, family)
    given = models.inputs("t5" if family == "bart" else "bert")
    with torch.no_grad():
        return model(**given).logits


def kill(model: Any, heads: bool = True) -> None:
    """Let units die in every way there is, one more in each layer, and the last head of each layer."""
    with torch.no_grad():
        for i, layer in enumerate(croppable_layers(model)):
            form = layer.feed_forward
            weight_view(layer.get(form.up))[i : 10 + i] = 0  # silent: a constant is left of them
            weight_view(layer.get(form.down))[:, 12:15] = 0  # not read
            if form.gate:
                weight_view(layer.get(form.gate))[i : 8 + i] = 0
            if layer.heads and heads:
                rows = weight_view(layer.get(layer.heads.value))
                rows[rows.shape[0] // 2 :] = 0


def units(model: Any) -> list[int]:
    linears = [layer.get(layer.feed_forward.up) for layer in croppable_layers(model)]
    return [m.out_features if hasattr(m, "out_features") else weight_view(m).shape[0] for m in linears]


@pytest.mark.parametrize("family", CROPPABLE)
def test_a_cropped_model_computes_the_same_and_loads_plainly(family: str, tmp_path: Path) -> None:
    model = make(family)
    kill(model)
    expected, before = outputs(model, family), units(model)
    assert crop(model) is model
    after = units(model)
    assert all(x < y for x, y in zip(after, before, strict=True))
    torch.testing.assert_close(outputs(model, family), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(outputs(loaded.eval(), family), outputs(model, family))
    assert units(loaded) == after


def test_biases_are_folded_and_not_dropped() -> None:
    model = make("bert")
    kill(model)
    expected = outputs(model, "bert")
    with torch.no_grad():
        for layer in croppable_layers(model):
            assert layer.get(layer.feed_forward.up).bias[:10].abs().max() > 0.01
            # What a crop without folding would be: the constants gone.
            weight_view(layer.get(layer.feed_forward.down))[:, :10] = 0
    assert (outputs(model, "bert") - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", HEADED)
def test_heads_go_where_layers_may_be_uneven(family: str, tmp_path: Path) -> None:
    model = make(family)
    kill(model)
    with torch.no_grad():  # the layers differ in what is dead
        first = croppable_layers(model)[0]
        weight_view(first.get(first.feed_forward.down))[:, 20:] = 0
    expected = outputs(model, family)
    crop(model, uneven=True)
    torch.testing.assert_close(outputs(model, family), expected, rtol=1e-5, atol=1e-5)
    assert units(model)[0] < units(model)[1]
    layer = croppable_layers(model)[0]
    assert layer.heads is not None
    assert tuple(layer.get(layer.heads.query).weight.shape) == (8, 16)
    assert tuple(layer.get(layer.heads.output).weight.shape) == (16, 8)
    with pytest.raises(CropError, match="cropped unevenly, which no config describes"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("kind", "heads", "groups", "dead", "left"),
    [
        ("Llama", 4, 2, 1, (2, 1)),  # a group of two heads
        ("Llama", 4, 4, 1, (4, 4)),  # three heads do not divide a hidden size of 16, which Llama wants
        ("Llama", 4, 4, 2, (2, 2)),
        ("Mistral", 6, 3, 1, (4, 2)),
        ("Qwen3", 6, 6, 2, (4, 4)),
    ],
)  # fmt: skip
def test_heads_go_for_good_where_the_config_counts_them(
    kind: str, heads: int, groups: int, dead: int, left: tuple[int, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {**models.TEXT, "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": 4}
    model = getattr(tf, f"{kind}ForCausalLM")(getattr(tf, f"{kind}Config")(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.v_proj.weight[4 * i : 4 * (i + dead)] = 0
    expected = outputs(model, "llama")
    if left == (heads, groups):
        kill(model, heads=False)
        expected = outputs(model, "llama")
    crop(model)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == left
    torch.testing.assert_close(outputs(model, "llama"), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(outputs(loaded.eval(), "llama"), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # with a cache of keys and values, whose heads are fewer, too
        given = models.inputs("bert")["input_ids"]
        made = loaded.generate(given, max_new_tokens=4, do_sample=False, pad_token_id=0)
        again = loaded.generate(given, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(made, again)


def test_a_head_that_nobody_reads_goes_and_the_last_one_stays() -> None:
    model = make("bert")
    for layer in croppable_layers(model):
        assert layer.heads is not None
        nn.init.zeros_(layer.get(layer.heads.output).weight)
    expected = outputs(model, "bert")
    crop(model, uneven=True)
    torch.testing.assert_close(outputs(model, "bert"), expected, rtol=1e-5, atol=1e-5)
    assert croppable_layers(model)[0].get("attention.self").num_attention_heads == 1


def test_padding_does_not_matter() -> None:
    model = make("bert")
    kill(model)
    ids = models.inputs("bert")["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        crop(model, uneven=True)
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_compressed_model_is_cropped_and_dense_after_it() -> None:
    model = make("bert")
    kill(model)
    expected = outputs(model, "bert")
    compress(model, block_shape=(1, -1))
    crop(model)
    assert getattr(model, "hf_quantizer", None) is None
    torch.testing.assert_close(outputs(model, "bert"), expected, rtol=1e-5, atol=1e-5)
    assert units(model) == [19, 19]


@pytest.mark.parametrize(("multiple", "left"), [(1, 19), (4, 20), (16, 32), (100, 32)])
def test_a_multiple_keeps_some_dead_units(multiple: int, left: int) -> None:
    model = make("bert")
    kill(model)
    expected = outputs(model, "bert")
    crop(model, multiple=multiple)
    assert units(model) == [left, left] and model.config.intermediate_size == left
    torch.testing.assert_close(outputs(model, "bert"), expected, rtol=1e-5, atol=1e-5)


def test_tiles_beside_dead_units_are_compressed_after_cropping() -> None:
    model = make("bert")
    with torch.no_grad():
        for layer in croppable_layers(model):
            weight_view(layer.get(layer.feed_forward.up))[:10] = 0
            layer.get("attention.self.query").weight[:4] = 0
    expected = outputs(model, "bert")
    compress(crop(model, multiple=4), block_shape=(4, 4))
    assert units(model) == [24, 24] and {n.rpartition(".")[2] for n in compressed_layers(model)} >= {"query"}
    torch.testing.assert_close(outputs(model, "bert"), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_without_any_live_unit() -> None:
    model = make("bert")
    for layer in croppable_layers(model):
        nn.init.zeros_(layer.get(layer.feed_forward.up).weight)
    expected = outputs(model, "bert")
    crop(model)
    assert units(model) == [1, 1]
    torch.testing.assert_close(outputs(model, "bert"), expected, rtol=1e-5, atol=1e-5)


def test_constants_that_no_bias_can_take_up_stay() -> None:
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**models.TEXT, num_key_value_heads=1, mlp_bias=True)).eval()
    for layer in croppable_layers(model):
        mlp = layer.get("mlp")
        for linear in (mlp.up_proj, mlp.gate_proj):
            nn.init.normal_(linear.bias)
            nn.init.zeros_(linear.weight[:8])
        mlp.down_proj.bias = None
    expected = outputs(model, "llama")
    crop(model)
    assert units(model) == [32, 32]
    torch.testing.assert_close(outputs(model, "llama"), expected)


def test_nothing_dead_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = make("bert")
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING, "hf_sparse"):
        crop(model)
    assert "nothing to remove in 2 layers" in caplog.text
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_bfloat16_and_frozen_weights_stay_what_they_are() -> None:
    model = make("bert").to(torch.bfloat16).requires_grad_(False)
    kill(model)
    expected = outputs(model, "bert")
    crop(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(outputs(model, "bert"), expected, rtol=2e-2, atol=2e-2)


def test_what_cannot_be_cropped_is_refused_unchanged() -> None:
    with pytest.raises(CropError, match="ModernBertForSequenceClassification has no layer of a class that can be"):
        crop(make("modernbert"))
    with pytest.raises(CropError, match="Linear has no layer of a class"):
        crop(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="multiple=0 must be a positive integer"):
        crop(make("bert"), multiple=0)
    model = make("bert")
    layers = model.bert.encoder.layer
    layers[1].intermediate.dense.weight = layers[0].intermediate.dense.weight
    with pytest.raises(CropError, match=r"layer.0.intermediate.dense shares its weight with another module"):
        crop(model)
    model = make("bert")
    model.config.intermediate_size = 64
    with pytest.raises(CropError, match=r"layer.0 has 32 units, but .*config.intermediate_size is 64"):
        crop(model)


def test_a_layer_of_a_known_name_with_another_inside_is_refused() -> None:
    model = make("bert")
    del model.bert.encoder.layer[1].intermediate.intermediate_act_fn
    with pytest.raises(CropError, match=r"layer.1 is a BertLayer without intermediate.dense: this version"):
        crop(model)

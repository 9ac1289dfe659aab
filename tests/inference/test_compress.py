from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

from hf_sparse import BlockSparseConfig, BlockSparseLinear, compress, decompress
from hf_sparse.core.blocks import to_blocks
from hf_sparse.core.structure.targets import find_targets
from hf_sparse.inference.compress import compressed_layers
from tests.inference import models

Q = "bert.encoder.layer.0.attention.self.query"


def stack(bias: bool = True) -> nn.ModuleDict:
    """Two layers of one linear, as small as a stack gets."""
    return nn.ModuleDict({"layer": nn.ModuleList(nn.Sequential(nn.Linear(8, 4, bias=bias)) for _ in range(2))})


@pytest.mark.parametrize("family", models.FAMILIES)
def test_outputs_do_not_change(family: str) -> None:
    model, masks = models.pruned(family)
    expected = models.outputs(model, family)
    assert compress(model, masks) is model
    assert set(compressed_layers(model)) == set(masks)
    models.assert_same(models.outputs(model, family), expected)
    assert decompress(model) is model
    models.assert_same(models.outputs(model, family), expected)


def test_masks_give_each_layer_its_block_shape() -> None:
    model = models.make("bert")
    names = list(find_targets(model))[:3]
    shapes = [(16, 1), (1, 16), (2, 4)]
    masks = {}
    for name, shape in zip(names, shapes, strict=True):
        weight = model.get_submodule(name).weight.data
        blocks = to_blocks(weight, shape)
        blocks[0, 0] = 0
        masks[name] = (blocks != 0).any(3).any(2)
    compress(model, masks)
    found = compressed_layers(model)
    assert {name: layer.block_shape for name, layer in found.items()} == dict(zip(names, shapes, strict=True))
    assert all(layer.layer_format().kept == layer.layer_format().num_blocks - 1 for layer in found.values())


def test_zero_blocks_are_found() -> None:
    model, masks = models.pruned("bert", (4, 2), density=0.5)
    compress(model, block_shape=(4, 2))
    assert {n: m.block_mask().tolist() for n, m in compressed_layers(model).items()} == {
        n: m.tolist() for n, m in masks.items()
    }


def test_blocks_of_whole_rows() -> None:
    model = stack()
    model["layer"][0][0].weight.data[1] = 0
    compress(model, block_shape=(1, -1))
    assert model["layer"][0][0].block_mask().flatten().tolist() == [True, False, True, True]


@pytest.mark.parametrize("value", [1e-30, -1e-44, float("nan"), float("inf")])
def test_a_tiny_weight_is_not_zero(value: float) -> None:
    # The square of a small weight is zero before the weight is.
    model = stack()
    model["layer"][0][0].weight.data[:] = 0
    model["layer"][0][0].weight.data[3, 5] = value
    compress(model, block_shape=(2, 4))
    assert model["layer"][0][0].block_mask().tolist() == [[False, False], [False, True]]
    assert torch.equal(model["layer"][0][0].weight[0, 1, 1].view(torch.int32), torch.tensor(value).view(torch.int32))


def test_layers_with_nothing_to_drop_stay_dense(tmp_path: Path) -> None:
    model, masks = models.pruned("bert")
    kept = models.make("bert").get_submodule(Q).weight.data
    model.get_submodule(Q).weight.data.copy_(kept)
    compress(model, {**masks, Q: torch.ones(4, 16, dtype=torch.bool)})
    assert type(model.get_submodule(Q)) is nn.Linear
    model.save_pretrained(tmp_path)
    assert Q not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")[Q + ".weight"], kept)


def test_a_dense_model_stays_dense(tmp_path: Path) -> None:
    model = compress(models.make("bert"), block_shape=(4, 1))
    assert not compressed_layers(model)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert decompress(model) is model


def test_everything_pruned() -> None:
    model = models.make("bert")
    for module in find_targets(model).values():
        module.weight.data.zero_()
    expected = models.outputs(model, "bert")
    compress(model, block_shape=(16, 1))
    assert all(layer.weight.shape == (0, 16, 1) for layer in compressed_layers(model).values())
    models.assert_same(models.outputs(model, "bert"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_values_are_kept_bit_for_bit(dtype: torch.dtype) -> None:
    model, masks = models.pruned("bert")
    model.to(dtype)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in masks}
    decompress(compress(model, masks))
    for name, weight in before.items():
        after = model.get_submodule(name).weight
        assert after.dtype == dtype
        assert torch.equal(after, weight)


def test_modules_that_are_no_pretrained_model() -> None:
    model = stack(bias=False)
    model["layer"][1][0].weight.data[:2] = 0
    x = torch.randn(3, 8)
    expected = model["layer"][1](x)
    compress(model, block_shape=(2, 8))
    assert isinstance(model["layer"][1][0], BlockSparseLinear)
    models.assert_same(model["layer"][1](x), expected)
    models.assert_same(decompress(model)["layer"][1](x), expected)
    assert type(model["layer"][1][0]) is nn.Linear


def test_conv1d_comes_back_as_conv1d(tmp_path: Path) -> None:
    model, masks = models.pruned("gpt2")
    expected = models.outputs(model, "gpt2")
    name = next(iter(masks))
    dense = model.get_submodule(name)
    weight, bias = dense.weight.detach().clone(), dense.bias.detach().clone()
    layer = compressed_layers(compress(model, masks))[name]
    assert layer.transposed
    assert (layer.out_features, layer.in_features) == tuple(reversed(weight.shape))
    restored = decompress(model).get_submodule(name)
    assert type(restored) is tf.pytorch_utils.Conv1D
    assert restored.nf == weight.shape[1]
    assert torch.equal(restored.weight, weight)
    assert torch.equal(restored.bias, bias)
    assert restored.weight.is_contiguous()
    model.save_pretrained(tmp_path)
    models.assert_same(models.outputs(tf.AutoModelForCausalLM.from_pretrained(tmp_path), "gpt2"), expected)


def test_training_flags_survive() -> None:
    model, masks = models.pruned("bert")
    model.train()
    model.bert.encoder.layer[0].eval()
    for parameter in model.bert.encoder.layer[1].parameters():
        parameter.requires_grad_(False)
    compress(model, masks)
    for back in (model, decompress(model)):
        assert not back.get_submodule(Q).training
        assert back.get_submodule(Q.replace("0", "1")).training
        assert back.get_submodule(Q).weight.requires_grad
        assert not back.get_submodule(Q.replace("0", "1")).weight.requires_grad
        assert not back.get_submodule(Q.replace("0", "1")).bias.requires_grad


def test_decompressed_models_save_as_plain_dense_folders(tmp_path: Path) -> None:
    model, masks = models.pruned("bert")
    model.save_pretrained(tmp_path / "before")
    compress(model, masks).save_pretrained(tmp_path / "packed")
    decompress(model).save_pretrained(tmp_path / "after")
    assert (tmp_path / "after" / "config.json").read_bytes() == (tmp_path / "before" / "config.json").read_bytes()
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not model.is_quantized
    assert not hasattr(model, "hf_quantizer")
    model.half()


def test_compress_describes_the_model(tmp_path: Path) -> None:
    model, masks = models.pruned("bert")
    compress(model, masks)
    config = model.config.quantization_config
    assert isinstance(config, BlockSparseConfig)
    assert config.layer_formats() == {n: m.layer_format() for n, m in compressed_layers(model).items()}
    assert model.is_quantized
    assert model.hf_quantizer.quantization_config is config


# What is refused. Each leaves the model as it was.


def refused(model: Any, message: str, *args: Any, **kwargs: Any) -> None:
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        compress(model, *args, **kwargs)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not hasattr(getattr(model, "config", None), "quantization_config") or compressed_layers(model)


def test_masks_or_block_shape_but_not_both() -> None:
    model, masks = models.pruned("bert")
    refused(model, "either masks, or the block_shape")
    refused(model, "either masks, or the block_shape", masks, (4, 1))


def test_weights_outside_the_mask_are_never_lost() -> None:
    model, masks = models.pruned("bert")
    mask = masks[Q].clone()
    row, col = (int(i) for i in mask.nonzero()[0])
    mask[row, col] = False
    refused(model, rf"{Q}: 4 weights in pruned blocks of \(4, 1\) are not zero", {**masks, Q: mask})


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(5, 16, dtype=torch.bool), r"\[5, 16\], which does not divide the weight of \[16, 16\]"),
        (torch.ones(16, 3, dtype=torch.bool), r"\[16, 3\], which does not divide"),
        (torch.ones(4, 16), r"must be bool \[R, C\], found torch.float32 of shape \[4, 16\]"),
        (torch.ones(16, dtype=torch.bool), r"must be bool \[R, C\], found torch.bool of shape \[16\]"),
        (torch.ones(0, 16, dtype=torch.bool), r"must be bool \[R, C\]"),
        (torch.ones(32, 16, dtype=torch.bool), "does not divide"),
    ],
)
def test_masks_that_do_not_fit(mask: torch.Tensor, message: str) -> None:
    refused(models.make("bert"), message, {Q: mask})


def test_block_shapes_that_do_not_fit_name_the_layer() -> None:
    refused(models.make("bert"), rf"{Q}: block_height=5 does not divide the 16 output rows", block_shape=(5, 1))


def test_names_that_are_no_linear() -> None:
    model, mask = models.make("bert"), torch.ones(4, 4, dtype=torch.bool)
    refused(model, rf"no such module; the closest linear is \['{Q}'\]", {Q[:-1]: mask})
    refused(model, "is a Embedding and no plain linear", {"bert.embeddings.word_embeddings": mask})


def test_compressed_already() -> None:
    model, masks = models.pruned("bert")
    compress(model, masks)
    refused(model, rf"{Q} is compressed already: call hf_sparse.decompress", masks)
    refused(model, "compressed already", block_shape=(4, 1))
    compress(decompress(model), masks)


def test_other_quantizers() -> None:
    model, masks = models.pruned("bert")
    model.hf_quantizer = type("Other", (), {"quantization_config": type("C", (), {"quant_method": "gptq"})})()
    refused(model, "is quantized with 'gptq'", masks)


def test_shared_weights() -> None:
    model = stack()
    model["layer"][1][0].weight = model["layer"][0][0].weight
    mask = torch.zeros(4, 8, dtype=torch.bool)
    model["layer"][0][0].weight.data.zero_()
    refused(model, r"layer.0.0 and layer.1.0 share one weight", {"layer.0.0": mask})


def test_a_module_under_two_names() -> None:
    model = stack()
    model["again"] = model["layer"][1][0]
    model["again"].weight.data.zero_()
    refused(model, "layer.1.0 and again share one weight", {"layer.1.0": torch.zeros(4, 8, dtype=torch.bool)})


def test_tied_heads() -> None:
    model = models.make("llama")
    refused(model, "embed_tokens and lm_head share one weight", {"lm_head": torch.ones(50, 16, dtype=torch.bool)})


def test_layers_that_run_more_than_once(tmp_path: Path) -> None:
    # ALBERT calls one module in every layer: one weight under one name, which is no sharing.
    torch.manual_seed(0)
    model = tf.AlbertForSequenceClassification(tf.AlbertConfig(**models.TEXT, embedding_size=8)).eval()
    masks = models.prune(model)
    expected = models.outputs(model, "bert")
    compress(model, masks).save_pretrained(tmp_path)
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert set(compressed_layers(loaded)) == set(masks)
    models.assert_same(models.outputs(loaded, "bert"), expected)


def test_layers_whose_weight_is_read_without_calling_them() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    mask = torch.ones(16, 8, dtype=torch.bool)
    refused(model, "nn.TransformerEncoderLayer reads the weight itself", {"layers.0.linear1": mask})


def test_linears_that_mamba_reads_are_refused_by_hand_as_well() -> None:
    torch.manual_seed(0)
    config = tf.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4)
    model = tf.MambaForCausalLM(config).eval()
    name = "backbone.layers.1.mixer.dt_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[:4] = 0.0
        model.get_submodule("backbone.layers.0.mixer.in_proj").weight[:4] = 0.0
    mask = torch.ones(8, 4, dtype=torch.bool)
    mask[0] = False
    message = rf"MambaMixer reads the weight of {name} without calling it"
    refused(model, message, {name: mask})
    refused(model, message, block_shape=(4, 1))
    ids = torch.arange(3, 8)[None]
    with torch.no_grad():
        expected = model(ids).logits
        compress(model, block_shape=(4, 1), exclude_modules=r".*dt_proj")
        assert set(compressed_layers(model)) == {"backbone.layers.0.mixer.in_proj"}
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_zero_blocks_of_several_shapes_are_found() -> None:
    model = stack()
    with torch.no_grad():
        model["layer"][0][0].weight[:2] = 0.0
        model["layer"][1][0].weight[:, :2] = 0.0
    other: dict[str, Any] = {"block_shape": (2, 8), "block_overrides": {"x": (4, 2)}}
    refused(model, "block_overrides pattern 'x' matches none", **other)
    refused(model, "either masks, or the block_shape", {}, exclude_modules="layer.0.0")
    compress(model, block_shape=(2, 8), block_overrides={r"layer\.1\.0": (4, 2)})
    shapes = {name: layer.layer_format().block_shape for name, layer in compressed_layers(model).items()}
    assert shapes == {"layer.0.0": (2, 8), "layer.1.0": (4, 2)}


@pytest.mark.parametrize("shape", [4, (4,)])
def test_block_shapes_that_are_no_pair(shape: Any) -> None:
    refused(models.make("bert"), rf"{Q}: block_shape=\(?4,?\)? is no block shape: use a pair", block_shape=shape)


def test_weights_that_are_not_at_hand() -> None:
    refused(stack().to("meta"), "layer.0.0 is offloaded", {"layer.0.0": torch.ones(4, 8, dtype=torch.bool)})
    with pytest.raises(ValueError, match="layer.0.0 is offloaded"):
        model = stack()
        model["layer"][0][0].weight.data.zero_()
        decompress(compress(model, block_shape=(4, 1)).to("meta"))

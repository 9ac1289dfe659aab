"""Mixtures compressed: the same values in memory, in files and back, experts included."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from hf_sparse import FormatError, compress, decompress, load_dense, report
from hf_sparse.core.structure.experts import ExpertsWeight
from hf_sparse.core.structure.targets import find_targets
from hf_sparse.inference.compress import compressed_experts, compressed_tensors
from hf_sparse.inference.layers.experts import BlockSparseExperts
from hf_sparse.inference.stored.streaming import compress_folder, decompress_folder
from hf_sparse.training.checkpoints.saving import under_own_names
from tests.inference import damage, models
from tests.inference.models import assert_same, file_bytes
from tests.mixtures import MIXTURES, expert_shapes, gpt_oss, logits, mixture

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
PART = "model.layers.1.mlp.experts.down_proj"
QUERY = "model.layers.0.self_attn.q_proj"


def pruned(name: str, density: float = 0.3) -> tuple[Any, dict[str, torch.Tensor]]:
    """A mixture with zero blocks, and its masks."""
    model = mixture(name)
    return model, models.prune(model, (4, 1), density)


def saved(folder: Path, name: str = "mixtral", **given: Any) -> torch.Tensor:
    """Save a compressed mixture and give its logits."""
    model, masks = pruned(name)
    compress(model, masks).save_pretrained(folder, **given)
    return logits(model)


@pytest.mark.parametrize("name", MIXTURES)
def test_compressing_changes_no_output_and_decompressing_no_bit(name: str) -> None:
    model, masks = pruned(name)
    expected, before = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    classes = {n: type(m) for n, m in model.named_modules()}
    assert compress(model, masks) is model
    assert set(compressed_tensors(model)[0]) == set(masks)
    assert torch.equal(logits(model), expected), "the same code on the same weights"
    for full, (experts, rows, cols) in expert_shapes(name).items():
        values = model.get_parameter(full)
        assert values.shape == (int(masks[full].sum()), 4, 1)
        layer = compressed_tensors(model)[0][full]
        assert (layer.experts, layer.dense_shape, layer.stored_shape) == (
            experts, (experts * rows, cols), (experts, rows, cols)
        )  # fmt: skip
    decompress(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", MIXTURES)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    expected = saved(tmp_path, name)
    kind = type(mixture(name))
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(logits(loaded), expected)
    assert set(compressed_tensors(loaded)[0]) == set(find_targets(mixture(name)))
    loaded.save_pretrained(tmp_path / "again")
    assert damage.read(tmp_path / "again" / "model.safetensors") == damage.read(tmp_path / "model.safetensors")
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "again"))
    assert new["quantization_config"] == old["quantization_config"]
    assert_same(logits(load_dense(kind, tmp_path)), expected)


def test_a_dense_copy_is_one_that_plain_transformers_knows(tmp_path: Path) -> None:
    expected = saved(tmp_path / "small")
    load_dense(tf.AutoModelForCausalLM, tmp_path / "small").save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert_same(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_file_is_as_small_as_promised(name: str, tmp_path: Path) -> None:
    model, masks = pruned(name)
    compress(model, masks).save_pretrained(tmp_path)
    formats, _ = compressed_tensors(model)
    kept = sum(layer.kept * 4 * 4 + layer.num_blocks / 8 for layer in formats.values())
    packed = {layer.weight_key(n) for n, layer in formats.items()}
    others = sum(p.numel() * 4 for n, p in model.named_parameters() if n not in packed)
    headers = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") + 8
    assert file_bytes(tmp_path) - headers <= 1.02 * (kept + others)
    found = report(tmp_path)
    in_memory = report(model)
    assert {layer.name: layer for layer in found.layers} == {layer.name: layer for layer in in_memory.layers}
    assert (found.bytes, found.dense_bytes) == (in_memory.bytes, in_memory.dense_bytes)
    assert found.not_pruned == ()
    assert found.sparsity > 0.6


def test_config_and_header_have_version_2_and_only_where_there_are_experts(tmp_path: Path) -> None:
    saved(tmp_path / "two")
    model, masks = pruned("mixtral")
    compress(model, {n: m for n, m in masks.items() if "experts" not in n}).save_pretrained(tmp_path / "one")
    for folder, version in (("two", 2), ("one", 1)):
        quantization = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        header, _ = damage.read(tmp_path / folder / "model.safetensors")
        assert quantization["format_version"] == version
        assert header["__metadata__"]["hf_sparse_format_version"] == str(version)
        entry = quantization["modules"].get(PART)
        assert entry == ({"block_shape": [4, 1], "kept": int(masks[PART].sum()), "dense_shape": [4, 16, 32]}
                         if version == 2 else None)  # fmt: skip
    tensors = load_file(tmp_path / "two" / "model.safetensors")
    assert tensors[PART].shape == (int(masks[PART].sum()), 4, 1)
    assert tensors[PART + "_block_mask"].dtype == torch.uint8


def test_in_several_files(tmp_path: Path) -> None:
    expected = saved(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    assert report(tmp_path).sparsity > 0.6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_whatever_computes_the_experts(implementation: str, tmp_path: Path) -> None:
    dense, masks = pruned("qwen3_moe")
    dense.set_experts_implementation(implementation)
    expected = logits(dense)
    compress(dense, masks).save_pretrained(tmp_path)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
    assert model.config._experts_implementation == implementation
    assert_same(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model, masks = pruned("mixtral")
    # The only one of transformers' ways to compute experts that takes float64.
    model.set_experts_implementation("eager")
    expected = logits(copy.deepcopy(model).to(dtype))
    compress(model, masks).save_pretrained(tmp_path)
    assert_same(
        logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, experts_implementation="eager")),
        expected,
    )
    assert_same(logits(model.to(dtype)), expected)


def test_one_parameter_alone_keeps_its_neighbour_dense() -> None:
    model, masks = pruned("mixtral")
    expected = logits(model)
    compress(model, {PART: masks[PART]})
    assert list(compressed_tensors(model)[0]) == [PART]
    assert model.get_parameter(PART.replace("down", "gate_up")).shape == (4, 64, 16)
    assert torch.equal(logits(model), expected)
    found = {layer.name: layer.sparsity for layer in report(model).layers}
    assert found[PART] > 0.6
    assert len(found) == len(masks)


def test_no_expert_kept_and_one_kept_whole(tmp_path: Path) -> None:
    model, masks = pruned("mixtral")
    mask = masks[PART] = torch.zeros_like(masks[PART])
    mask.view(4, 4, 32)[2] = True
    masks[PART.replace(".1.", ".0.")][:] = False
    with torch.no_grad():
        for name in (PART, PART.replace(".1.", ".0.")):
            model.get_parameter(name).mul_(masks[name].repeat_interleave(4, 0).view(4, 16, 32))
    expected = logits(model)
    compress(model, masks).save_pretrained(tmp_path)
    assert model.get_parameter(PART.replace(".1.", ".0.")).shape == (0, 4, 1)
    assert_same(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_it_trains_and_pruned_blocks_stay_absent(tmp_path: Path) -> None:
    saved(tmp_path)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    dense = load_dense(tf.AutoModelForCausalLM, tmp_path)
    ids = torch.randint(1, 40, (2, 8))
    for each in (model, dense):
        each.train()(input_ids=ids, labels=ids).loss.backward()
    layer = compressed_tensors(model)[0][PART]
    values, full = model.get_parameter(PART), dense.get_parameter(PART)
    kept = compressed_experts(model)[PART.rpartition(".")[0]].dense_weights()["down_proj"] != 0
    assert values.grad is not None and values.grad.shape == layer.values_shape
    assert values.grad.abs().sum() > 0
    torch.testing.assert_close(values.grad.abs().sum(), (full.grad * kept).abs().sum(), rtol=1e-4, atol=1e-6)
    torch.optim.SGD(model.parameters(), 0.1).step()
    after = logits(model)
    assert not torch.equal(after, logits(dense)), "what was laid out before is laid out anew"
    assert torch.equal(logits(decompress(model)), after)


def test_copies_and_pickles(tmp_path: Path) -> None:
    expected = saved(tmp_path)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    logits(model)
    assert_same(logits(copy.deepcopy(model)), expected)
    torch.save(model, tmp_path / "whole.pt")
    assert_same(logits(torch.load(tmp_path / "whole.pt", weights_only=False)), expected)
    module = next(iter(compressed_experts(model).values()))
    again = pickle.loads(pickle.dumps(module))
    assert isinstance(again, BlockSparseExperts)
    assert again.layer_formats() == module.layer_formats()
    assert "kept=" in repr(module) and "MixtralExperts" in repr(module)


def test_hooks_run_once() -> None:
    model, masks = pruned("mixtral")
    compress(model, masks)
    calls: list[str] = []
    for name, module in compressed_experts(model).items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    logits(model)
    logits(model)
    assert calls == [*compressed_experts(model)] * 2


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(16, 32, dtype=torch.bool), None),
        (torch.ones(1, 32, dtype=torch.bool), r"blocks of \(64, 1\) would lie in two of the \[4, 16, 32\] experts"),
        (torch.ones(3, 32, dtype=torch.bool), "does not divide the weight of"),
        (torch.zeros(16, 32, dtype=torch.bool), "weights in pruned blocks of .* are not zero and would be lost"),
    ],
)
def test_masks_of_experts_are_checked(mask: torch.Tensor, message: str | None) -> None:
    model = mixture("mixtral")
    if message is None:
        assert not compressed_tensors(compress(model, {PART: mask}))[0]
        return
    with pytest.raises(ValueError, match=message):
        compress(model, {PART: mask})
    assert not compressed_tensors(model)[0]


def test_names_that_are_no_weights() -> None:
    mask = torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="which is a MixtralExperts and no plain linear"):
        compress(mixture("mixtral"), {PART.rpartition(".")[0]: mask})
    with pytest.raises(ValueError, match=r"has no such module; the closest linear is \['.*gate_up_proj'\]"):
        compress(mixture("mixtral"), {PART.replace("down", "gateup"): mask})
    with pytest.raises(ValueError, match="has no such module"):
        compress(gpt_oss(), {PART: mask})


def test_compressed_twice_is_refused() -> None:
    model, masks = pruned("mixtral")
    compress(model, {PART: masks[PART]})
    with pytest.raises(ValueError, match=f"{PART} is compressed already"):
        compress(model, masks)


def _entry(key: str, value: Any) -> Any:
    return lambda modules: modules[PART].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_entry("dense_shape", [16, 4, 32]), r"the model has \[4, 16, 32\]"),
        (_entry("dense_shape", [8, 8, 32]), r"config.json says dense_shape \[8, 8, 32\], the model has \[4, 16, 32\]"),
        (_entry("dense_shape", [64, 32]), "which is not stored|is in none of the files"),
        (_entry("dense_shape", [4, 16, 16]), "should be U8 of shape"),
        (_entry("dense_shape", [2**20, 2**20, 2**20]), "at most 1099511627776 weights"),
        (_entry("dense_shape", [4, 0, 32]), "must be positive"),
        (_entry("dense_shape", [2, 2, 16, 32]), "must be two or three integers"),
        (_entry("block_shape", [8, 1]), "should be .* of shape"),
        (_entry("block_shape", [32, 1]), r"\[32, 1\] do not tile a weight of \[16, 32\], one of each expert"),
        (_entry("kept", 10**9), "kept=1000000000, but the grid"),
        (_entry("transposed", 1), "'transposed' does not go with the experts"),
        (lambda modules: modules.pop(PART), f"holds {PART}_block_mask, but config.json does not list"),
        (lambda modules: modules.update({PART + "x": modules.pop(PART)}), "is in none of the files"),
        (
            lambda modules: modules.update(
                {QUERY + ".weight": {**modules.pop(QUERY), "dense_shape": [1, 16, 16]}}
            ),
            "the compressed experts '.*q_proj.weight', which are no fused experts here",
        ),
    ],
)  # fmt: skip
def test_hostile_entries(change: Any, message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    damage.edit_modules(tmp_path, change)
    for ignore in (False, True):
        with pytest.raises(FormatError, match=message):
            tf.AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=ignore)


def test_hostile_versions_bitmaps_and_tensors(tmp_path: Path) -> None:
    def refuses(name: str, message: str, change: Any) -> None:
        folder = tmp_path / name
        saved(folder)
        change(folder)
        with pytest.raises(FormatError, match=message):
            tf.AutoModelForCausalLM.from_pretrained(folder)

    def version(number: Any) -> Any:
        return lambda folder: damage.edit_config(
            folder, lambda config: config["quantization_config"].update(format_version=number)
        )

    refuses("one", r"'dense_shape' must be two integers, found \[4, (64, 16|16, 32)\]", version(1))
    refuses("three", "format_version 3 is newer than this hf_sparse, which reads up to 2", version(3))
    refuses("lost", f"{PART} is in none of the files", lambda f: damage.drop_tensor(f, PART))
    refuses("mask", f"{PART}_block_mask is in none", lambda f: damage.drop_tensor(f, PART + "_block_mask"))
    refuses("header", "its header says hf_sparse_format_version='1', config.json says 2", lambda f: damage.edit_header(
        f, lambda header: header["__metadata__"].update(hf_sparse_format_version="1")))  # fmt: skip


def test_values_of_experts_of_another_kind_of_module(tmp_path: Path) -> None:
    # The entry fits the file, and the file does not fit the model.
    saved(tmp_path)
    damage.edit_config(tmp_path, lambda config: config.update(num_local_experts=8))
    with pytest.raises(FormatError, match=r"dense_shape \[4, 16, 32\], the model has \[8, 16, 32\]"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_under_the_compiler() -> None:
    model, masks = pruned("mixtral")
    compress(model, masks)
    module = next(iter(compressed_experts(model).values())).eval()
    x, index, weights = torch.randn(6, 16), torch.tensor([[0, 1], [3, 2]] * 3), torch.rand(6, 2)
    with torch.no_grad():
        assert_same(torch.compile(module, backend="eager")(x, index, weights), module(x, index, weights))


@pytest.mark.parametrize("name", MIXTURES)
def test_folders_tensor_by_tensor(name: str, tmp_path: Path) -> None:
    model, masks = pruned(name)
    expected = logits(model)
    with under_own_names(model):
        model.save_pretrained(tmp_path / "dense")
    (tmp_path / "small").mkdir()
    (tmp_path / "again").mkdir()
    formats = compress_folder(tmp_path / "dense", tmp_path / "small", (4, 1))
    saved(tmp_path / "whole", name)
    assert damage.read(tmp_path / "small" / "model.safetensors")[0].keys() == damage.read(
        tmp_path / "whole" / "model.safetensors"
    )[0].keys()  # fmt: skip
    assert formats == compressed_tensors(compress(model, block_shape=(4, 1)))[0]
    assert set(formats) == set(masks)
    loaded = type(model).from_pretrained(tmp_path / "small")
    assert_same(logits(loaded), expected)
    decompress_folder(tmp_path / "small", tmp_path / "again")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("dense", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert_same(logits(type(model).from_pretrained(tmp_path / "again")), expected)


def test_left_to_transformers_to_load(tmp_path: Path) -> None:
    # Where layers are offloaded, transformers fills the model, under the shapes that it was given.
    expected = saved(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
                  "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    kwargs: dict[str, Any] = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", **kwargs)
    for _ in range(2):
        assert_same(logits(model), expected)
    with pytest.raises(ValueError, match="layers.1.* is offloaded, so its weight is not at hand"):
        decompress(model)


def test_a_mixture_with_the_other_layout_is_compressed_around_its_experts(tmp_path: Path) -> None:
    model = gpt_oss().eval()
    masks = models.prune(model, (4, 1), 0.3)
    assert not any("experts" in name for name in masks)
    expected = logits(model)
    compress(model, masks).save_pretrained(tmp_path)
    assert_same(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    assert [kind.count for kind in report(model).not_pruned] == [2, 2]
    assert report(tmp_path).to_dict()["not_pruned"]
    assert not any(isinstance(t, ExpertsWeight) for t in find_targets(gpt_oss()).values())

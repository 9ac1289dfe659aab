from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_sparse import BlockMasks, compress, report
from hf_sparse.core.bits import Bitmap
from hf_sparse.core.report import SparsityReport
from hf_sparse.core.stored.packing import FormatError
from hf_sparse.core.structure.targets import find_targets
from tests.inference import damage, models

LAYER = "bert.encoder.layer.0.output.dense"


@pytest.fixture(autouse=True)
def _dense_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", "dense")


def by_name(result: SparsityReport) -> dict[str, object]:
    return {layer.name: layer for layer in result.layers}


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "llama"])
def test_memory_and_folder_agree(family: str, tmp_path: Path) -> None:
    model, masks = models.pruned(family)
    compress(model, masks)
    model.save_pretrained(tmp_path)
    in_memory, on_disk = report(model), report(tmp_path)
    assert by_name(in_memory) == by_name(on_disk)
    assert in_memory.sparsity == on_disk.sparsity
    assert set(by_name(in_memory)) == set(masks)
    assert (in_memory.bytes, in_memory.dense_bytes) == (on_disk.bytes, on_disk.dense_bytes)


def test_numbers_are_those_of_the_masks(tmp_path: Path) -> None:
    model, masks = models.pruned("bert")
    compress(model, masks).save_pretrained(tmp_path)
    result = report(tmp_path)
    for layer in result.layers:
        mask = masks[layer.name]
        assert (layer.kept_blocks, layer.total_blocks) == (int(mask.sum()), mask.numel())
        assert layer.block_shape == (4, 1)
        assert layer.bytes == int(mask.sum()) * 16 + (mask.numel() + 7) // 8
        assert layer.dense_bytes == mask.numel() * 16
        assert layer.sparsity == pytest.approx(1 - mask.float().mean().item())
    kept = sum(int(m.sum()) for m in masks.values())
    assert result.sparsity == pytest.approx(1 - kept / sum(m.numel() for m in masks.values()))
    stored = load_file(tmp_path / "model.safetensors")
    assert result.bytes == sum(t.numel() * t.element_size() for t in stored.values())
    assert result.dense_bytes == sum(p.numel() * 4 for p in models.make("bert").parameters())


def test_dense_models_count_their_zeros(tmp_path: Path) -> None:
    model, masks = models.pruned("bert")
    model.save_pretrained(tmp_path)
    for result in (report(model), report(tmp_path)):
        layers = {layer.name: layer for layer in result.layers}
        assert set(layers) == set(masks)
        for name, mask in masks.items():
            assert layers[name].block_shape == (1, 1)
            assert layers[name].kept_blocks == int(mask.sum()) * 4
        assert result.bytes == result.dense_bytes


def test_masks_of_a_model_in_training_give_the_blocks() -> None:
    model, masks = models.pruned("bert")
    model.get_submodule(LAYER).block_mask = Bitmap(masks[LAYER])
    layer = next(layer for layer in report(model).layers if layer.name == LAYER)
    assert (layer.block_shape, layer.kept_blocks) == ((4, 1), int(masks[LAYER].sum()))


def test_masks_that_the_weights_have_left_do_not_count() -> None:
    model = models.make("bert")
    masks = BlockMasks.for_model(model, (4, 1))
    masks.choose(0.5)
    masks.apply_()
    assert (report(model).sparsity, report(model).stale_masks) == (0.5, ())
    before = str(report(model))
    with torch.no_grad():
        model.get_submodule(LAYER).weight.fill_(0.1)
    result = report(model)
    layer = by_name(result)[LAYER]
    assert (layer.block_shape, layer.kept_blocks, layer.total_blocks) == ((1, 1), 16 * 32, 16 * 32)
    assert result.stale_masks == (LAYER,)
    assert result.sparsity == pytest.approx(0.5 * (1 - 16 * 32 / 4096))
    said = f"1 layer(s) changed since they were pruned and are reported as dense: blocks that the mask on {LAYER}"
    assert said in str(result) and "changed" not in before
    assert json.loads(json.dumps(result.to_dict()))["stale_masks"] == [LAYER]
    # Compressed in memory, the layer stays dense, and its mask goes with it.
    again = report(compress(copy.deepcopy(model), block_shape=(4, 1)))
    assert again.stale_masks == (LAYER,) and again.sparsity == result.sparsity


def test_masks_on_the_meta_device_are_trusted() -> None:
    model = models.make("bert").to("meta")
    for module in find_targets(model).values():
        module.block_mask = Bitmap(torch.rand(module.weight.shape[0] // 4, module.weight.shape[1]) < 0.5)
    assert report(model).stale_masks == () and 0.3 < report(model).sparsity < 0.7


def test_dtypes_and_shards(tmp_path: Path) -> None:
    model, masks = models.pruned("bert")
    compress(model.to(torch.bfloat16), masks).save_pretrained(tmp_path, max_shard_size="2KB")
    result = report(tmp_path)
    assert by_name(result) == by_name(report(model))
    layer = next(layer for layer in result.layers if layer.name == LAYER)
    assert layer.dense_bytes == 16 * 32 * 2


def test_dict_is_json_and_text_is_a_table(tmp_path: Path) -> None:
    model, masks = models.pruned("bert")
    compress(model, masks)
    result = report(model)
    data = json.loads(json.dumps(result.to_dict()))
    assert set(data) == {"sparsity", "bytes", "dense_bytes", "layers"}
    assert set(data["layers"][0]) == {
        "name", "shape", "block_shape", "kept_blocks", "total_blocks", "bytes", "dense_bytes", "sparsity",
    }  # fmt: skip
    lines = str(result).splitlines()
    assert len(lines) == len(masks) + 2
    assert lines[0].split() == ["layer", "shape", "block", "kept", "of", "sparsity", "bytes"]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[-1].startswith(f"12 layers, sparsity {result.sparsity:.2%}; whole model {result.bytes:,} of")


def test_a_model_without_linears() -> None:
    result = report(nn.Embedding(3, 4))
    assert (result.layers, result.sparsity, result.bytes) == ([], 0.0, 48)
    assert "0 layers, sparsity 0.00%" in str(result)


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        report(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds no model"):
        report(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match="is not JSON"):
        report(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["[]", "3", '{"quantization_config": 5}', '{"quantization_config": {"quant_method": "hf_sparse", "modules": 3}}'],
)
def test_configs_of_another_kind(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="config.json"):
        report(tmp_path)


def test_damaged_folders(tmp_path: Path) -> None:
    damage.save(tmp_path)
    damage.edit_modules(tmp_path, lambda modules: modules.update({"ghost": modules[LAYER]}))
    with pytest.raises(FormatError, match="lists 'ghost' in config.json but stores no weight"):
        report(tmp_path)
    damage.save(tmp_path)
    damage.edit_bitmap(tmp_path, lambda bitmap: bitmap.__setitem__(0, bitmap[0] ^ 1))
    with pytest.raises(FormatError, match=r"keeps \d+ blocks, config.json says \d+"):
        report(tmp_path)
    damage.save(tmp_path)
    damage.edit_modules(tmp_path, lambda modules: modules[LAYER].update(kept=1))
    with pytest.raises(FormatError, match="config.json says"):
        report(tmp_path)
    damage.save(tmp_path)
    damage.drop_tensor(tmp_path, LAYER + ".weight_block_mask")
    with pytest.raises(FormatError, match="weight_block_mask"):
        report(tmp_path)
    damage.save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        report(tmp_path)


def test_a_newer_version(tmp_path: Path) -> None:
    damage.save(tmp_path)
    damage.edit_config(tmp_path, lambda config: config["quantization_config"].update(format_version=3))
    with pytest.raises(FormatError, match="format_version"):
        report(tmp_path)

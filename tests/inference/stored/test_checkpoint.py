"""Damage: whatever is wrong with a folder, it loads exactly right or raises an error that names what is wrong."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from hf_sparse.core.stored.packing import FormatError
from hf_sparse.core.stored.reading import open_file
from hf_sparse.inference.stored.checkpoint import CHECKSUM_KEY, VERSION_KEY, header_strings, read_headers
from tests.inference.damage import (
    CONFIG,
    LAYER,
    WEIGHTS,
    drop_tensor,
    edit_bitmap,
    edit_config,
    edit_header,
    edit_modules,
    load,
    read,
    save,
    write,
)
from tests.inference.models import assert_same

VALUES, BITMAP = LAYER + ".weight", LAYER + ".weight_block_mask"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A compressed folder."""
    save(tmp_path)
    return tmp_path


def refuses(folder: Path, message: str, **kwargs: Any) -> None:
    # Asking for mismatches to be ignored must not turn damage into noise.
    for ignore in (False, True):
        with pytest.raises(FormatError, match=message) as caught:
            load(folder, ignore_mismatched_sizes=ignore, **kwargs)
        assert str(caught.value).count("\n") <= 2


def test_the_helpers_damage_nothing_by_themselves(folder: Path) -> None:
    expected = load(folder)
    edit_config(folder, lambda config: None)
    edit_header(folder, lambda header: None)
    drop_tensor(folder)
    edit_bitmap(folder, lambda bitmap: None)
    assert_same(load(folder), expected)


def entry(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda modules: modules[LAYER].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry("kept", 10**18), rf"modules\['{LAYER}'\]: kept=10+, but the grid \(4, 16\) has 64 blocks"),
        (entry("kept", -1), "kept=-1"),
        (entry("kept", 19.0), "'kept' must be a plain integer, found 19.0"),
        (entry("kept", "__import__('os')"), "must be a plain integer"),
        (entry("dense_shape", [2**40, 2**40]), "with at most 1099511627776 weights"),
        (entry("dense_shape", [16, 16, 1]), "must be two integers"),
        (
            entry("dense_shape", [32, 16]),
            rf"{VALUES}_block_mask should be U8 of shape \[16\], found U8 of shape \[8\]",
        ),
        (entry("block_shape", [3, 1]), r"blocks of \[3, 1\] do not tile a weight of \[16, 16\]"),
        (entry("block_shape", [0, 1]), "must be positive"),
        (
            entry("block_shape", [2, 2]),
            rf"{VALUES} should be .* of shape \[\d+, 2, 2\], found F32 of shape \[\d+, 4, 1\]",
        ),
        (entry("transposed", 1), rf"{LAYER}: .* and transposed=1, the model has \[16, 16\] and transposed=0"),
        (entry("transposed", True), "'transposed' must be 0 or 1, found True"),
        (entry("scale", 2), r"may hold 'transposed'; found .*'scale'"),
        (lambda modules: modules.pop(LAYER), rf"holds {BITMAP}, but config.json does not list the layer '{LAYER}'"),
        (
            lambda modules: modules.update({"bert.encoder.layer.9.x": modules[LAYER]}),
            "bert.encoder.layer.9.x.weight is in none of the files",
        ),
        (
            lambda modules: modules.update({"bert.embeddings.word_embeddings": modules[LAYER]}),
            r"bert.embeddings.word_embeddings.weight should be .* found F32 of shape \[50, 16\]",
        ),
        (
            lambda modules: modules.update({LAYER: modules["bert.encoder.layer.1.attention.self.query"]}),
            rf"{VALUES} should be",
        ),
    ],
)
def test_modules(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit_modules(folder, change)
    refuses(folder, message)


def test_kept_of_another_layer_names_expected_and_found(folder: Path) -> None:
    kept = json.loads((folder / CONFIG).read_text())["quantization_config"]["modules"][LAYER]["kept"]
    edit_modules(folder, entry("kept", kept + 1))
    refuses(folder, rf"{WEIGHTS}: {VALUES} should be .*\[{kept + 1}, 4, 1\], found F32 of shape \[{kept}, 4, 1\]")


def test_a_newer_version(folder: Path) -> None:
    edit_config(folder, lambda config: config["quantization_config"].update(format_version=3, layout="banded"))
    refuses(folder, "format_version 3 is newer than this hf_sparse")


def test_an_unknown_key(folder: Path) -> None:
    edit_config(folder, lambda config: config["quantization_config"].update(zero_point=1))
    refuses(folder, "format 1 has no key 'zero_point'")


def test_a_header_of_another_version(folder: Path) -> None:
    edit_header(folder, lambda header: header["__metadata__"].update({VERSION_KEY: "2"}))
    refuses(folder, rf"{WEIGHTS}: its header says {VERSION_KEY}='2', config.json says 1")


def test_headers_without_our_strings_load(folder: Path) -> None:
    expected = load(folder)
    edit_header(folder, lambda header: header.update(__metadata__={"format": "pt"}))
    assert_same(load(folder), expected)


def test_layers_that_the_model_lacks(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(num_hidden_layers=1))
    refuses(folder, r"layer 'bert.encoder.layer.1.\S+', which BertForSequenceClassification as configured lacks")


def test_layers_that_the_checkpoint_lacks(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(num_hidden_layers=3))
    refuses(
        folder, r"the checkpoint has no tensor bert.encoder.layer.2.\S+, which BertForSequenceClassification needs"
    )
    with pytest.raises(FormatError, match="the checkpoint has no tensor encoder.layer.2"):
        tf.AutoModel.from_pretrained(folder)


@pytest.mark.parametrize(("key", "value"), [("hidden_size", 32), ("intermediate_size", 64)])
def test_layers_of_another_shape(folder: Path, key: str, value: int) -> None:
    edit_config(folder, lambda config: config.update({key: value}))
    refuses(folder, r"dense_shape \[\d+, \d+\] and transposed=0, the model has \[\d+, \d+\]")


@pytest.mark.parametrize("size", [49, 10**13])
def test_embeddings_of_another_shape_are_not_allocated(folder: Path, size: int) -> None:
    edit_config(folder, lambda config: config.update(vocab_size=size))
    refuses(folder, rf"word_embeddings.weight has shape \[50, 16\], expected \[{size}, 16\]")


def test_a_layer_that_is_no_linear(folder: Path) -> None:
    # A norm has a weight, too.
    norm = "bert.encoder.layer.0.output.LayerNorm"

    def rename(header: dict[str, Any]) -> None:
        header[norm + ".weight"] = header.pop(VALUES)
        header[norm + ".weight_block_mask"] = header.pop(BITMAP)
        header["__metadata__"].pop(CHECKSUM_KEY)

    drop_tensor(folder, norm + ".weight")
    edit_header(folder, rename)
    edit_modules(folder, lambda modules: modules.update({norm: modules.pop(LAYER)}))
    refuses(folder, rf"lists the compressed layer '{norm}', which is a LayerNorm here")


@pytest.mark.parametrize(
    "name",
    [VALUES, BITMAP, LAYER + ".bias", "bert.encoder.layer.1.output.LayerNorm.weight", "bert.pooler.dense.weight"],
)
def test_a_missing_tensor(folder: Path, name: str) -> None:
    drop_tensor(folder, name)
    refuses(folder, rf"{name} is in none of the files: .*{WEIGHTS}|no tensor {name}")


def test_a_missing_tensor_beside_compressed_layers_in_another_class(folder: Path) -> None:
    drop_tensor(folder, LAYER + ".bias")
    with pytest.raises(FormatError, match="the checkpoint has no tensor encoder.layer.0.attention.self.query.bias"):
        tf.AutoModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (VALUES, {"dtype": "I32"}, rf"{VALUES} should be F64 or F32 or F16 or BF16 of shape .*, found I32"),
        (BITMAP, {"dtype": "I8"}, rf"{BITMAP} should be U8 of shape \[8\], found I8"),
        (BITMAP, {"shape": [2, 4]}, rf"{BITMAP} should be U8 of shape \[8\], found U8 of shape \[2, 4\]"),
        (LAYER + ".bias", {"dtype": "U32"}, rf"{LAYER}.bias has dtype U32, expected torch.float32"),
        (LAYER + ".bias", {"shape": [4, 4]}, rf"{LAYER}.bias has shape \[4, 4\], expected \[16\]"),
    ],
)
def test_tensors_of_another_kind(folder: Path, name: str, change: dict[str, Any], message: str) -> None:
    edit_header(folder, lambda header: header[name].update(change))
    refuses(folder, message)


def flip(bitmap: bytearray) -> None:
    bitmap[2] ^= 1


def swap(bitmap: bytearray) -> None:
    pairs = [(i, j) for i in range(len(bitmap)) for j in range(i) if bitmap[i] != bitmap[j]]
    i, j = pairs[0]
    bitmap[i], bitmap[j] = bitmap[j], bitmap[i]


def test_a_flipped_bit(folder: Path) -> None:
    edit_bitmap(folder, flip)
    refuses(folder, rf"{WEIGHTS}: {BITMAP} keeps \d+ blocks, config.json says \d+")


def test_moved_bits_of_the_same_number(folder: Path) -> None:
    edit_bitmap(folder, swap)
    refuses(folder, rf"{WEIGHTS}: the bitmaps have the checksum \w{{8}}, its header says \w{{8}}")


def test_one_layer_under_two_names(folder: Path) -> None:
    # With and without the prefix of the model, both would be read into one layer.
    bare = LAYER.removeprefix("bert.")
    tensors = load_file(folder / WEIGHTS)
    again = {bare + key.removeprefix(LAYER): t.clone() for key, t in tensors.items() if key.startswith(LAYER)}
    save_file({**tensors, **again}, folder / WEIGHTS, metadata={"format": "pt"})
    edit_modules(folder, lambda modules: modules.update({bare: modules[LAYER]}))
    refuses(folder, rf"the checkpoint holds {VALUES} twice, as ({VALUES}|{bare}.weight) and as ")


def test_bits_beyond_the_grid(tmp_path: Path) -> None:
    from hf_sparse import compress
    from tests.inference import models

    # 12 blocks leave 4 bits of the second byte unused.
    model = models.make("bert")
    weight = model.get_submodule(LAYER).weight.data
    weight[:4, :4] = 0
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0, 0] = False
    compress(model, {LAYER: mask}).save_pretrained(tmp_path)
    entry = json.loads((tmp_path / CONFIG).read_text())["quantization_config"]["modules"][LAYER]
    assert entry == {"block_shape": [4, 4], "kept": 15, "dense_shape": [16, 16]}
    model = models.make("bert")
    model.get_submodule(LAYER).weight.data[:16, :4] = 0
    compress(model, {LAYER: torch.tensor([[False, True, True, True]])}).save_pretrained(tmp_path)
    edit_bitmap(tmp_path, lambda bitmap: bitmap.__setitem__(0, bitmap[0] | 0x80))
    refuses(tmp_path, rf"{BITMAP}: the bitmap sets bits beyond the 4 blocks of its 1 x 4 grid")


@pytest.mark.parametrize("share", [0.0, 0.0003, 0.0005, 0.1, 0.3, 0.5, 0.9, 0.9999])
def test_truncated_files(folder: Path, share: float) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(len(data) * share)])
    refuses(folder, rf"{WEIGHTS} is not a whole safetensors file")


@pytest.mark.parametrize("length", [0, 2**32, 2**63 - 1, 2**64 - 1])
def test_absurd_header_lengths(folder: Path, length: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + data[8:])
    refuses(folder, "is not a whole safetensors file")


@pytest.mark.parametrize("content", [b"\0" * 64, b"<html>404</html>", b"PK\x03\x04" + b"\0" * 99], ids=len)
def test_files_of_another_kind(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    refuses(folder, "is not a whole safetensors file")


def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(OSError, match=WEIGHTS):
        load(folder)


def test_weights_as_pickles_are_not_opened(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    refuses(folder, "pytorch_model.bin: a compressed model is stored as safetensors; other files are not opened")


def test_a_state_dict_instead_of_files(folder: Path) -> None:
    config = tf.AutoConfig.from_pretrained(folder)
    with pytest.raises(FormatError, match="loaded from its safetensors files, and none were given"):
        tf.BertForSequenceClassification.from_pretrained(None, config=config, state_dict={})


def test_config_json_cut_short(folder: Path) -> None:
    data = (folder / CONFIG).read_bytes()
    (folder / CONFIG).write_bytes(data[: len(data) // 2])
    with pytest.raises((OSError, ValueError), match="JSON"):
        load(folder)


def test_config_json_without_the_quantization_config(folder: Path) -> None:
    edit_config(folder, lambda config: config.pop("quantization_config"))
    with pytest.raises(RuntimeError, match="mismatch"):
        load(folder)


# Shards.


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A compressed folder in many files."""
    save(tmp_path, max_shard_size="2KB")
    return tmp_path


def test_a_missing_shard(shards: Path) -> None:
    sorted(shards.glob("*.safetensors"))[3].unlink()
    with pytest.raises((OSError, FormatError)):
        load(shards)


def test_a_truncated_shard(shards: Path) -> None:
    file = sorted(shards.glob("*.safetensors"))[3]
    file.write_bytes(file.read_bytes()[:-1])
    refuses(shards, f"{file.name} is not a whole safetensors file")


def test_an_index_that_leaves_a_shard_out(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    gone = sorted(set(content["weight_map"].values()))[4]
    content["weight_map"] = {key: file for key, file in content["weight_map"].items() if file != gone}
    index.write_text(json.dumps(content))
    refuses(shards, "is in none of the files|the checkpoint has no tensor|the bitmaps have the checksum")


def test_a_tensor_in_two_shards(shards: Path) -> None:
    first, second = sorted(shards.glob("*.safetensors"))[:2]
    header, data = read(first)
    other, more = read(second)
    name = next(key for key in other if key != "__metadata__")
    start, end = other[name]["data_offsets"]
    header[name] = {**other[name], "data_offsets": [len(data), len(data) + end - start]}
    write(first, header, bytes(data + more[start:end]))
    refuses(shards, f"{name} is stored twice, in .*{first.name} and in .*{second.name}")


# Reading and writing headers.


def test_headers_are_read_without_the_weights(tmp_path: Path) -> None:
    save(tmp_path)
    headers = read_headers([str(tmp_path / WEIGHTS)])
    assert headers.tensors[BITMAP].shape == (8,)
    assert headers.tensors[BITMAP].dtype == "U8"
    assert list(headers.checksums) == [str(tmp_path / WEIGHTS)]


def test_the_checksum_covers_names_and_bits() -> None:
    one, two = torch.tensor([1], dtype=torch.uint8), torch.tensor([2], dtype=torch.uint8)
    strings = header_strings({"a": one, "b": two})
    assert strings == header_strings({"b": two, "a": one})
    for other in ({"a": two, "b": one}, {"a": one, "c": two}, {"a": one}, {"a": one, "b": one}):
        assert header_strings(other)[CHECKSUM_KEY] != strings[CHECKSUM_KEY]
    assert all(isinstance(value, str) for value in strings.values())


def test_bits_that_are_not_at_hand_have_no_checksum() -> None:
    assert header_strings({"a": torch.empty(3, dtype=torch.uint8, device="meta")}) == {VERSION_KEY: "1"}


# Found by tests/fuzz.


@pytest.mark.parametrize("place", ["../{out}/{file}", "{top}/{out}/{file}", "sub/../../{out}/{file}"])
def test_a_shard_outside_of_the_folder_is_not_opened(
    shards: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = shards.parent / f"{shards.name}-outside"
    shutil.copytree(shards, outside)
    (shards / "sub").mkdir()
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = min(content["weight_map"].values())
    there = place.format(file=first, out=outside.name, top=shards.parent)
    content["weight_map"] = {key: there if file == first else file for key, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    seen: list[str] = []
    monkeypatch.setattr(
        "hf_sparse.inference.stored.checkpoint.open_file", lambda file: seen.append(file) or open_file(file)
    )
    refuses(shards, "lies outside of the folder of the model")
    assert not [file for file in seen if "outside" in file]


def test_a_shard_that_is_gone_is_named(shards: Path) -> None:
    gone = sorted(shards.glob("*.safetensors"))[2]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=f"{gone.name} is missing"):
        load(shards)


@pytest.mark.parametrize("layers", [4097, 2**31, 10**30])
def test_a_config_that_asks_for_endless_layers_is_refused_before_they_are_built(folder: Path, layers: int) -> None:
    edit_config(folder, lambda config: config.update(num_hidden_layers=layers))
    refuses(folder, f"config.json asks for {layers} layers")


def test_an_index_without_files_sends_nobody_to_another_folder(
    shards: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path_factory.mktemp("here")
    left = here / f".saved-{platform.node()}-999999999-x"
    left.mkdir()
    monkeypatch.chdir(here)
    (shards / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {}}')
    with pytest.raises(FormatError, match="none were given") as caught:
        load(shards)
    assert left.name not in str(caught.value)

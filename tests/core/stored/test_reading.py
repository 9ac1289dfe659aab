"""Files that anybody may have written: read, or refused by name in a line that somebody can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_sparse.core.stored.packing import FormatError
from hf_sparse.core.stored.reading import open_file, opened, read_config, read_object, weight_files

INDEX = "model.safetensors.index.json"


def refuses(file: Path, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read_object(file)
    assert str(caught.value).startswith(str(file))
    assert len(str(caught.value)) < 1200


def test_an_object_is_read_as_json_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for data in ({}, {"a": [1, 2.5, None, "é😀"]}):
        for ascii_only in (True, False):
            file.write_text(json.dumps(data, ensure_ascii=ascii_only), encoding="utf-8")
            assert read_object(file) == data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON: Expecting value"),
        (b"[]", "must hold an object, found a list"),
        (b'{"a": "\xff"}', "is not JSON: 'utf-8' codec can't decode"),
        (b'{"a": ' * 20_000, "is not JSON: maximum recursion depth exceeded"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
        (rb'{"a": "\ud800"}', "is not JSON: .*surrogates not allowed"),
    ],
)
def test_what_is_no_object_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    refuses(file, message)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        read_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors is missing"):
        open_file(tmp_path / "x.safetensors")


def test_a_file_is_opened_only_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(3)}, file)
    with opened(file) as handle:
        assert handle.get_tensor("w").tolist() == [1.0, 1.0, 1.0]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"a\.safetensors is not a whole safetensors file"), opened(file):
        pass


def test_the_single_file_comes_first_and_then_the_shards_of_the_index(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "other.safetensors", "model.safetensors"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "other.safetensors", "b": "model-1.safetensors"}}))
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    assert [file.name for file in weight_files(tmp_path)] == ["model-1.safetensors", "other.safetensors"]
    (tmp_path / "other.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks other\.safetensors, which its model"):
        weight_files(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="holds no model.safetensors and no"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "/a.safetensors", "sub/a.safetensors", "a\0.safetensors", "x" * 300 + ".safetensors", "..",
     "", "pytorch_model.bin", 3, None, ["a.safetensors"], "a\n.safetensors"],
)  # fmt: skip
def test_an_index_that_names_anything_else_is_refused(tmp_path: Path, name: object) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FormatError, match="which is no safetensors file of this folder"):
        weight_files(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_files_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(FormatError, match="is no index of weights"):
        weight_files(tmp_path)


def test_what_a_file_put_into_a_message_is_cut_short() -> None:
    assert str(FormatError("short")) == "short"
    long = str(FormatError("a" * 50_000 + "end"))
    assert long.startswith("aaa")
    assert long.endswith("end")
    assert len(long) < 1000

"""A compressed folder, and ways to damage it. tests/fuzz does it at random, again and again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as tf
from torch import Tensor

from hf_sparse import compress
from tests.inference import models

LAYER = "bert.encoder.layer.0.attention.self.query"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(folder: Path, **kwargs: Any) -> Tensor:
    """Save a compressed tiny BERT and give its logits."""
    model, masks = models.pruned("bert")
    compress(model, masks).save_pretrained(folder, **kwargs)
    return models.outputs(model, "bert")


def load(folder: Path, **kwargs: Any) -> Tensor:
    """Load it and give the logits."""
    return models.outputs(tf.AutoModelForSequenceClassification.from_pretrained(folder, **kwargs), "bert")


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the parsed config.json."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def edit_modules(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change `quantization_config["modules"]`."""
    edit_config(folder, lambda config: change(config["quantization_config"]["modules"]))


def read(file: Path) -> tuple[dict[str, Any], bytearray]:
    """Take a safetensors file apart: header, data."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])


def write(file: Path, header: dict[str, Any], data: bytes) -> None:
    """Put a safetensors file together, as it is told."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the parsed header of the weights file."""
    header, data = read(folder / WEIGHTS)
    change(header)
    write(folder / WEIGHTS, header, data)


def drop_tensor(folder: Path, *names: str) -> None:
    """Leave tensors out of the weights file, which stays a whole file."""
    header, data = read(folder / WEIGHTS)
    kept: dict[str, Any] = {"__metadata__": header.pop("__metadata__")}
    packed = bytearray()
    for name, entry in header.items():
        if name not in names:
            start, end = entry["data_offsets"]
            kept[name] = {**entry, "data_offsets": [len(packed), len(packed) + end - start]}
            packed += data[start:end]
    write(folder / WEIGHTS, kept, packed)


def edit_bitmap(folder: Path, change: Callable[[bytearray], object], layer: str = LAYER) -> None:
    """Change the bytes of a bitmap."""
    header, data = read(folder / WEIGHTS)
    start, end = header[layer + ".weight_block_mask"]["data_offsets"]
    bitmap = data[start:end]
    change(bitmap)
    data[start:end] = bitmap
    write(folder / WEIGHTS, header, data)

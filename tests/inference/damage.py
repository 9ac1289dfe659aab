"""A compressed folder, and ways to damage it. Run as a script it damages one at random, again and again.

The script is a process of its own, so that a crash, a hang or a huge allocation is the result of a test, not its end.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from hf_sparse import compress
from hf_sparse.core.packing import FormatError
from tests.inference import models

LAYER = "bert.encoder.layer.0.attention.self.query"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# What a loader may answer to damage. RuntimeError is how transformers says that dense shapes do not match.
ANSWERS = (FormatError, ValueError, OSError, RuntimeError)


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


def _flip_config(folder: Path, draw: random.Random) -> None:
    data = bytearray((folder / CONFIG).read_bytes())
    start = data.index(b'"quantization_config"')
    data[draw.randrange(start, len(data))] = draw.randrange(256)
    (folder / CONFIG).write_bytes(data)


def _replace_number(folder: Path, draw: random.Random) -> None:
    value = draw.choice([0, -1, 1, 3, 2**31, 2**63, 10**30, 1.5, "4", None, True, [], {}, [1, 2, 3], float("nan")])

    def change(modules: dict[str, Any]) -> None:
        entry = modules[draw.choice(sorted(modules))]
        key = draw.choice(sorted(entry))
        if isinstance(entry[key], list) and draw.random() < 0.7:
            entry[key][draw.randrange(2)] = value
        else:
            entry[key] = value

    edit_modules(folder, change)


def _move_modules(folder: Path, draw: random.Random) -> None:
    def change(modules: dict[str, Any]) -> None:
        names = sorted(modules)
        a, b = draw.sample(names, 2)
        action = draw.randrange(4)
        if action == 0:
            del modules[a]
        elif action == 1:
            modules[a], modules[b] = modules[b], modules[a]
        elif action == 2:
            modules[draw.choice([a + "x", "", "bert", "classifier", "bert.embeddings.word_embeddings"])] = modules[a]
        else:
            modules[a] = draw.choice([None, [], "x", 7, {}])

    edit_modules(folder, change)


def _flip_header(folder: Path, draw: random.Random) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    length = int.from_bytes(data[:8], "little")
    data[draw.randrange(8 + length)] = draw.randrange(256)
    (folder / WEIGHTS).write_bytes(data)


def _flip_bitmap(folder: Path, draw: random.Random) -> None:
    def change(bitmap: bytearray) -> None:
        for _ in range(draw.randint(1, 3)):
            bitmap[draw.randrange(len(bitmap))] = draw.randrange(256)

    edit_bitmap(folder, change)


def _swap_bitmap(folder: Path, draw: random.Random) -> None:
    def change(bitmap: bytearray) -> None:
        i, j = draw.sample(range(len(bitmap)), 2)
        bitmap[i], bitmap[j] = bitmap[j], bitmap[i]

    edit_bitmap(folder, change)


def _truncate(folder: Path, draw: random.Random) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: draw.randrange(len(data))])


def _edit_tensor(folder: Path, draw: random.Random) -> None:
    def change(header: dict[str, Any]) -> None:
        # A head of another shape is what ignore_mismatched_sizes asks to be replaced.
        name = draw.choice([key for key in sorted(header) if key.startswith("bert.")])
        entry = header[name]
        action = draw.randrange(4)
        if action == 0:
            entry["dtype"] = draw.choice(["F64", "F16", "I32", "U8", "BOOL", "F8_E4M3", "X", "U32"])
        elif action == 1:
            entry["shape"] = draw.choice([entry["shape"][::-1], [], [2**62, 2**62], [-1], [*entry["shape"], 1]])
        elif action == 2:
            entry["data_offsets"] = draw.choice([[0, 2**62], [8, 4], [0, 0], entry["data_offsets"][::-1]])
        else:
            header[name + "_"] = header.pop(name)

    edit_header(folder, change)


DAMAGES = (
    _flip_config,
    _replace_number,
    _move_modules,
    _flip_header,
    _flip_bitmap,
    _swap_bitmap,
    _truncate,
    _edit_tensor,
)


def sweep(folder: Path, count: int, seed: int, memory: int, seconds: int) -> dict[str, int]:
    """Damage and load `count` times; count the answers. A wrong answer goes on stderr and counts as "wrong"."""
    expected = save(folder / "whole")
    tally: Counter[str] = Counter()
    soft = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
    for number in range(count):
        damage = DAMAGES[number % len(DAMAGES)]
        shutil.rmtree(folder / "broken", ignore_errors=True)
        shutil.copytree(folder / "whole", folder / "broken")
        damage(folder / "broken", random.Random(seed * 1_000_003 + number))
        signal.alarm(seconds)
        try:
            found = load(folder / "broken", ignore_mismatched_sizes=number % 3 == 0)
            answer = "same" if torch.allclose(found, expected, rtol=1e-5, atol=1e-5) else "wrong"
        except ANSWERS as error:
            answer = type(error).__name__ if str(error).strip() else "wrong"
        except Exception as error:  # noqa: BLE001 (whatever else comes is what the sweep looks for)
            print(f"case {number} {damage.__name__}: {type(error).__name__}: {error}", file=sys.stderr)
            answer = "wrong"
        signal.alarm(0)
        if answer == "wrong":
            print(f"case {number} {damage.__name__}: wrong", file=sys.stderr)
        tally[answer] += 1
    return dict(tally)


if __name__ == "__main__":
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    print(json.dumps(sweep(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), memory=2**30, seconds=20)))

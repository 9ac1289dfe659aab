"""Seeded damage: to the text of a JSON file, to its tree, to bytes, and to the parts of a safetensors file."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

NASTY: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 8, 2**31, 2**63, 2**64, 10**30, -(2**63), 1.5, 1e308, float("nan"), float("inf"), None, True,
    False, "", "4", "x" * 3000, [], {}, [1, 2, 3], [[1]], [{}], {"a": 1}, "../../etc/passwd", "/dev/zero", "a\0b",
    "\ud800", "a\nb", "<script>alert(1)</script>", "javascript:alert(1)", "[x](http://127.0.0.1:9/)", "---\na: 1\n---",
    "__import__('os').system('touch EXECUTED')", "!!python/object/apply:os.system ['touch EXECUTED']", "hf_sparse",
    "{{ 7 * 7 }}", "{% for x in y %}", "file:///etc/passwd", "owner/kernel", "BertModel", "float16", "U8", "%s%n",
)  # fmt: skip
# Keys at which transformers would run code or fetch files if a config could make it.
TEMPTING: dict[str, Any] = {
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"},
    "attn_implementation": "owner/kernel",
    "custom_pipelines": {"text-classification": {"impl": "evil.Pipeline"}},
    "base_model_name_or_path": "../outside",
    "name_or_path": "../outside",
    "dequantize": True,
    "architectures": ["__import__"],
    "per_layer_config": {"0": {"intermediate_size": 16}},
    "dtype": "float64",
}
Path_ = tuple[Any, ...]


def places(tree: Any, path: Path_ = ()) -> list[Path_]:
    """List the path of every node below the root."""
    found: list[Path_] = []
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        found += [(*path, key), *places(child, (*path, key))]
    return found


def _parent(tree: Any, path: Path_) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def mutate_tree(tree: Any, draw: random.Random, focus: str | None = None) -> Any:
    """Change a JSON tree, in place, at one to three places; four times of five below `focus`, where it is in it."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        nodes = places(tree)
        near = [path for path in nodes if focus in path] if focus and draw.random() < 0.8 else nodes
        if not (near or nodes):
            return copy.deepcopy(draw.choice(NASTY))
        path = draw.choice(near or nodes)
        parent, key = _parent(tree, path), path[-1]
        action = draw.randrange(10)
        if action <= 2:
            # A copy: the next change may be one of what has been put in.
            parent[key] = copy.deepcopy(draw.choice(NASTY))
        elif action == 3:
            del parent[key]
        elif action == 4 and isinstance(parent, dict):
            parent[draw.choice((f"{key}x", "", "..", "bert", key.upper(), "weight"))] = parent.pop(key)
        elif action == 5:
            other = draw.choice(nodes)
            if path[: len(other)] != other and other[: len(path)] != path:
                there = _parent(tree, other)
                parent[key], there[other[-1]] = there[other[-1]], parent[key]
        elif action == 6 and isinstance(parent[key], int | float):
            parent[key] = parent[key] * draw.choice((-1, 2, 1.0, 1000)) + draw.choice((-1, 0, 1, 8))
        elif action == 7 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif action == 8 and isinstance(parent, dict):
            name = draw.choice(sorted(TEMPTING))
            parent[name] = copy.deepcopy(TEMPTING[name])
        else:
            parent[key] = draw.choice(([parent[key]], {"a": parent[key]}, str(parent[key])))
    return tree


def mutate_text(text: bytes, draw: random.Random) -> bytes:
    """Change the bytes of a text: flips, cuts, repeats, numbers replaced, nests that are far too deep."""
    data = bytearray(text)
    for _ in range(draw.choice((1, 1, 2, 4))):
        if not data:
            break
        at = draw.randrange(len(data))
        span = at + draw.randint(1, 40)
        action = draw.randrange(8)
        if action <= 1:
            data[at] = draw.randrange(256)
        elif action == 2:
            del data[at:span]
        elif action == 3:
            data[at:at] = data[at:span]
        elif action == 4:
            data[at:at] = draw.choice(
                (b"\0", b"\xff\xfe", b"\xed\xa0\x80", b",", b"}", b"]", b"NaN", b"1e999", b"null")
            )
        elif action == 5:
            digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
            if digits:
                data[draw.choice(digits)] = draw.randrange(48, 58)
        elif action == 6:
            del data[at:]
        else:
            data[at:at] = draw.choice((b"[" * 20_000, b'{"a":' * 20_000, b"9" * 6000, b" " * 1000))
    return bytes(data)


def harmless_text(text: bytes, draw: random.Random) -> bytes:
    """Write the same JSON another way: what reads it has to take it."""
    tree = json.loads(text)

    def shuffled(node: Any) -> Any:
        if isinstance(node, dict):
            # The order of the layers may matter to nobody, but that of labels is their meaning.
            keys = list(node)
            draw.shuffle(keys)
            return {key: shuffled(node[key]) for key in keys}
        return [shuffled(child) for child in node] if isinstance(node, list) else node

    return json.dumps(shuffled(tree), indent=draw.choice((None, 1, 4)), ensure_ascii=draw.random() < 0.5).encode()


def take_apart(file: Path) -> tuple[dict[str, Any], bytes]:
    """Give header and data of a safetensors file."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put_together(file: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    """Write a safetensors file, with whatever length its first eight bytes shall tell."""
    header += b" " * (-len(header) % 8)
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def mutate_safetensors(file: Path, draw: random.Random) -> str:
    """Damage a safetensors file and name what was done."""
    header, data = take_apart(file)
    action: Callable[..., str] = draw.choice(
        (_tree, _tree, _text, _length, _cut, _bitmap, _bitmap, _swap, _rename, _offsets, _values, _longer, _harmless)
    )
    return action(file, header, data, draw) or action.__name__


def _dump(header: Any) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _tree(file: Path, header: dict[str, Any], data: bytes, draw: random.Random) -> str:
    put_together(file, _dump(mutate_tree(header, draw)), data)
    return "header"


def _text(file: Path, header: dict[str, Any], data: bytes, draw: random.Random) -> str:
    put_together(file, mutate_text(_dump(header), draw), data)
    return "header text"


def _length(file: Path, header: dict[str, Any], data: bytes, draw: random.Random) -> str:
    text = _dump(header)
    length = draw.choice((0, 1, 7, len(text) - 1, len(text) + 8, 2**31, 2**63, 2**64 - 1, len(text) + len(data)))
    put_together(file, text, data, length)
    return "length"


def _cut(file: Path, header: dict[str, Any], data: bytes, draw: random.Random) -> str:
    raw = file.read_bytes()
    file.write_bytes(raw[: draw.choice((draw.randrange(len(raw)), len(raw) - 1, 8, 0))])
    return "cut"


def _masks(header: dict[str, Any]) -> list[str]:
    return [name for name in sorted(header) if name.endswith("_block_mask")]


def _bitmap(file: Path, header: dict[str, Any], data: bytes, draw: random.Random) -> str:
    start, end = header[draw.choice(_masks(header))]["data_offsets"]
    changed = bytearray(data)
    action = draw.randrange(4)
    if action == 0:
        changed[draw.randrange(start, end)] ^= 1 << draw.randrange(8)
    elif action == 1:
        i, j = draw.randrange(start, end), draw.randrange(start, end)
        changed[i], changed[j] = changed[j], changed[i]
    elif action == 2:
        changed[start:end] = draw.randbytes(end - start)
    else:
        changed[start:end] = draw.choice((b"\0", b"\xff")) * (end - start)
    if draw.random() < 0.5:
        # Without its checksum, so that only the other checks are left.
        header["__metadata__"] = {"format": "pt"}
    put_together(file, _dump(header), bytes(changed))
    return "bitmap"


def _swap(file: Path, header: dict[str, Any], data: bytes, draw: random.Random) -> str:
    one, two = draw.sample([name for name in sorted(header) if name != "__metadata__"], 2)
    key = draw.choice(("data_offsets", "shape", "dtype"))
    header[one][key], header[two][key] = header[two][key], header[one][key]
    put_together(file, _dump(header), data)
    return "swap"


def _rename(file: Path, header: dict[str, Any], data: bytes, draw: random.Random) -> str:
    names = [name for name in sorted(header) if name != "__metadata__"]
    one = draw.choice(names)
    new = draw.choice(
        (one + "_", "", one.removeprefix("bert."), "bert." + one, one + "_block_mask", draw.choice(names))
    )
    header[new] = header.pop(one)
    put_together(file, _dump(header), data)
    return "rename"


def _offsets(file: Path, header: dict[str, Any], data: bytes, draw: random.Random) -> str:
    entry = header[draw.choice([name for name in sorted(header) if name != "__metadata__"])]
    start, end = entry["data_offsets"]
    entry["data_offsets"] = draw.choice(
        ([end, start], [0, 2**62], [start, end + 8], [start + 4, end + 4], [-8, end], [start], [start, start])
    )
    put_together(file, _dump(header), data)
    return "offsets"


def _values(file: Path, header: dict[str, Any], data: bytes, draw: random.Random) -> str:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    put_together(file, _dump(header), bytes(changed))
    return "values"


def _longer(file: Path, header: dict[str, Any], data: bytes, draw: random.Random) -> str:
    put_together(file, _dump(header), data + draw.randbytes(draw.choice((1, 8, 4096))))
    return "longer"


def _harmless(file: Path, header: dict[str, Any], data: bytes, draw: random.Random) -> str:
    put_together(file, harmless_text(_dump(header), draw), data)
    return "harmless"

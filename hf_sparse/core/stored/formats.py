"""What config.json says of a stored model: one entry per compressed weight (docs/format.md).

Nothing here trusts a file: whatever is read is checked, and refused with a `FormatError`.

Shape letters: E experts; O, I out and in features; h, w block height and width; R, C grid rows and columns; N kept
blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hf_sparse.core.blocks import BlockShape, grid_shape

# The newest version that is read. What is written has the lowest that can say it: `version_of`.
FORMAT_VERSION = 2
QUANT_METHOD = "hf_sparse"
MASK_SUFFIX = "_block_mask"

# No weight of a real layer comes near; what does is a damaged or hostile config and must not be allocated.
MAX_WEIGHT_ELEMENTS = 2**40

# Two lines of names and numbers fit; a page that somebody put into a config does not.
_MAX_MESSAGE = 1000


class FormatError(ValueError):
    """A file or config is no valid hf_sparse checkpoint. The message names the file or layer, expected and found.

    What a hostile file put into a message is cut short, so that it stays one that somebody can read.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


def shortened(message: str) -> str:
    """Cut what is longer than somebody would read."""
    return message if len(message) <= _MAX_MESSAGE else f"{message[:400]} [...] {message[-200:]}"


@dataclass(frozen=True, kw_only=True)
class LayerFormat:
    """What `config.json` says of one stored layer: an entry of `quantization_config["modules"]`.

    Attributes:
        block_shape: (h, w), both positive, dividing the dense shape.
        kept: N, the number of stored blocks, 0 <= N <= R * C.
        dense_shape: (O, I), output rows first also where the dense layer stores [in, out]. Of fused experts (E * O,
            I): the rows of all experts, one expert after the other.
        transposed: True for `Conv1D` layers, whose dense weight is stored [I, O].
        experts: E where the weight is a parameter [E, O, I] of fused experts, 0 where it is that of a linear. No block
            lies in two experts.
    """

    block_shape: BlockShape
    kept: int
    dense_shape: tuple[int, int]
    transposed: bool = False
    experts: int = 0

    @cached_property
    def grid(self) -> tuple[int, int]:
        """(R, C)."""
        return grid_shape(self.dense_shape, self.block_shape)

    @property
    def num_blocks(self) -> int:
        """R * C."""
        return self.grid[0] * self.grid[1]

    @property
    def mask_bytes(self) -> int:
        """Length of the bitmap: one bit per block, rounded up to whole bytes."""
        return (self.num_blocks + 7) // 8

    @property
    def values_shape(self) -> tuple[int, int, int]:
        """(N, h, w)."""
        return (self.kept, *self.block_shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight as its module holds it: [O, I], [I, O] where transposed, [E, O, I] of experts."""
        rows, cols = self.dense_shape
        if self.experts:
            return (self.experts, rows // self.experts, cols)
        return (cols, rows) if self.transposed else (rows, cols)

    def weight_key(self, name: str) -> str:
        """Name the tensor of the kept blocks: "NAME.weight" for a linear, NAME itself for fused experts."""
        return name if self.experts else f"{name}.weight"

    def mask_key(self, name: str) -> str:
        """Name the tensor of the bitmap."""
        return self.weight_key(name) + MASK_SUFFIX

    def to_dict(self) -> dict[str, Any]:
        """Give the JSON form: plain integers only, `transposed` (as 1) only where it is true."""
        entry: dict[str, Any] = {
            "block_shape": list(self.block_shape),
            "kept": self.kept,
            "dense_shape": list(self.stored_shape if self.experts else self.dense_shape),
        }
        return {**entry, "transposed": 1} if self.transposed else entry

    @classmethod
    def from_dict(cls, name: str, entry: Any, version: int = FORMAT_VERSION) -> LayerFormat:
        """Check and read the JSON form.

        Args:
            name: name of the layer, for the error message.
            entry: what `config.json` holds for it.
            version: format version of the file; there are fused experts from 2 on.

        Raises:
            FormatError: if a key is missing or unknown, a number is not a plain integer in range, or the blocks do
                not tile the dense shape.

        Example:
            >>> LayerFormat.from_dict("q", {"block_shape": [2, 1], "kept": 3, "dense_shape": [4, 4]}).grid
            (2, 4)
        """
        required, allowed = (
            {"block_shape", "kept", "dense_shape"},
            {"block_shape", "kept", "dense_shape", "transposed"},
        )
        if not isinstance(entry, dict) or not required <= set(entry) <= allowed:
            found = sorted(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
            raise FormatError(
                f"modules[{name!r}] must hold {sorted(required)}, and may hold 'transposed'; found {found}."
            )
        block_shape = _ints(name, "block_shape", entry["block_shape"], 2)
        dense_shape = _ints(name, "dense_shape", entry["dense_shape"], *((2,) if version < 2 else (2, 3)))
        kept, transposed = _plain_int(name, "kept", entry["kept"]), entry.get("transposed", 0)
        if min(*block_shape, *dense_shape) < 1 or math.prod(dense_shape) > MAX_WEIGHT_ELEMENTS:
            raise FormatError(
                f"modules[{name!r}]: block_shape {list(block_shape)} and dense_shape {list(dense_shape)} must be "
                f"positive, with at most {MAX_WEIGHT_ELEMENTS} weights in the layer."
            )
        *experts, rows, cols = dense_shape
        if rows % block_shape[0] or cols % block_shape[1]:
            raise FormatError(
                f"modules[{name!r}]: blocks of {list(block_shape)} do not tile a weight of {[rows, cols]}"
                f"{', one of each expert' if experts else ''}."
            )
        if type(transposed) is not int or transposed not in (0, 1):
            raise FormatError(f"modules[{name!r}]: 'transposed' must be 0 or 1, found {transposed!r}.")
        if experts and transposed:
            raise FormatError(f"modules[{name!r}]: 'transposed' does not go with the experts of {list(dense_shape)}.")
        layer = cls(
            block_shape=(block_shape[0], block_shape[1]),
            kept=kept,
            dense_shape=(math.prod(experts) * rows, cols),
            transposed=bool(transposed),
            experts=experts[0] if experts else 0,
        )
        if not 0 <= kept <= layer.num_blocks:
            raise FormatError(
                f"modules[{name!r}]: kept={kept}, but the grid {layer.grid} has {layer.num_blocks} blocks."
            )
        return layer


def read_layer_formats(config: Any) -> dict[str, LayerFormat]:
    """Check and read the `quantization_config` of a compressed model.

    Args:
        config: what `config.json` holds under "quantization_config".

    Returns:
        {layer name: geometry}.

    Raises:
        FormatError: if it is of a newer version, or anything in it is not what its version allows. Unknown keys are
            refused: a key that this version does not know could change what the others mean.

    Example:
        >>> entry = {"block_shape": [2, 1], "kept": 3, "dense_shape": [4, 4]}
        >>> config = {"quant_method": "hf_sparse", "format_version": 1, "modules": {"q": entry}}
        >>> read_layer_formats(config)["q"].num_blocks
        8
    """
    if not isinstance(config, dict) or config.get("quant_method") != QUANT_METHOD:
        raise FormatError(f"quantization_config must hold quant_method {QUANT_METHOD!r}, found {_short(config)}.")
    # The version comes first: what a newer file holds may read as nonsense here.
    version = config.get("format_version")
    if type(version) is not int or version < 1:
        raise FormatError(f"quantization_config: format_version must be an integer from 1, found {version!r}.")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"quantization_config: format_version {version} is newer than this hf_sparse, which reads up to "
            f"{FORMAT_VERSION}: pip install -U hf-sparse."
        )
    allowed = ("quant_method", "format_version", "modules", "dequantize")
    if unknown := sorted(set(map(str, config)) - set(allowed)):
        raise FormatError(f"quantization_config: format {version} has no key {unknown[0]!r}, only {list(allowed)}.")
    if not isinstance(config.get("dequantize", False), bool):
        raise FormatError(f"quantization_config: dequantize must be true or false, found {config['dequantize']!r}.")
    modules = config.get("modules")
    if not isinstance(modules, dict) or not all(isinstance(name, str) for name in modules):
        raise FormatError(f"quantization_config: modules must map layer names to shapes, found {_short(modules)}.")
    return {name: LayerFormat.from_dict(name, entry, version) for name, entry in modules.items()}


def version_of(layers: Iterable[LayerFormat]) -> int:
    """Give the lowest format version that can say some layers: 2 where there are fused experts, 1 elsewhere.

    Example:
        >>> linear = LayerFormat(block_shape=(2, 1), kept=3, dense_shape=(8, 4))
        >>> experts = LayerFormat(block_shape=(2, 1), kept=3, dense_shape=(8, 4), experts=2)
        >>> version_of([linear]), version_of([linear, experts])
        (1, 2)
    """
    return 2 if any(layer.experts for layer in layers) else 1


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _plain_int(name: str, key: str, value: Any) -> int:
    # bool is an int in Python; in a config it is a mistake.
    if type(value) is not int:
        raise FormatError(f"modules[{name!r}]: {key!r} must be a plain integer, found {value!r}.")
    return value


def _ints(name: str, key: str, value: Any, *lengths: int) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) not in lengths:
        several = " or ".join({2: "two", 3: "three"}[length] for length in lengths)
        raise FormatError(f"modules[{name!r}]: {key!r} must be {several} integers, found {value!r}.")
    return tuple(_plain_int(name, key, number) for number in value)

"""One weight, dense <-> stored (format 1, docs/format.md).

A stored weight is two tensors: the kept blocks in row-major order of the grid, and a bitmap with one bit per block.
Nothing here trusts a file: every function that reads checks what it was given and raises `FormatError`.

Shape letters: O, I out and in features; h, w block height and width; R, C grid rows and columns; N kept blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_sparse.core.blocks import BlockShape, from_blocks, grid_shape, to_blocks

FORMAT_VERSION = 1
QUANT_METHOD = "hf_sparse"
MASK_SUFFIX = "_block_mask"

# No weight of a real layer comes near; what does is a damaged or hostile config and must not be allocated.
MAX_WEIGHT_ELEMENTS = 2**40

# Two lines of names and numbers fit; a page that somebody put into a config does not.
_MAX_MESSAGE = 1000

# The 8 bits of every byte as 8 bools, held in one number: looking them up is ten times as fast as shifting.
_BITS = ((torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu")) & 1).bool().view(torch.int64)
_BITS = _BITS[:, 0]


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
        dense_shape: (O, I), output rows first also where the dense layer stores [in, out].
        transposed: True for `Conv1D` layers, whose dense weight is stored [I, O].
    """

    block_shape: BlockShape
    kept: int
    dense_shape: tuple[int, int]
    transposed: bool = False

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

    def to_dict(self) -> dict[str, Any]:
        """Give the JSON form: plain integers only, `transposed` (as 1) only where it is true."""
        entry: dict[str, Any] = {
            "block_shape": list(self.block_shape),
            "kept": self.kept,
            "dense_shape": list(self.dense_shape),
        }
        return {**entry, "transposed": 1} if self.transposed else entry

    @classmethod
    def from_dict(cls, name: str, entry: Any) -> LayerFormat:
        """Check and read the JSON form.

        Args:
            name: name of the layer, for the error message.
            entry: what `config.json` holds for it.

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
        block_shape = _int_pair(name, "block_shape", entry["block_shape"])
        dense_shape = _int_pair(name, "dense_shape", entry["dense_shape"])
        kept, transposed = _plain_int(name, "kept", entry["kept"]), entry.get("transposed", 0)
        if min(*block_shape, *dense_shape) < 1 or dense_shape[0] * dense_shape[1] > MAX_WEIGHT_ELEMENTS:
            raise FormatError(
                f"modules[{name!r}]: block_shape {list(block_shape)} and dense_shape {list(dense_shape)} must be "
                f"positive, with at most {MAX_WEIGHT_ELEMENTS} weights in the layer."
            )
        if dense_shape[0] % block_shape[0] or dense_shape[1] % block_shape[1]:
            raise FormatError(
                f"modules[{name!r}]: blocks of {list(block_shape)} do not tile a weight of {list(dense_shape)}."
            )
        if type(transposed) is not int or transposed not in (0, 1):
            raise FormatError(f"modules[{name!r}]: 'transposed' must be 0 or 1, found {transposed!r}.")
        layer = cls(block_shape=block_shape, kept=kept, dense_shape=dense_shape, transposed=bool(transposed))
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
        FormatError: if it is of a newer version, or anything in it is not what format 1 allows. Unknown keys are
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
    return {name: LayerFormat.from_dict(name, entry) for name, entry in modules.items()}


def pack_mask(mask: Tensor) -> Tensor:
    """Turn a block mask into a bitmap.

    Args:
        mask: [R, C] bool, True = keep.

    Returns:
        [ceil(R * C / 8)] uint8; block i of the row-major grid is bit i % 8, least significant first, of byte i // 8.
        Unused bits of the last byte are 0.

    Example:
        >>> pack_mask(torch.tensor([[True, False, True]]))
        tensor([5], dtype=torch.uint8)
    """
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (flat * bits).sum(-1, dtype=torch.uint8)


def unpack_mask(bitmap: Tensor, grid: tuple[int, int]) -> Tensor:
    """Turn a bitmap back into a block mask; the inverse of `pack_mask`.

    Args:
        bitmap: [ceil(R * C / 8)] uint8.
        grid: (R, C).

    Returns:
        [R, C] bool.

    Raises:
        FormatError: if the bitmap has another dtype or length, or sets a bit beyond the grid.
    """
    num_blocks = grid[0] * grid[1]
    expected = ((num_blocks + 7) // 8,)
    if bitmap.dtype != torch.uint8 or tuple(bitmap.shape) != expected:
        raise FormatError(
            f"a bitmap for a {grid[0]} x {grid[1]} grid must be uint8 of shape {list(expected)}, "
            f"found {bitmap.dtype} of shape {list(bitmap.shape)}."
        )
    bits = torch.index_select(_BITS.to(bitmap.device), 0, bitmap.int()).view(torch.bool)
    if bits[num_blocks:].any():
        raise FormatError(f"the bitmap sets bits beyond the {num_blocks} blocks of its {grid[0]} x {grid[1]} grid.")
    return bits[:num_blocks].view(grid)


def pack(weight: Tensor, mask: Tensor, block_shape: BlockShape) -> tuple[Tensor, Tensor]:
    """Leave the pruned blocks of a weight out of storage.

    Args:
        weight: [O, I], any dtype.
        mask: [R, C] bool on the same device, True = keep.
        block_shape: (h, w), may hold -1.

    Returns:
        values [N, h, w] in the weight's dtype, bit for bit, contiguous, sharing no memory; bitmap as in `pack_mask`.

    Raises:
        ValueError: if the mask does not fit the grid.

    Example:
        >>> pack(torch.tensor([[1., 2., 3., 4.]]), torch.tensor([[False, True]]), (1, 2))
        (tensor([[[3., 4.]]]), tensor([2], dtype=torch.uint8))
    """
    blocks = to_blocks(weight, block_shape)
    if mask.dtype != torch.bool or mask.shape != blocks.shape[:2]:
        raise ValueError(
            f"the mask must be bool of shape {list(blocks.shape[:2])} for a weight {list(weight.shape)} in blocks of "
            f"{tuple(block_shape)}, found {mask.dtype} of shape {list(mask.shape)}."
        )
    return blocks[mask].contiguous(), pack_mask(mask)


def unpack(values: Tensor, bitmap: Tensor, dense_shape: tuple[int, int]) -> Tensor:
    """Put stored blocks back into a dense weight; the inverse of `pack`.

    Args:
        values: [N, h, w].
        bitmap: uint8, as in `pack_mask`, with N bits set.
        dense_shape: (O, I).

    Returns:
        [O, I], values' dtype and device, zero where blocks were left out. Differentiable in `values`.

    Raises:
        FormatError: if the bitmap does not fit the grid or does not have exactly N bits set.
    """
    if values.ndim != 3:
        raise FormatError(f"stored values must have 3 dimensions [kept, h, w], found shape {list(values.shape)}.")
    block_shape = (values.shape[1], values.shape[2])
    mask = unpack_mask(bitmap, grid_shape(dense_shape, block_shape))
    if (population := int(mask.sum())) != values.shape[0]:
        raise FormatError(f"the bitmap keeps {population} blocks, but {values.shape[0]} are stored.")
    blocks = values.new_zeros(*mask.shape, *block_shape)
    return from_blocks(blocks.index_put((mask,), values))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _plain_int(name: str, key: str, value: Any) -> int:
    # bool is an int in Python; in a config it is a mistake.
    if type(value) is not int:
        raise FormatError(f"modules[{name!r}]: {key!r} must be a plain integer, found {value!r}.")
    return value


def _int_pair(name: str, key: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise FormatError(f"modules[{name!r}]: {key!r} must be two integers, found {value!r}.")
    return _plain_int(name, key, value[0]), _plain_int(name, key, value[1])

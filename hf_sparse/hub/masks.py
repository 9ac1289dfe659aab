"""Where the weights of a model folder survived: one coarse map per layer, small enough to look at.

A map divides a weight into cells and tells which share of each cell is kept. The masks of a compressed folder are read
from its bitmaps alone; of a dense one the weights that are not zero are counted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse.core.stored.packing import QUANT_METHOD, FormatError, LayerFormat, read_layer_formats, unpack_mask
from hf_sparse.core.stored.reading import CONFIG_FILE, opened, read_config, weight_files

MAX_CELLS = 64


@dataclass(frozen=True)
class MaskMap:
    """Where one weight survived.

    Attributes:
        name: module name.
        shape: (O, I) of the weight.
        density: share of the weight that is kept, [0, 1].
        cells: [r, c] float32, the same for each cell; row 0 holds the first output rows.
    """

    name: str
    shape: tuple[int, int]
    density: float
    cells: Tensor

    @classmethod
    def of(cls, name: str, shape: tuple[int, int], mask: Tensor, max_cells: int = MAX_CELLS) -> MaskMap:
        """Make the map of a mask.

        Args:
            name: module name.
            shape: (O, I) of the weight.
            mask: [R, C] bool, True = keep.
            max_cells: cells per side at most.

        Example:
            >>> MaskMap.of("q", (4, 4), torch.tensor([[True, False]])).cells
            tensor([[1., 0.]])
        """
        shares = mask.float()
        # So many blocks make a cell, and the last ones fewer: cells that shared blocks would show some of them twice.
        size = [-(-count // max_cells) for count in mask.shape]
        cells = torch.nn.functional.avg_pool2d(shares[None], size, ceil_mode=True)[0]
        return cls(name, shape, float(shares.mean()), cells)


@dataclass(frozen=True)
class MaskGrid:
    """The maps of a model, laid out: a row per transformer layer, a column per kind of linear.

    Attributes:
        rows: names of the rows, such as "bert.encoder.layer.0".
        columns: names of the columns, such as "attention.self.query".
        maps: {(row, column): map}; a layer without that linear has none.
        left_out: how many transformer layers are not among the rows.
    """

    rows: list[str]
    columns: list[str]
    maps: dict[tuple[str, str], MaskMap]
    left_out: int

    def label(self, row: str) -> str:
        """Shorten the name of a row by what all of them begin with, to two parts at least.

        Example:
            >>> MaskGrid(["bert.encoder.layer.0", "bert.encoder.layer.1"], [], {}, 0).label("bert.encoder.layer.1")
            'layer.1'
            >>> MaskGrid(["encoder.block.0", "decoder.block.0"], [], {}, 0).label("encoder.block.0")
            'encoder.block.0'
        """
        parts = [name.split(".") for name in self.rows]
        common = 0
        while len({tuple(part[: common + 1]) for part in parts}) == 1 and common + 2 < min(map(len, parts)):
            common += 1
        return ".".join(row.split(".")[common:])

    @property
    def highest(self) -> float:
        """Density of the fullest cell, above 0: where a colour scale ends."""
        return max([float(found.cells.max()) for found in self.maps.values()] + [1e-6])


def read_mask_maps(folder: str | os.PathLike[str], max_cells: int = MAX_CELLS) -> list[MaskMap]:
    """Read the maps of a model folder.

    Args:
        folder: saved by `save_pretrained` or by the trainer, compressed or dense.
        max_cells: cells per side at most.

    Returns:
        One per compressed layer, or of a dense folder one per linear inside the numbered layers that has a zero.

    Raises:
        FileNotFoundError: if the folder, its config.json or its weights are missing.
        FormatError: if a file is damaged.
    """
    folder = Path(folder)
    quantization = read_config(folder).get("quantization_config")
    compressed = isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD
    try:
        formats = read_layer_formats(quantization) if compressed else {}
        bitmaps = {layer.mask_key(name): name for name, layer in formats.items()}
    except FormatError as error:
        raise FormatError(f"{folder / CONFIG_FILE}: {error}") from error
    maps = []
    for file in weight_files(folder):
        with opened(file) as handle:
            keys = list(handle.keys())
        for key in keys:
            # Opened anew for each: a file stays in memory as far as it has been read through one handle.
            with opened(file) as handle:
                try:
                    found = _read_mask(handle, key, bitmaps, formats) if compressed else _read_zeros(handle, key)
                except FormatError as error:
                    raise FormatError(f"{file}: {key}: {error}") from error
            maps += [MaskMap.of(*found, max_cells)] if found else []
    order = {name: i for i, name in enumerate(formats)}
    return sorted(maps, key=lambda found: order.get(found.name, 0))


def lay_out(maps: Iterable[MaskMap], max_rows: int = 12) -> MaskGrid:
    """Lay maps out: a row per transformer layer, in order, and a column per kind of linear.

    Args:
        maps: of one model.
        max_rows: layers to show; of more, so many are picked, evenly spread, the first and the last among them.

    Example:
        >>> one = MaskMap.of("encoder.0.q", (4, 4), torch.ones(2, 2).bool())
        >>> lay_out([one]).rows, lay_out([one]).columns
        (['encoder.0'], ['q'])
    """
    placed: dict[tuple[str, str], MaskMap] = {}
    for found in maps:
        match = re.search(r"^(.*?\b\d+)\.(.+)$", found.name)
        placed[(match[1], match[2]) if match else ("", found.name)] = found
    rows = sorted({row for row, _ in placed}, key=_natural)
    shown = rows
    if len(rows) > max_rows:
        shown = [rows[round(i * (len(rows) - 1) / (max_rows - 1))] for i in range(max_rows)]
    kept = {place: found for place, found in placed.items() if place[0] in set(shown)}
    return MaskGrid(shown, list(dict.fromkeys(column for _, column in kept)), kept, len(rows) - len(shown))


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(1, int(part)) if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _read_mask(
    handle: Any, key: str, bitmaps: Mapping[str, str], formats: Mapping[str, LayerFormat]
) -> tuple[str, tuple[int, int], Tensor] | None:
    name = bitmaps.get(key)
    if name is None:
        return None
    return name, formats[name].dense_shape, unpack_mask(handle.get_tensor(key), formats[name].grid)


def _read_zeros(handle: Any, key: str) -> tuple[str, tuple[int, int], Tensor] | None:
    numbered = key.endswith(".weight") and any(part.isdigit() for part in key.split("."))
    if not numbered or len(handle.get_slice(key).get_shape()) != 2:
        return None
    kept = handle.get_tensor(key) != 0
    return None if bool(kept.all()) else (key.removesuffix(".weight"), (kept.shape[0], kept.shape[1]), kept)

"""Up to which density the native kernels are at least as fast as the best dense engine, for any number of tokens.

Measured with one thread against the faster of torch's linear and one whose weight oneDNN packed beforehand: the least
of what an AMD Zen 5 (without matrix tiles) and an Intel Xeon (with them) gave.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from hf_sparse.inference.kernels.registry import LayerSpec

# By the least height of a block. The highest bands lose a little at a few tokens of long rows.
_LIMITS = {32: 0.6, 8: 0.7, 4: 0.5, 2: 0.4, 1: 0.2}
# Row segments, rows of x up to 1024 features; longer ones do not stay in the first-level cache.
_SEGMENTS_LIMIT, _LONG_SEGMENTS_LIMIT = 0.35, 0.25
# Where dense bfloat16 has matrix tiles, and so have we, in times of one dense weight: a kept weight, by the least
# height of a block, more where the width is odd and pairs have to be put together; and an input or output on its way
# into the lanes or back.
_TILES_WEIGHT = {32: 1.45, 16: 1.8, 8: 2.9, 4: 6.0, 2: 12.0, 1: 24.0}
_TILES_ODD_WIDTH = 1.65
_TILES_FEATURE = 120
# Where dense bfloat16 has matrix tiles, and we do without.
_NO_TILES_LIMIT = 0.05
# Torch packs a dense bfloat16 weight anew in every call, which is most of the time of a call with few tokens: up to so
# many, tiles are faster than that even where they lose to it with many. Measured for blocks of 8 rows and more.
_FEW_TOKENS, _FEW_TOKENS_LIMIT, _FEW_TOKENS_HEIGHT = 64, 0.6, 8


@cache
def has_amx() -> bool:
    """Tell whether the CPU multiplies matrix tiles of bfloat16, so that dense layers do, too."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and " amx_bf16" in info.read_text(encoding="utf-8")


def density_limit(spec: LayerSpec, tiles: bool) -> float:
    """Give the density up to which a layer is no slower than dense.

    Args:
        spec: the layer, float32 or bfloat16.
        tiles: whether the kernels use matrix tiles for bfloat16.

    Example:
        >>> from hf_sparse.core.stored.packing import LayerFormat
        >>> layer = LayerFormat(block_shape=(8, 1), kept=10, dense_shape=(64, 64))
        >>> density_limit(LayerSpec(layer, torch.device("cpu"), torch.float32), tiles=False)
        0.7
    """
    height, width = spec.layer.block_shape
    if spec.dtype == torch.bfloat16 and has_amx():
        if not tiles:
            return _NO_TILES_LIMIT
        out_features, in_features = spec.layer.dense_shape
        packing = _TILES_FEATURE * (1 / out_features + 1 / in_features)
        return max(0.0, 1 - packing) / (_for_height(_TILES_WEIGHT, height) * (_TILES_ODD_WIDTH if width % 2 else 1.0))
    if height == 1 and width % 4 == 0:
        return _SEGMENTS_LIMIT if spec.layer.dense_shape[1] <= 1024 else _LONG_SEGMENTS_LIMIT
    return _for_height(_LIMITS, height)


def few_tokens(spec: LayerSpec, tiles: bool) -> int:
    """Give the number of tokens up to which a layer denser than `density_limit` still beats dense; 0 for none.

    Args:
        spec: the layer, float32 or bfloat16.
        tiles: whether the kernels use matrix tiles for bfloat16.
    """
    known = tiles and spec.dtype == torch.bfloat16 and spec.layer.block_shape[0] >= _FEW_TOKENS_HEIGHT
    return _FEW_TOKENS if known and spec.density <= _FEW_TOKENS_LIMIT else 0


def _for_height(numbers: dict[int, float], height: int) -> float:
    return next(number for least, number in numbers.items() if height >= least)

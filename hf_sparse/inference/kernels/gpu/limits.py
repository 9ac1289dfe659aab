"""Where the GPU kernels are no slower than dense: a calculation with the ceilings of the chip.

A dense product is bound by its arithmetic or, for few tokens, by reading the weight. A sparse one with bands of h rows
reads x anew for every band that keeps a column: h multiply-adds per value of x that a multiprocessor takes from the
second-level cache, whatever the density. That ceiling, not the tensor cores, decides how far low bands can go: 8 rows
cannot keep up with dense for many tokens at any useful density, and stay with few.
"""

from __future__ import annotations

from functools import cache

import torch

from hf_sparse.inference.kernels.gpu.layout import GpuWeight
from hf_sparse.inference.kernels.gpu.plan import FEW_TOKENS
from hf_sparse.inference.kernels.registry import LayerSpec

# Fitted to an H200. Per microsecond: operations of a dense product in 16-bit types and of float32 in full precision,
# and of ours with tiles and with gathered columns; bytes from device memory; bytes that our programs take from the
# second-level cache. Microseconds of a launch: of cuBLAS, of ours for many tokens, for few, and for one.
_DENSE_RATE = {2: 850e6, 4: 50e6}
_TILE_RATE, _GATHER_RATE = {2: 520e6, 4: 10e6}, {2: 415e6, 4: 25e6}
_MEMORY, _TILE_CACHE, _GATHER_CACHE = 4.2e6, 9.5e6, 8.4e6
_DENSE_LAUNCH, _LAUNCH, _FEW_LAUNCH, _SINGLE_LAUNCH = 2.0, 3.5, 4.5, 1.8
# Of device memory, what decoding reaches where rows of a block follow each other, and where single columns do.
_FEW_TILE, _FEW_GATHER = 0.9, 0.5
# Writing y goes on beside the rest, in part.
_WRITING = 0.7
# A calculation is no measurement: a win has to be clear.
_CLEAR = 0.92
# Elsewhere than on compute capability 9.0 all of this may be different: a win has to be twofold.
_KNOWN, _UNKNOWN_CLEAR = (9, 0), 0.5

_TOKEN_COUNTS = tuple(2**k for k in range(15))


@cache
def _clear(device: torch.device) -> float:
    if device.type != "cuda" or torch.version.cuda is None:
        return _UNKNOWN_CLEAR
    return _CLEAR if torch.cuda.get_device_capability(device) == _KNOWN else _UNKNOWN_CLEAR


def dense_time(spec: LayerSpec, tokens: int) -> float:
    """Give the microseconds that a dense product takes at best."""
    out_features, in_features = spec.layer.dense_shape
    size = spec.dtype.itemsize
    moved = size * (out_features * in_features + tokens * (out_features + in_features))
    return _DENSE_LAUNCH + max(2 * tokens * out_features * in_features / _DENSE_RATE[size], moved / _MEMORY)


def sparse_time(spec: LayerSpec, tokens: int) -> float:
    """Give the microseconds that our programs are expected to take."""
    layer, size = spec.layer, spec.dtype.itemsize
    (height, width), (out_features, in_features) = layer.block_shape, layer.dense_shape
    kept, tile = layer.kept * height * width, width % 32 == 0 and size == 2
    if tokens <= FEW_TOKENS:
        reached = _MEMORY * (_FEW_TILE if width >= 8 else _FEW_GATHER) * min(1.0, height / 8)
        return (_SINGLE_LAUNCH if tokens == 1 else _FEW_LAUNCH) + size * kept / reached
    rows = min(128, max(16, height))
    # Values that reach a multiprocessor: of x once per band and token, of the weight once per tile of tokens.
    padded = kept * max(1.0, 16 / height)
    taken = size * (padded / rows * tokens + kept * -(-tokens // 128))
    worked = 2 * max(tokens, 64) * padded / (_TILE_RATE if tile else _GATHER_RATE)[size]
    spent = _LAUNCH + max(taken / (_TILE_CACHE if tile else _GATHER_CACHE), worked)
    spent += _WRITING * size * tokens * out_features / _MEMORY
    return spent if tile else spent + _DENSE_LAUNCH + 2 * size * tokens * in_features / _MEMORY


def _wins(spec: LayerSpec, tokens: int) -> bool:
    return sparse_time(spec, tokens) <= _clear(spec.device) * dense_time(spec, tokens)


def wins_for_many(spec: LayerSpec) -> bool:
    """Tell whether a layer is no slower than dense from some number of tokens on."""
    return _wins(spec, _TOKEN_COUNTS[-1])


def wins_from(weight: GpuWeight) -> int | None:
    """Give the number of tokens from which a layer is no slower than dense; None where it never is."""
    spec = LayerSpec(weight.index.layer, weight.values.device, weight.values.dtype)
    best = None
    for tokens in reversed(_TOKEN_COUNTS):
        if not _wins(spec, tokens):
            break
        best = tokens
    return best


def wins_until(spec: LayerSpec) -> int:
    """Give up to how many tokens a layer is no slower than dense; 0 for none."""
    best = 0
    for tokens in _TOKEN_COUNTS:
        if not _wins(spec, tokens):
            break
        best = tokens
    return best

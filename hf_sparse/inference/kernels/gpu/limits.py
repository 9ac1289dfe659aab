"""Where the GPU kernels are no slower than dense: a calculation with the ceilings of the chip.

A dense product is bound by its arithmetic or, for few tokens, by reading the weight. A sparse one with bands of h rows
reads x anew for every band that keeps a column: h multiply-adds per value of x that a multiprocessor takes from the
second-level cache, whatever the density. That ceiling, not the tensor cores, decides how far low bands can go: 8 rows
cannot keep up with dense for many tokens at any useful density, and stay with few.
"""

from __future__ import annotations

import math
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
_DENSE_LAUNCH, _FEW_DENSE_LAUNCH, _LAUNCH, _FEW_LAUNCH, _SINGLE_LAUNCH = 2.0, 4.0, 3.5, 3.5, 1.8
# Bytes of the weight that decoding reads, for one token and for up to 16, where rows of a block are long enough to be
# read as they lie, and where single columns are gathered.
_SINGLE_TILE, _SINGLE_GATHER, _FEW_TILE, _FEW_GATHER = 3.8e6, 2.2e6, 1.1e6, 0.6e6
# Up to so many tokens there are too few programs to hide what each waits for: their share of the cache's bytes.
_SOME_TOKENS, _SOME_SHARE = 1024, 0.55
# Layers that keep nearly the same are decided alike: a compiled graph looks at the decision.
_STEPS, _NEARLY = 40, 0.2
# Writing y goes on beside the rest, in part.
_WRITING = 0.7
# Nothing above half was measured.
_DENSEST = 0.55
# A calculation is no measurement: a win has to be clear.
CLEAR = 0.92
# Elsewhere than on compute capability 9.0 all of this may be different: a win has to be twofold.
_KNOWN, _UNKNOWN_CLEAR = (9, 0), 0.5

_TOKEN_COUNTS = tuple(2**k for k in range(15))


@cache
def _clear(device: torch.device) -> float:
    if device.type != "cuda" or torch.version.cuda is None:
        return _UNKNOWN_CLEAR
    return CLEAR if torch.cuda.get_device_capability(device) == _KNOWN else _UNKNOWN_CLEAR


def dense_time(spec: LayerSpec, tokens: int) -> float:
    """Give the microseconds that a dense product takes at best."""
    out_features, in_features = spec.layer.dense_shape
    size = spec.dtype.itemsize
    moved = size * (out_features * in_features + tokens * (out_features + in_features))
    launch = _FEW_DENSE_LAUNCH if tokens <= FEW_TOKENS else _DENSE_LAUNCH
    return launch + max(2 * tokens * out_features * in_features / _DENSE_RATE[size], moved / _MEMORY)


def sparse_time(spec: LayerSpec, tokens: int) -> float:
    """Give the microseconds that our programs are expected to take."""
    layer, size = spec.layer, spec.dtype.itemsize
    (height, width), (out_features, in_features) = layer.block_shape, layer.dense_shape
    kept = math.ceil(spec.density * _STEPS - _NEARLY) / _STEPS * out_features * in_features
    tile = width % 32 == 0 and size == 2
    if tokens == 1:
        reached = (_SINGLE_TILE if width >= 8 else _SINGLE_GATHER) * min(1.0, height / 8)
        return _SINGLE_LAUNCH + size * kept / reached
    if tokens <= FEW_TOKENS:
        reached = (_FEW_TILE if width >= 16 else _FEW_GATHER) * min(1.0, height / 16)
        return _FEW_LAUNCH + size * kept / reached
    rows = min(128, max(16, height))
    # Values that reach a multiprocessor: of x once per band and token, of the weight once per tile of tokens.
    padded = kept * max(1.0, 16 / height)
    taken = size * (padded / rows * tokens + kept * -(-tokens // 128))
    worked = 2 * max(tokens, 64) * padded / (_TILE_RATE if tile else _GATHER_RATE)[size]
    cache_rate = (_TILE_CACHE if tile else _GATHER_CACHE) * (_SOME_SHARE if tile and tokens <= _SOME_TOKENS else 1.0)
    spent = _LAUNCH + max(taken / cache_rate, worked)
    spent += _WRITING * size * tokens * out_features / _MEMORY
    return spent if tile else spent + _DENSE_LAUNCH + 2 * size * tokens * in_features / _MEMORY


def takes(spec: LayerSpec, tokens: int, clear: float = CLEAR) -> bool:
    """Tell whether a call with so many tokens is left to the kernels, as `auto` does.

    Args:
        spec: the layer.
        tokens: rows of x.
        clear: share of the dense time that ours may take.
    """
    first = _from(spec, clear)
    return (first is not None and tokens >= first) or tokens <= _until(spec, clear)


def wins_for_many(spec: LayerSpec) -> bool:
    """Tell whether a layer is no slower than dense from some number of tokens on."""
    return _from(spec, _clear(spec.device)) is not None


def wins_from(weight: GpuWeight) -> int | None:
    """Give the number of tokens from which a layer is no slower than dense; None where it never is."""
    spec = LayerSpec(weight.index.layer, weight.values.device, weight.values.dtype)
    return _from(spec, _clear(spec.device))


def wins_until(spec: LayerSpec) -> int:
    """Give up to how many tokens a layer is no slower than dense; 0 for none."""
    return _until(spec, _clear(spec.device))


def _wins(spec: LayerSpec, tokens: int, clear: float) -> bool:
    return spec.density <= _DENSEST and sparse_time(spec, tokens) <= clear * dense_time(spec, tokens)


def _from(spec: LayerSpec, clear: float) -> int | None:
    best = None
    for tokens in reversed(_TOKEN_COUNTS):
        if not _wins(spec, tokens, clear):
            break
        best = tokens
    return best


def _until(spec: LayerSpec, clear: float) -> int:
    best = 0
    for tokens in _TOKEN_COUNTS:
        if not _wins(spec, tokens, clear):
            break
        best = tokens
    return best

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
from hf_sparse.inference.kernels.gpu.plan import FEW_TOKENS, MIN_RUN
from hf_sparse.inference.kernels.registry import LayerSpec

# Per microsecond: tensor core operations of a dense product in 16-bit types and of float32 in full precision, bytes
# from device memory, and bytes from the second-level cache that our programs reach. Microseconds of one launch.
_DENSE_RATE = {2: 650e6, 4: 45e6}
_SPARSE_RATE = {2: 450e6, 4: 12e6}
_MEMORY, _CACHE, _LAUNCH = 2.6e6, 3.2e6, 2.5
# A launch of ours costs more of the CPU's time than one of cuBLAS: a win has to be clear.
_CLEAR = 0.92
# The ceilings above are those of compute capability 9.0. Elsewhere ratios may differ: a win has to be twofold.
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
    return _LAUNCH + max(2 * tokens * out_features * in_features / _DENSE_RATE[size], moved / _MEMORY)


def sparse_time(spec: LayerSpec, tokens: int) -> float:
    """Give the microseconds that our programs are expected to take."""
    layer, size = spec.layer, spec.dtype.itemsize
    (height, width), (out_features, in_features) = layer.block_shape, layer.dense_shape
    kept = layer.kept * height * width
    moved = size * (kept + tokens * (out_features + in_features))
    rows = min(128, max(16 if tokens > 1 else 8, height))
    tile = min(128, max(16, tokens)) if tokens > 1 else 1
    # Values that reach a multiprocessor: of x once per band and token, of the weight once per tile of tokens.
    taken = size * (kept / height * -(-height // rows) * tokens + kept * -(-tokens // tile))
    worked = 2 * max(tokens, 16) * kept * max(1.0, rows / height) / _SPARSE_RATE[size]
    spent = _LAUNCH + max(moved / _MEMORY, taken / _CACHE, worked)
    if tokens > 1 and width % MIN_RUN:
        spent += _LAUNCH + 2 * size * tokens * in_features / _MEMORY
    return spent


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
    """Give up to how many tokens, `FEW_TOKENS` at most, a layer is no slower than dense; 0 for none."""
    best = 0
    for tokens in (count for count in _TOKEN_COUNTS if count <= FEW_TOKENS):
        if not _wins(spec, tokens):
            break
        best = tokens
    return best

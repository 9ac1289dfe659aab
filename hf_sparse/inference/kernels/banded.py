"""The torch backend: gather the inputs that a band of output rows keeps, then one batched matmul over the bands.

Bands keep different numbers of columns and a batched matmul wants one number: bands are sorted by what they keep and
cut into groups, each padded to its own longest band.

Shape letters: M tokens; O, I out and in features; h, w block height and width; R grid rows (bands); G bands of a
group; K kept columns of the longest band of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.inference.kernels.reference import activate
from hf_sparse.inference.kernels.registry import BlockIndex, LayerSpec, register

# Microseconds of one thread, fitted to what benchmarks/cpu.py linear measures: a dense call, a weight read, a call, a
# group, a gathered input, an output, and the arithmetic of one weight for one token. Ratios carry over to other
# machines better than the numbers themselves, so a win has to be clear.
_DENSE_CALL, _DENSE_WEIGHT, _CALL, _GROUP = 8.0, 1.2e-4, 20.0, 50.0
_GATHERED, _OUTPUT, _ARITHMETIC, _CLEAR = 1.6e-3, 3e-3, 2.7e-5, 0.9
_TOKEN_COUNTS = tuple(2**k for k in range(13))

# Twice the groups must save this share of the padded columns, or the added calls cost more than the padding.
_GROUPING_GAIN = 0.15
_MAX_GROUPS = 4

# What a gather writes has to stay in the cache until the matmul reads it.
_TOKENS_AT_ONCE = 128
# Below this height a gather of single inputs costs more than the matmul; whole rows of x.T are copied faster.
_GATHER_ROWS_BELOW_HEIGHT = 16
_GATHER_ROWS_FROM_TOKENS = 8


@dataclass(frozen=True)
class BandGroup:
    """Bands that are multiplied in one call.

    Attributes:
        bands: [G] int64, their grid rows.
        columns: [G * K] int64, input columns band by band; padding points at column 0 and meets a zero weight.
        weight: [G, K, h].
        in_features: I.
    """

    bands: Tensor
    columns: Tensor
    weight: Tensor
    in_features: int


class BandedBackend:
    """Per-band gather and batched matmul in plain torch, on any device."""

    name = "torch"

    def available(self) -> tuple[bool, str]:
        """Always."""
        return True, "plain torch"

    def supports(self, spec: LayerSpec) -> tuple[bool, str]:
        """Every layer."""
        return True, "plain torch"

    def wins(self, spec: LayerSpec) -> bool:
        """Where it may beat dense from some number of tokens on: `from_tokens` knows. Measured on the CPU alone."""
        if spec.device.type != "cpu" or spec.dtype != torch.float32:
            return False
        height = spec.layer.block_shape[0]
        return spec.density * (_GATHERED + _ARITHMETIC * height) <= _CLEAR * _ARITHMETIC * height

    def from_tokens(self, state: list[BandGroup]) -> int | None:
        """Give the number of tokens from which it is measured to beat dense; None where it never does."""
        best = None
        for tokens in reversed(_TOKEN_COUNTS):
            if _sparse_time(state, tokens) > _CLEAR * _dense_time(state, tokens):
                break
            best = tokens
        return best

    def prepare(self, values: Tensor, index: BlockIndex) -> list[BandGroup]:
        """Pack the bands, group by group."""
        counts = torch.bincount(index.rows, minlength=index.layer.grid[0])
        first = counts.cumsum(0) - counts
        slot = torch.arange(index.rows.numel(), device=values.device) - first[index.rows]
        return [_pack_group(values, index, bands, counts, slot) for bands in _group(counts)]

    def run(self, x: Tensor, state: list[BandGroup], bias: Tensor | None, activation: str | None) -> Tensor:
        """Compute [M, O] from x [M, I]."""
        num_bands = sum(group.bands.numel() for group in state)
        height = state[0].weight.shape[2]
        y = x.new_empty(x.shape[0], num_bands, height)
        by_band = None if bias is None else bias.view(num_bands, height)
        for start in range(0, x.shape[0], _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            for group in state:
                _multiply(x[part], group, by_band, y[part])
        return activate(y.view(x.shape[0], num_bands * height), activation)


def _dense_time(state: list[BandGroup], tokens: int) -> float:
    rows = sum(group.weight.shape[0] * group.weight.shape[2] for group in state)
    weights = rows * state[0].in_features
    return _DENSE_CALL + weights * max(_DENSE_WEIGHT, _ARITHMETIC * tokens)


def _sparse_time(state: list[BandGroup], tokens: int) -> float:
    height = state[0].weight.shape[2]
    columns = sum(group.columns.numel() for group in state)
    rows = sum(group.weight.shape[0] for group in state) * height
    per_token = columns * (_GATHERED + _ARITHMETIC * height) + rows * _OUTPUT
    return _CALL + _GROUP * len(state) + tokens * per_token


def _group(counts: Tensor) -> list[Tensor]:
    ordered, order = counts.sort(descending=True, stable=True)
    best, cost = [torch.arange(counts.numel(), device=counts.device)], int(ordered[0]) * counts.numel()
    for num_groups in (2, _MAX_GROUPS):
        sizes = torch.arange(counts.numel()).tensor_split(num_groups)
        if min(part.numel() for part in sizes) == 0:
            break
        padded = sum(int(ordered[part[0]]) * part.numel() for part in sizes)
        if padded > cost * (1 - _GROUPING_GAIN):
            break
        best, cost = [order[part] for part in sizes], padded
    return best


def _pack_group(values: Tensor, index: BlockIndex, bands: Tensor, counts: Tensor, slot: Tensor) -> BandGroup:
    h, w = index.layer.block_shape
    size, longest = bands.numel(), int(counts[bands].max())
    place = torch.full_like(counts, -1)
    place[bands] = torch.arange(size, device=bands.device)
    mine = place[index.rows] >= 0
    at = place[index.rows[mine]], slot[mine]
    weight = values.new_zeros(size, longest, w, h)
    weight[at] = values[mine].transpose(1, 2)
    columns = index.cols.new_zeros(size, longest, w)
    columns[at] = index.cols[mine, None] * w + torch.arange(w, device=values.device)
    return BandGroup(
        bands=bands,
        columns=columns.reshape(-1),
        weight=weight.reshape(size, longest * w, h),
        in_features=index.layer.dense_shape[1],
    )


def _multiply(x: Tensor, group: BandGroup, bias: Tensor | None, y: Tensor) -> None:
    size, longest, height = group.weight.shape
    tokens = x.shape[0]
    start = group.weight.new_zeros(()) if bias is None else bias[group.bands]
    if height < _GATHER_ROWS_BELOW_HEIGHT and tokens >= _GATHER_ROWS_FROM_TOKENS:
        gathered = x.t().contiguous().index_select(0, group.columns).view(size, longest, tokens)
        start = start if bias is None else start[:, :, None]
        product = torch.baddbmm(start, group.weight.transpose(1, 2), gathered).permute(2, 0, 1)
    else:
        gathered = x.index_select(1, group.columns).view(tokens, size, longest)
        start = start if bias is None else start[:, None, :]
        product = torch.baddbmm(start, gathered.transpose(0, 1), group.weight).transpose(0, 1)
    if size == y.shape[1]:
        y.copy_(product)
    else:
        y.index_copy_(1, group.bands, product)


register(BandedBackend())

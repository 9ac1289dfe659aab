"""The torch backend: gather the input columns that a band of output rows keeps, then one batched matmul.

Shape letters: M tokens; O, I out and in features; h, w block height and width; R grid rows (bands); K kept columns of
a band, padded to the longest band.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.inference.kernels.reference import activate
from hf_sparse.inference.kernels.registry import BlockIndex, LayerSpec, register


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
        """Where it is measured to be faster than dense (benchmarks/linear.py)."""
        return False

    def prepare(self, values: Tensor, index: BlockIndex) -> tuple[Tensor, Tensor]:
        """Pack the bands: [R, h, K] weights and [R * K] input columns."""
        h, w = index.layer.block_shape
        bands = index.layer.grid[0]
        counts = torch.bincount(index.rows, minlength=bands)
        longest = int(counts.max()) if counts.numel() else 0
        first = counts.cumsum(0) - counts
        slot = torch.arange(index.rows.numel(), device=values.device) - first[index.rows]
        packed = values.new_zeros(bands, longest, h, w)
        packed[index.rows, slot] = values.detach()
        columns = index.cols.new_zeros(bands, longest, w)
        columns[index.rows, slot] = index.cols[:, None] * w + torch.arange(w, device=values.device)
        return packed.permute(0, 2, 1, 3).reshape(bands, h, longest * w), columns.reshape(-1)

    def run(self, x: Tensor, state: tuple[Tensor, Tensor], bias: Tensor | None, activation: str | None) -> Tensor:
        """Compute [M, O] from x [M, I]."""
        packed, columns = state
        bands, h, longest = packed.shape
        tokens = x.shape[0]
        gathered = x.t().contiguous().index_select(0, columns).view(bands, longest, tokens)
        y = torch.bmm(packed, gathered).view(bands * h, tokens).t()
        return activate((y if bias is None else y + bias).contiguous(), activation)


register(BandedBackend())

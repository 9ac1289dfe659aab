"""Shared by the kernel tests: random layers, the law to hold them against, and outputs that start as NaN."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sparse.core.stored.packing import LayerFormat, pack_mask
from hf_sparse.inference.kernels.build import find_compiler
from hf_sparse.inference.kernels.library import load_library
from hf_sparse.inference.kernels.registry import BlockIndex


def triton_is_missing() -> bool:
    """Tell whether there is no Triton, or one that is too old. Imports it, once TRITON_INTERPRET is set."""
    from hf_sparse.inference.kernels.gpu import backend

    return importlib.util.find_spec("triton") is None or backend._triton_version() < backend.OLDEST_TRITON


@pytest.fixture
def native_library() -> None:
    """Skip where the kernels cannot be built; where they could have been, a missing library is a failure."""
    library = load_library()
    if library.handle is None and find_compiler() is None:
        pytest.skip(library.reason)
    assert library.handle is not None, library.reason


@pytest.fixture
def nan_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with NaN, so that an element that a kernel forgets to write is seen."""
    new_empty = torch.Tensor.new_empty

    def filled(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = new_empty(self, *args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def random_layer(
    dense_shape: tuple[int, int], block_shape: tuple[int, int], density: float, seed: int, dtype: torch.dtype
) -> tuple[Tensor, BlockIndex]:
    """Give values [N, h, w] and their index; density 0 keeps nothing, 1 everything."""
    generator = torch.Generator().manual_seed(seed)
    grid = (dense_shape[0] // block_shape[0], dense_shape[1] // block_shape[1])
    mask = torch.rand(grid, generator=generator) < density
    layer = LayerFormat(block_shape=block_shape, kept=int(mask.sum()), dense_shape=dense_shape)
    values = torch.randn(layer.values_shape, generator=generator).to(dtype)
    return values, BlockIndex.from_bitmap(pack_mask(mask), layer)

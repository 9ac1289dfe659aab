"""Matrix tiles (AMX): chunks against the law, next to other users of the tile registers, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_sparse.core.stored.packing import FormatError
from hf_sparse.inference.kernels import library
from hf_sparse.inference.kernels.bands import Chunks
from hf_sparse.inference.kernels.cpu import CpuBackend, CpuWeight, check_bands
from hf_sparse.inference.kernels.reference import to_dense
from tests.inference.kernels.conftest import random_layer
from tests.inference.kernels.test_cpu import check

pytestmark = [
    pytest.mark.usefixtures("native_library"),
    pytest.mark.skipif(
        "amx" not in library.load_library().isas,
        reason="this CPU has no AMX for bfloat16, or the compiler or the operating system does not let us use it",
    ),
]

# (O, I, h, w): heights of one tile, of two, of two that overlap, of several panels; neighbours and couples.
SHAPES = [
    *((64, 160, 32, 2), (96, 96, 16, 2), (64, 200, 8, 2), (36, 66, 4, 2), (33, 64, 1, 2), (34, 64, 17, 2)),
    *((48, 70, 24, 1), (66, 101, 33, 1), (96, 64, 48, 2), (128, 128, 64, 64), (40, 99, 8, 1), (12, 30, 2, 3)),
]


def _case(shape: tuple[int, int, int, int], density: float, seed: int) -> tuple[Tensor, CpuBackend, CpuWeight]:
    values, index = random_layer(shape[:2], shape[2:], density, seed=seed, dtype=torch.bfloat16)
    backend = CpuBackend(isa="amx", form="lanes")
    return to_dense(values, index), backend, backend.prepare(values, index)


@pytest.mark.usefixtures("nan_outputs")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_tokens(shape: tuple[int, int, int, int]) -> None:
    activations = list(library.ACTIVATIONS)
    for density in (0.0, 0.2, 1.0):
        weight, backend, state = _case(shape, density, seed=shape[0])
        for tokens in range(51):
            x = torch.randn(tokens, shape[1]).bfloat16()
            bias = torch.randn(shape[0]).bfloat16() if tokens % 3 else None
            activation = activations[tokens % len(activations)]
            check(backend.run(x, state, bias, activation), x, weight, bias, activation)


@pytest.mark.parametrize("shape", [(768, 384, 8, 2), (768, 390, 32, 1), (480, 512, 48, 2)], ids=str)
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, int, int, int]) -> None:
    before = torch.get_num_threads()
    try:
        weight, backend, state = _case(shape, 0.3, seed=2)
        bias = torch.randn(shape[0]).bfloat16()
        for tokens in (9, 16, 100, 333, 1500):
            x, results = torch.randn(tokens, shape[1]).bfloat16(), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(backend.run(x, state, bias, "gelu"))
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
            check(results[0], x, weight, bias, "gelu")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_in_turn_with_the_matrix_products_of_torch(threads: int) -> None:
    """OneDNN shapes the same tile registers for itself: neither may find the other's shapes."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        cases = [(_case(shape, 0.3, seed=3), torch.randn(70, shape[1]).bfloat16()) for shape in SHAPES]
        others = [
            (torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()) for m, k, n in ((64, 96, 80), (5, 33, 7))
        ]
        ours = [backend.run(x, state, None, None) for (_, backend, state), x in cases]
        theirs = [a @ b for a, b in others]
        for _ in range(3):
            for i, ((_, backend, state), x) in enumerate(cases):
                a, b = others[i % 2]
                assert torch.equal(a @ b, theirs[i % 2])
                assert torch.equal(backend.run(x, state, None, None), ours[i])
        for ((weight, _, _), x), y in zip(cases, ours, strict=True):
            check(y, x, weight, None, None)
    finally:
        torch.set_num_threads(before)


def test_what_a_band_does_not_keep_is_not_read() -> None:
    """Chunks are filled up: neither columns of other bands nor other tokens may show in a result."""
    for block in ((8, 2), (8, 1), (32, 2)):
        weight, backend, state = _case((64, 96, *block), 0.2, seed=4)
        for band in range(64 // block[0]):
            rows = slice(band * block[0], (band + 1) * block[0])
            kept = weight[rows].abs().sum(0) != 0
            x = torch.randn(37, 96).bfloat16()
            x[:, ~kept] = torch.nan
            assert bool(backend.run(x, state, None, None)[:, rows].isfinite().all())
        x = torch.randn(37, 96).bfloat16()
        x[11] = torch.nan
        y = backend.run(x, state, None, None)
        assert bool(y[torch.arange(37) != 11].isfinite().all())


def test_without_chunks_it_is_the_set_below() -> None:
    values, index = random_layer((64, 96), (8, 2), 0.3, seed=5, dtype=torch.bfloat16)
    x = torch.randn(40, 96).bfloat16()
    backend = CpuBackend(isa="avx512bf16")
    state = backend.prepare(values, index)
    bare = check_bands(state.bands, in_features=96, dtype=torch.bfloat16, isa="amx")
    assert state.bands.chunks is None
    assert torch.equal(backend.run(x, bare, None, None), backend.run(x, state, None, None))


def _chunked() -> tuple[CpuWeight, Chunks]:
    values, index = random_layer((64, 96), (8, 2), 0.5, seed=6, dtype=torch.bfloat16)
    state = CpuBackend(isa="amx").prepare(values, index)
    assert state.bands.chunks is not None
    return state, state.bands.chunks


@pytest.mark.parametrize(
    ("name", "place", "number"),
    [("column", (0, 0), 48), ("column", (-1, 15), -1), ("start", 0, 1), ("start", 1, 0), ("start", 3, 2**31 - 1)],
)
def test_a_chunk_that_points_outside_is_refused(name: str, place: int | tuple[int, int], number: int) -> None:
    state, chunks = _chunked()
    broken = getattr(chunks, name).clone()
    broken[place] = number
    bands = replace(state.bands, chunks=replace(chunks, **{name: broken}))
    with pytest.raises(FormatError, match="the index points outside the weight"):
        check_bands(bands, in_features=96, dtype=torch.bfloat16, isa="amx")


def test_chunks_of_another_weight_are_refused() -> None:
    state, chunks = _chunked()
    for name, wrong, message in (
        ("values", chunks.values[1:].contiguous(), "do not belong"),
        ("values", chunks.values.float(), "chunk values must be a contiguous CPU tensor"),
        ("start", chunks.start[:-1].contiguous(), "do not belong"),
        ("start", chunks.start.long(), "chunk start must be a contiguous CPU tensor"),
        ("column", chunks.column[:, :8].contiguous(), "do not belong"),
        ("column", chunks.column.t(), "chunk column must be a contiguous CPU tensor"),
    ):
        bands = replace(state.bands, chunks=replace(chunks, **{name: wrong}))
        with pytest.raises(FormatError, match=message):
            check_bands(bands, in_features=96, dtype=torch.bfloat16, isa="amx")
    with pytest.raises(FormatError, match="out of range"):
        check_bands(state.bands, in_features=96, dtype=torch.bfloat16, isa="avx512bf16")

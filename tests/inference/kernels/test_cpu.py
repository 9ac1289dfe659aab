"""The native kernels against the law, on values."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch
from torch import Tensor

from hf_sparse.core.stored.packing import FormatError, LayerFormat
from hf_sparse.inference.kernels import block_sparse_linear, cpu_limits, library
from hf_sparse.inference.kernels.bands import Bands
from hf_sparse.inference.kernels.cpu import CpuBackend, CpuWeight, check_bands, status
from hf_sparse.inference.kernels.reference import activate, to_dense
from hf_sparse.inference.kernels.registry import BlockIndex, LayerSpec, get_backend
from tests.inference.kernels.conftest import random_layer

pytestmark = pytest.mark.usefixtures("native_library")

ISAS = library.load_library().isas or ("portable",)

# (O, I, h, w): every supported height, heights that are cut (24, 48, 64), odd ones, widths above one, row segments,
# square tiles, sizes that are no multiple of a vector, a single weight.
SHAPES = [
    *((16, 16, 1, 1), (34, 23, 2, 1), (36, 31, 4, 1), (40, 33, 8, 1), (48, 40, 16, 1), (64, 37, 32, 1)),
    *((96, 50, 4, 2), (64, 66, 8, 2), (33, 21, 3, 1), (72, 31, 24, 1), (48, 64, 48, 1), (128, 33, 64, 1)),
    *(
        (40, 24, 1, 8),
        (6, 64, 1, 32),
        (37, 36, 1, 4),
        (20, 1024, 1, 16),
        (12, 30, 2, 3),
        (64, 96, 32, 32),
        (48, 64, 16, 16),
        (35, 20, 5, 4),
    ),
    *((1, 1, 1, 1), (1, 40, 1, 1), (200, 1, 8, 1), (7, 12, 7, 12)),
]
TOKENS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 15, 16, 17, 24, 31, 33, 48, 49, 100, 130)
EPS32 = 2e-6
EPS16 = 2.0**-8


def check(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    """Hold y against float64, with errors measured in the magnitudes that were added up."""
    x64, w64 = x.double(), weight.double()
    added = x64.abs() @ w64.abs().t()
    expected = x64 @ w64.t()
    if bias is not None:
        added, expected = added + bias.double().abs(), expected + bias.double()
    expected = activate(expected, activation)
    tolerance = EPS32 * (added + expected.abs())
    if activation is not None:
        tolerance += 1e-6
    if y.dtype == torch.bfloat16:
        tolerance += EPS16 * expected.abs()
    error = (y.double() - expected).abs()
    assert y.shape == expected.shape
    assert bool((error <= tolerance).all()), f"off by {float((error - tolerance).max()):.3g} above the tolerance"


@pytest.mark.usefixtures("nan_outputs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", ["rows", "lanes"])
@pytest.mark.parametrize("isa", ISAS)
def test_kernels_give_what_the_reference_gives(isa: str, form: str, dtype: torch.dtype) -> None:
    """Every shape, density, number of tokens; with and without bias; activations in turn."""
    backend = CpuBackend(isa=isa, form=form)
    activations = list(library.ACTIVATIONS)
    case = 0
    for shape in SHAPES:
        for density in (0.0, 0.1, 0.5, 1.0):
            values, index = random_layer(shape[:2], shape[2:], density, seed=case, dtype=dtype)
            weight, state = to_dense(values, index), backend.prepare(values, index)
            for tokens in TOKENS:
                case += 1
                x = torch.randn(tokens, shape[1]).to(dtype)
                bias = torch.randn(shape[0]).to(dtype) if case % 3 else None
                activation = activations[case % len(activations)]
                y = backend.run(x, state, bias, activation)
                assert y.dtype == dtype and y.is_contiguous()
                try:
                    check(y, x, weight, bias, activation)
                except AssertionError as error:
                    raise AssertionError(f"{shape} density {density} tokens {tokens} {activation}: {error}") from error


@pytest.mark.parametrize("activation", [a for a in library.ACTIVATIONS if a])
@pytest.mark.parametrize("form", ["rows", "lanes"])
@pytest.mark.parametrize("isa", ISAS)
def test_activations_over_their_whole_range(isa: str, form: str, activation: str) -> None:
    points = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4])])
    values, index = random_layer((16, 1), (8, 1), 1.0, seed=0, dtype=torch.float32)
    backend = CpuBackend(isa=isa, form=form)
    y = backend.run(points[:, None], backend.prepare(torch.ones_like(values), index), None, activation)
    expected = activate(points.double(), activation)[:, None].expand(-1, 16)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=5e-7)
    special = torch.tensor([[torch.nan], [torch.inf]])
    y = backend.run(special, backend.prepare(torch.ones_like(values), index), None, activation)
    assert bool(y[0].isnan().all()) and bool((y[1] == torch.inf).all())


@pytest.mark.parametrize("form", ["rows", "lanes"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rounding_to_bfloat16_and_back_is_torchs(isa: str, form: str, dtype: torch.dtype) -> None:
    """An identity weight passes every kind of number through: ties, subnormals, signed zeros, infinities, NaN."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(torch.bfloat16)[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    numbers = numbers[numbers.abs() > 2.0**-120][: 63 * 1000].view(-1, 8).to(dtype)
    index = BlockIndex(
        layer=LayerFormat(block_shape=(8, 8), kept=1, dense_shape=(8, 8)),
        rows=torch.zeros(1, dtype=torch.int64),
        cols=torch.zeros(1, dtype=torch.int64),
    )
    finite = numbers[numbers.isfinite().all(1)]
    backend = CpuBackend(isa=isa, form=form)
    state = backend.prepare(torch.eye(8, dtype=dtype)[None], index)
    assert torch.equal(backend.run(finite, state, None, None), finite)
    ties = torch.tensor([[1 + 2**-8 * (2 * k + 1) for k in range(8)]], dtype=torch.float64)
    halves = [(ties / 2).to(torch.bfloat16), (ties - (ties / 2).to(torch.bfloat16).double()).to(torch.bfloat16)]
    if dtype == torch.bfloat16:
        summed = backend.run(torch.cat(halves, 1), _two_eyes(backend), None, None)
        assert torch.equal(summed, (halves[0].float() + halves[1].float()).to(torch.bfloat16))


def _two_eyes(backend: CpuBackend) -> CpuWeight:
    layer = LayerFormat(block_shape=(8, 8), kept=2, dense_shape=(8, 16))
    index = BlockIndex(layer=layer, rows=torch.zeros(2, dtype=torch.int64), cols=torch.arange(2))
    return backend.prepare(torch.eye(8, dtype=torch.bfloat16).expand(2, 8, 8), index)


@pytest.mark.usefixtures("nan_outputs")
@pytest.mark.parametrize("tokens", [3, 40])
def test_inputs_of_any_strides(tokens: int) -> None:
    values, index = random_layer((24, 30), (8, 1), 0.4, seed=1, dtype=torch.float32)
    weight, backend = to_dense(values, index), CpuBackend()
    state, whole = backend.prepare(values, index), torch.randn(2 * tokens, 64)
    for name, x in {
        "every other row": whole[::2, :30],
        "shifted": whole[:tokens, 5:35],
        "every other column": whole[:tokens, ::2][:, :30],
        "transposed": torch.randn(30, tokens).t(),
        "one row for all": whole[:1, :30].expand(tokens, 30),
        "one number for all": whole[:1, :1].expand(tokens, 30),
    }.items():
        assert x.shape[1] == 30, name
        check(backend.run(x, state, None, None), x, weight, None, None)
    bias = torch.randn(48)[::2]
    check(backend.run(whole[:tokens, :30], state, bias, None), whole[:tokens, :30], weight, bias, None)


@pytest.mark.parametrize("form", ["rows", "lanes"])
@pytest.mark.parametrize("isa", ISAS)
def test_the_number_of_threads_changes_no_bit(isa: str, form: str) -> None:
    """Large enough that two threads do share the work: few tokens, one sequence, many tokens; odd sizes."""
    before = torch.get_num_threads()
    try:
        for shape, block in (
            ((768, 384), (8, 1)),
            ((768, 390), (32, 1)),
            ((1001, 257), (1, 1)),
            ((512, 512), (32, 32)),
        ):
            values, index = random_layer(shape, block, 0.3, seed=2, dtype=torch.float32)
            backend = CpuBackend(isa=isa, form=form)
            state, bias = backend.prepare(values, index), torch.randn(shape[0])
            for tokens in (9, 16, 100, 333, 1500):
                x, results = torch.randn(tokens, shape[1]), []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append(backend.run(x, state, bias, "gelu"))
                assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


def test_python_threads_do_not_disturb_one_another() -> None:
    backend, wrong = CpuBackend(), []
    values, index = random_layer((256, 200), (8, 1), 0.3, seed=3, dtype=torch.float32)
    state = backend.prepare(values, index)

    def work(seed: int) -> None:
        x = torch.randn(50 + seed, 200, generator=torch.Generator().manual_seed(seed))
        first = backend.run(x, state, None, "silu")
        wrong.extend(seed for _ in range(20) if not torch.equal(first, backend.run(x, state, None, "silu")))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_blocks_of_width_one_are_not_copied() -> None:
    values, index = random_layer((32, 16), (8, 1), 0.5, seed=4, dtype=torch.float32)
    assert CpuBackend().prepare(values, index).bands.values.data_ptr() == values.data_ptr()


def test_the_public_op_takes_the_backend() -> None:
    values, index = random_layer((32, 16), (8, 1), 0.5, seed=5, dtype=torch.float32)
    x, bias = torch.randn(2, 3, 16), torch.randn(32)
    ours = block_sparse_linear(x, values, index, bias, "relu", backend="cpu")
    torch.testing.assert_close(ours, block_sparse_linear(x, values, index, bias, "relu", backend="reference"))
    assert ours.shape == (2, 3, 32)
    assert isinstance(get_backend("cpu"), CpuBackend)


def test_status_names_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    live, reason, isa = status()
    assert live and isa == ISAS[-1] and isa in reason
    monkeypatch.setenv(library.ENV_ISA, "portable")
    assert status()[2] == "portable"
    values, index = random_layer((8, 8), (8, 1), 0.5, seed=6, dtype=torch.float32)
    assert CpuBackend().prepare(values, index).isa == "portable"
    monkeypatch.setenv(library.ENV_ISA, "mmx")
    with pytest.raises(ValueError, match="HF_SPARSE_ISA='mmx' is not one of the instruction sets live here: portable"):
        status()


def _spec(dtype: torch.dtype, device: str = "cpu", shape: tuple[int, int] = (8, 8)) -> LayerSpec:
    layer = LayerFormat(block_shape=(1, 1), kept=shape[0] * shape[1], dense_shape=shape)
    return LayerSpec(layer=layer, device=torch.device(device), dtype=dtype)


def test_supports_says_why_not() -> None:
    backend = CpuBackend()
    assert backend.supports(_spec(torch.float32))[0] and backend.supports(_spec(torch.bfloat16))[0]
    for spec, reason in (
        (_spec(torch.float32, "meta"), "lies on meta"),
        (_spec(torch.float16), "torch.float16 is neither float32 nor bfloat16"),
        (_spec(torch.float32, shape=(2**16, 2**16)), "4294967296 kept columns .* do not fit 32-bit"),
    ):
        able, found = backend.supports(spec)
        assert not able
        with pytest.raises(ValueError, match=reason):
            raise ValueError(found)


def _wins(block: tuple[int, int], shape: tuple[int, int], density: float, dtype: torch.dtype, isa: str) -> bool:
    kept = int(density * (shape[0] // block[0]) * (shape[1] // block[1]))
    layer = LayerFormat(block_shape=block, kept=kept, dense_shape=shape)
    return CpuBackend(isa).wins(LayerSpec(layer=layer, device=torch.device("cpu"), dtype=dtype))


@pytest.mark.parametrize(
    ("block", "shape", "at_most"),
    [
        *(((8, 1), (64, 64), 0.7), ((8, 2), (64, 64), 0.7), ((32, 32), (1280, 1280), 0.6), ((4, 1), (64, 64), 0.5)),
        *(((2, 1), (64, 64), 0.4), ((1, 1), (64, 64), 0.2)),
        *(((1, 8), (64, 64), 0.35), ((1, 6), (64, 66), 0.2), ((1, 8), (64, 2048), 0.25)),
    ],
)
def test_wins_up_to_a_density(
    block: tuple[int, int], shape: tuple[int, int], at_most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dense layers of bfloat16 are faster with matrix tiles, whether we have them or not.
    for amx in (False, True):
        monkeypatch.setattr(cpu_limits, "has_amx", lambda amx=amx: amx)
        for dtype in (torch.float32, torch.bfloat16):
            limit = 0.05 if amx and dtype == torch.bfloat16 else at_most
            assert _wins(block, shape, limit, dtype, "avx512bf16")
            assert not _wins(block, shape, limit + 0.02, dtype, "avx512bf16")
        assert _wins(block, shape, at_most, torch.float32, "amx")


@pytest.mark.parametrize(
    ("block", "shape", "at_most"),
    [
        *(((32, 2), (768, 768), 0.474), ((16, 16), (768, 768), 0.381), ((8, 2), (768, 768), 0.237)),
        *(((8, 1), (768, 768), 0.143), ((4, 2), (768, 768), 0.114), ((1, 8), (768, 768), 0.028)),
        *(((8, 2), (384, 384), 0.129), ((8, 2), (3072, 768), 0.277), ((8, 2), (64, 64), 0.0)),
    ],
)
def test_matrix_tiles_win_up_to_a_density(
    block: tuple[int, int], shape: tuple[int, int], at_most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_limits, "has_amx", lambda: True)
    assert _wins(block, shape, at_most, torch.bfloat16, "amx")
    assert not _wins(block, shape, at_most + 0.01, torch.bfloat16, "amx")


@pytest.mark.parametrize(
    ("block", "density", "dtype", "isa", "tokens"),
    [
        *(((8, 1), 0.5, torch.bfloat16, "amx", 64), ((8, 1), 0.7, torch.bfloat16, "amx", 0)),
        *(((4, 2), 0.5, torch.bfloat16, "amx", 0), ((8, 1), 0.5, torch.float32, "amx", 0)),
        ((8, 1), 0.5, torch.bfloat16, "avx512bf16", 0),
    ],
)
def test_wins_for_few_tokens(
    block: tuple[int, int], density: float, dtype: torch.dtype, isa: str, tokens: int
) -> None:
    kept = int(density * (64 // block[0]) * (64 // block[1]))
    spec = LayerSpec(LayerFormat(block_shape=block, kept=kept, dense_shape=(64, 64)), torch.device("cpu"), dtype)
    assert CpuBackend(isa).until_tokens(spec) == tokens


def test_wrong_calls_are_refused() -> None:
    values, index = random_layer((16, 12), (8, 1), 0.5, seed=7, dtype=torch.float32)
    backend = CpuBackend()
    state, x = backend.prepare(values, index), torch.randn(3, 12)
    with pytest.raises(TypeError, match="x is torch.float64 on cpu, but the layer was prepared for torch.float32"):
        backend.run(x.double(), state, None, None)
    with pytest.raises(TypeError, match="x is torch.float32 on meta"):
        backend.run(x.to("meta"), state, None, None)
    with pytest.raises(ValueError, match=r"x must be \[tokens, 12\], found shape \[3, 11\]"):
        backend.run(x[:, :11], state, None, None)
    with pytest.raises(
        ValueError, match=r"bias must be torch.float32 of shape \[16\] .* found torch.float32 .*\[15\]"
    ):
        backend.run(x, state, torch.zeros(15), None)
    with pytest.raises(ValueError, match="found torch.bfloat16"):
        backend.run(x, state, torch.zeros(16, dtype=torch.bfloat16), None)
    with pytest.raises(ValueError, match="activation='tanh' is not one of"):
        backend.run(x, state, None, "tanh")
    with pytest.raises(RuntimeError, match="have no gradient"):
        backend.run(x.requires_grad_(), state, None, None)
    with torch.no_grad():
        backend.run(x, state, None, None)


def _raw(bands: int = 3, height: int = 4, columns: int = 10) -> dict[str, Tensor]:
    start = torch.tensor([0, 4, 4, 10], dtype=torch.int32)[: bands + 1]
    column = (torch.arange(columns, dtype=torch.int32) * 7) % 20
    return {"values": torch.randn(columns, height), "band_start": start, "column": column}


def _make(raw: dict[str, Tensor], in_features: int = 20) -> CpuWeight:
    return check_bands(Bands(**raw), in_features=in_features, dtype=torch.float32, isa=ISAS[-1])


@pytest.mark.parametrize(
    ("tensor", "place", "number"),
    [
        *(("column", 0, 20), ("column", 9, -1), ("column", 5, 2**31 - 1), ("column", 5, -(2**31))),
        *(("band_start", 0, 1), ("band_start", 0, -1), ("band_start", 3, 9), ("band_start", 3, 11)),
        *(("band_start", 1, 5), ("band_start", 1, -4), ("band_start", 2, 2**31 - 1), ("band_start", 2, 3)),
    ],
)
def test_an_index_that_points_outside_is_refused(tensor: str, place: int, number: int) -> None:
    raw = _raw()
    _make(raw)
    raw[tensor][place] = number
    with pytest.raises(FormatError, match="the index points outside the weight"):
        _make(raw)


def test_fuzzed_indices_never_reach_a_kernel() -> None:
    """Whatever passes the check stays inside: its result is that of the same weight laid out by hand."""
    generator = torch.Generator().manual_seed(8)
    passed = 0
    for _ in range(400):
        raw = _raw()
        for name in ("column", "band_start"):
            tensor = raw[name]
            place = int(torch.randint(tensor.numel(), (1,), generator=generator))
            tensor[place] = int(torch.randint(-3, 24, (1,), generator=generator))
        inside = bool(((raw["column"] >= 0) & (raw["column"] < 20)).all())
        start = raw["band_start"]
        inside &= bool(start[0] == 0) and bool(start[-1] == 10) and bool((start.diff() >= 0).all())
        if not inside:
            with pytest.raises(FormatError):
                _make(raw)
            continue
        passed += 1
        weight = torch.zeros(12, 20)
        for band in range(3):
            for j in range(int(start[band]), int(start[band + 1])):
                weight[4 * band : 4 * band + 4, raw["column"][j]] += raw["values"][j]
        x = torch.randn(5, 20)
        check(CpuBackend().run(x, _make(raw), None, None), x, weight, None, None)
    assert 20 < passed < 380


def test_tensors_of_another_kind_are_refused() -> None:
    for name, wrong in (
        ("values", torch.randn(10, 4).double()),
        ("values", torch.randn(4, 10).t()),
        ("band_start", torch.tensor([0, 4, 4, 10])),
        ("column", torch.zeros(10, 1, dtype=torch.int32)),
        ("column", torch.zeros(10, dtype=torch.int32, device="meta")),
    ):
        with pytest.raises(FormatError, match=f"{name} must be a contiguous CPU tensor"):
            _make({**_raw(), name: wrong})
    for name, wrong in (
        ("column", torch.zeros(9, dtype=torch.int32)),
        ("band_start", torch.zeros(0, dtype=torch.int32)),
        ("values", torch.zeros(10, 4, 3, dtype=torch.bfloat16)),
        ("values", torch.zeros(5, 4, 2, dtype=torch.bfloat16)),
        ("values", torch.zeros(9, 1, 4)),
    ):
        with pytest.raises(FormatError, match=r"values \[.*\], band_start \[.*\] and column \[.*\] do not belong"):
            _make({**_raw(), name: wrong})
    with pytest.raises(FormatError, match="an argument is out of range"):
        _make({**_raw(), "values": torch.zeros(10, 0)})
    with pytest.raises(FormatError, match="out of range"):
        _make(_raw(), in_features=-1)


def test_the_library_refuses_bad_arguments() -> None:
    handle, weight = library.load_library().handle, _make(_raw())
    x, y = torch.randn(2, 20), torch.empty(2, 12)
    good = [weight.address, None, x.data_ptr(), 20, y.data_ptr(), 2, 0, 1]
    assert handle is not None and handle.hfs_linear(*good) == 0
    for place, number in ((3, -1), (5, -1), (5, 2**31), (6, -1), (6, 9), (7, 0)):
        assert handle.hfs_linear(*good[:place], number, *good[place + 1 :]) == 1
    struct = library.Weight.from_buffer_copy(weight.struct)
    for name, number, code in (("form", 3, 1), ("dtype", 7, 1), ("isa", 9, 3), ("isa", -1, 3), ("height", 0, 1)):
        broken = library.Weight.from_buffer_copy(struct)
        setattr(broken, name, number)
        assert handle.hfs_check(ctypes.addressof(broken)) == code

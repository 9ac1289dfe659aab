"""The fused encoder against an encoder of plain torch in double precision."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, pad

from hf_sparse.core.stored.packing import FormatError
from hf_sparse.inference.kernels import library
from hf_sparse.inference.kernels.encoder import (
    AllMaskedError,
    EncoderShape,
    LayerParts,
    LinearParts,
    NativeEncoder,
)
from hf_sparse.inference.kernels.reference import activate, to_dense
from tests.inference.kernels.conftest import random_layer

pytestmark = pytest.mark.usefixtures("native_library")

ISAS = library.load_library().isas or ("portable",)
BLOCKS = ((1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (16, 16), (32, 32), (3, 1), None)
TOKENS = ((1, 1), (1, 15), (2, 17), (3, 50), (1, 129), (2, 200), (1, 16), (5, 3), (2, 32), (9, 20))
HEADS = ((1, 8), (4, 8), (2, 16), (3, 24), (1, 40), (2, 64), (1, 32))
MASKS = ("none", "right", "left", "float", "tiles", "one", "none")
# Errors are measured against the largest value: LayerNorm makes that a few, and float32 sums of some hundred terms in
# a few layers stay far below this.
EPS32 = 5e-6
# The result is rounded once: half a unit in the last of 8 bits.
EPS16 = 2.0**-8
# Kernels that multiply bfloat16 round what goes into every product. The reference rounds in the same places, so that
# only roundings that fall the other way are left, of which the worst case found makes 1.3e-3.
EPS_PAIRS = 2.0**-8


@dataclass(frozen=True)
class Case:
    """One encoder and one input, both random."""

    seed: int
    isa: str
    dtype: torch.dtype
    layers: list[LayerParts]
    shape: EncoderShape
    x: Tensor
    mask: Tensor | None
    bias: Tensor | None

    @property
    def native(self) -> NativeEncoder:
        return NativeEncoder(self.layers, self.shape, self.isa)

    def run(self, native: NativeEncoder, x: Tensor | None = None) -> Tensor:
        bias = None if self.bias is None else native.pad_bias(self.bias)
        return native.run(self.x if x is None else x, self.mask, bias)


def random_linear(
    rows: int, columns: int, block: tuple[int, int] | None, seed: int, dtype: torch.dtype
) -> LinearParts:
    density = (0.5, 0.2, 1.0, 0.3, 0.0)[seed % 5]
    bias = None if seed % 7 == 0 else (torch.randn(rows) * 0.3).to(dtype)
    size = 1 / math.sqrt(max(1.0, columns * (density or 1.0)))
    if block is None or rows % block[0] or columns % block[1]:
        return LinearParts.from_dense((torch.randn(rows, columns) / math.sqrt(columns)).to(dtype), bias)
    values, index = random_layer((rows, columns), block, density, seed, torch.float32)
    return LinearParts((values * size).to(dtype), index, bias)


def random_mask(kind: str, batch: int, length: int) -> Tensor | None:
    mask = torch.zeros(batch, length)
    if kind == "none":
        return None
    if kind == "float":
        return torch.randn(batch, length)
    for row in mask:
        seen = int(torch.randint(1, length + 1, ()))
        if kind == "right":
            row[seen:] = -torch.inf
        elif kind == "left":
            row[:-seen] = torch.finfo(torch.float32).min
        elif kind == "one":
            row.fill_(-1e9)
            row[seen - 1] = 0
        elif length > 48:  # whole tiles of every instruction set, at both ends and in the middle
            row[:32] = row[40:48] = row[-3:] = -torch.inf
    return mask


def random_case(seed: int, isa: str, dtype: torch.dtype) -> Case:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    heads, size = HEADS[seed % len(HEADS)]
    hidden = draw.choice((16, 40, 64, 96))
    inner = draw.choice((32, 64, 96, 200, 33))
    width = heads * size
    blocks = BLOCKS
    if dtype == torch.bfloat16 and seed % 3:  # what can be multiplied in pairs; anything else runs in float32
        blocks, inner = tuple(b for b in BLOCKS if b is None or b[0] % 2 == 0), inner // 2 * 2
    # A third of the encoders has one block shape, the others a new one for every linear.
    shapes = [blocks[seed % len(blocks)]] if seed % 4 == 0 else list(blocks)
    layers = []
    for layer in range(1 + seed % 3):
        dims = ((width, hidden),) * 3 + ((hidden, width), (inner, hidden), (hidden, inner))
        linears = tuple(
            random_linear(*dims[i], draw.choice(shapes), seed * 30 + layer * 6 + i, dtype) for i in range(6)
        )
        norms = tuple((torch.randn(hidden) * 0.2 + (i % 2 == 0)).to(dtype) for i in range(4))
        layers.append(LayerParts(linears, norms))
    batch, length = TOKENS[seed % len(TOKENS)]
    activation = [name for name in library.ACTIVATIONS if name][seed % 4]
    return Case(
        seed=seed,
        isa=isa,
        dtype=dtype,
        layers=layers,
        shape=EncoderShape(heads=heads, head_size=size, eps=(1e-12, 1e-5), activation=activation),
        x=torch.randn(batch, length, hidden).to(dtype),
        mask=random_mask(MASKS[seed % len(MASKS)], batch, length),
        bias=torch.randn(heads, length, length) if seed % 4 == 1 else None,
    )


def expected(case: Case, *, pairs: bool = False) -> Tensor:
    """Compute in double precision; with `pairs`, what goes into products is rounded to bfloat16."""

    def r(t: Tensor) -> Tensor:
        return t.bfloat16().double() if pairs else t

    def linear(x: Tensor, part: LinearParts) -> Tensor:
        y = r(x) @ to_dense(part.values, part.index).double().t()
        return y if part.bias is None else y + part.bias.double()

    heads, size = case.shape.heads, case.shape.head_size
    h = case.x.double()
    batch, length, hidden = h.shape
    for layer in case.layers:
        query, key, value, output, up, down = layer.linears
        q, k, v = (r(linear(h, part)).view(batch, length, heads, size).transpose(1, 2) for part in (query, key, value))
        scores = q @ k.transpose(2, 3) / math.sqrt(size)
        if case.mask is not None:
            scores = scores + case.mask.double()[:, None, None]
        if case.bias is not None:
            scores = scores + case.bias.double()
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        mixed = (r(weights) @ v) / weights.sum(-1, keepdim=True)
        gains = [t.double() for t in layer.norms]
        y = h + linear(mixed.transpose(1, 2).reshape(batch, length, heads * size), output)
        h = layer_norm(y, (hidden,), gains[0], gains[1], case.shape.eps[0])
        y = h + linear(activate(linear(h, up), case.shape.activation), down)
        h = layer_norm(y, (hidden,), gains[2], gains[3], case.shape.eps[1])
    return h


def check(y: Tensor, case: Case, isa: str) -> None:
    pairs = case.dtype == torch.bfloat16 and isa not in ("portable", "avx2", "avx512")
    wanted = expected(case, pairs=pairs)
    assert (y.shape, y.dtype) == (case.x.shape, case.dtype)
    tolerance = (EPS_PAIRS if pairs else EPS32) * wanted.abs().max()
    if case.dtype == torch.bfloat16:
        tolerance = tolerance + EPS16 * wanted.abs()
    error = (y.double() - wanted).abs() / tolerance
    assert bool((error <= 1).all()), f"case {case.seed}: {float(error.max()):.3g} of the tolerance"


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are written to memory full of NaN."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(torch.nan))


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("isa", ISAS)
def test_the_kernels_give_what_plain_torch_gives(isa: str, dtype: torch.dtype) -> None:
    """Any blocks, heads, lengths, masks, biases and activations; bit for bit the same for any number of threads."""
    for seed in range(36):
        case = random_case(seed, isa, dtype)
        native = case.native
        # The working memory of the call before this one is full of NaN.
        assert bool(case.run(native, torch.full_like(case.x, torch.nan)).isnan().all())
        y = case.run(native)
        check(y, case, native.isa)
        for threads in (2, 3) if seed % 2 else (2,):
            torch.set_num_threads(threads)
            assert torch.equal(case.run(native), y), f"case {seed} on {threads} threads"
        torch.set_num_threads(1)


@pytest.mark.parametrize("isa", ISAS)
def test_a_sequence_does_not_see_the_others(isa: str) -> None:
    """Bit for bit what it gives alone, and NaN stays where it is."""
    for seed in (2, 3, 12, 19, 25, 33):
        case = random_case(seed, isa, torch.float32)
        native = case.native
        x = case.x.repeat(4, 1, 1)[:6].contiguous()
        mask = torch.zeros(x.shape[:2])
        mask[::2, x.shape[1] // 2 + 1 :] = -torch.inf
        case = replace(case, x=x, mask=mask)
        y = case.run(native)
        for i in range(len(x)):
            alone = replace(case, x=x[i : i + 1], mask=mask[i : i + 1])
            assert torch.equal(alone.run(native)[0], y[i]), f"case {seed}, sequence {i}"
        poisoned = x.clone()
        poisoned[1, 0, 0] = torch.nan
        found = case.run(native, poisoned)
        others = [i for i in range(len(x)) if i != 1]
        assert bool(found[1].isnan().all())
        assert torch.equal(found[others], y[others])


@pytest.mark.parametrize("isa", ISAS)
def test_masked_tokens_are_not_seen(isa: str) -> None:
    for seed in (3, 5, 13, 24):
        case = random_case(seed, isa, torch.float32)
        native = case.native
        length = case.x.shape[1]
        mask = torch.zeros(case.x.shape[:2])
        mask[:, length // 3 + 1 :] = -torch.inf
        case = replace(case, mask=mask)
        changed = case.x.clone()
        changed[:, length // 3 + 1 :] += 100
        seen = slice(0, length // 3 + 1)
        assert torch.equal(case.run(native)[:, seen], case.run(native, changed)[:, seen])


@pytest.mark.parametrize("isa", ISAS)
def test_many_tokens(isa: str) -> None:
    """More key tiles than a block of keys takes, and more sequences than a chunk."""
    case = random_case(24, isa, torch.float32)
    native = case.native
    for batch, length in ((1, 600), (70, 9)):
        one = replace(case, x=torch.randn(batch, length, native.hidden), mask=None, bias=None)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            check(one.run(native), one, native.isa)
        torch.set_num_threads(1)


@pytest.mark.parametrize("isa", ISAS)
def test_large_numbers(isa: str) -> None:
    """A large common mean, and scores so far apart that all weights but one vanish."""
    case = random_case(10, isa, torch.float32)
    native = case.native
    for x in (case.x + 300, case.x * 1e4, case.x * 1e-6):
        large = replace(case, x=x.contiguous())
        wanted = expected(large)
        # What float32 itself loses: 300 + x keeps 2e-5 of x, and a score of 1e8 has steps of 8.
        error = (large.run(native).double() - wanted).abs().max() / wanted.abs().max()
        assert float(error) <= 5e-4


def test_empty_input() -> None:
    native = random_case(0, ISAS[0], torch.float32).native
    for shape in ((0, 5), (3, 0), (0, 0)):
        assert native.run(torch.zeros(*shape, native.hidden)).shape == (*shape, native.hidden)


@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min, -1e32])
def test_a_sequence_without_a_token_is_refused(value: float) -> None:
    native = random_case(0, ISAS[-1], torch.float32).native
    mask = torch.zeros(3, 20)
    mask[1] = value
    with pytest.raises(AllMaskedError, match="no token that is not masked"):
        native.run(torch.zeros(3, 20, native.hidden), mask)
    mask[1, 19] = 0
    assert not native.run(torch.zeros(3, 20, native.hidden), mask).isnan().any()


def test_a_bias_is_padded_to_sixteens() -> None:
    native = random_case(0, ISAS[0], torch.float32).native
    bias = torch.randn(1, 17, 17, dtype=torch.float64)
    padded = native.pad_bias(bias)
    assert (padded.shape, padded.dtype) == ((1, 32, 32), torch.float32)
    torch.testing.assert_close(padded, pad(bias.transpose(1, 2) * math.sqrt(8), (0, 15, 0, 15)).float())


def test_wrong_input_is_refused() -> None:
    native = random_case(0, ISAS[0], torch.float32).native
    d = native.hidden
    x = torch.zeros(2, 5, d)
    for wrong in (
        *(torch.zeros(2, 5, d + 1), torch.zeros(5, d), torch.zeros(2, 2, 5, d), x.double(), x.bfloat16()),
        *(torch.zeros(2, d, 5).transpose(1, 2), x.to("meta"), x[:1].expand(2, 5, d)),
    ):
        with pytest.raises(ValueError, match=rf"x must be contiguous torch.float32 \[batch, length, {d}\]"):
            native.run(wrong)
    mask = torch.zeros(2, 5)
    for wrong in (mask[:1], mask.double(), mask.bool(), torch.zeros(5, 2).t(), mask.to("meta"), torch.zeros(2, 16)):
        with pytest.raises(ValueError, match=r"mask must be contiguous float32 \[2, 5\]"):
            native.run(x, wrong)
    for wrong in (torch.zeros(1, 5, 5), torch.zeros(2, 16, 16), torch.zeros(1, 16, 32)):
        with pytest.raises(ValueError, match=r"bias must be what pad_bias gives, \[1, 16, 16\]"):
            native.run(x, None, wrong)


def test_a_bias_of_another_type_is_refused() -> None:
    native = random_case(0, ISAS[0], torch.float32).native
    x, bias = torch.zeros(2, 5, native.hidden), torch.zeros(1, 16, 16)
    for wrong in (bias.double(), torch.zeros(1, 16, 32)[..., ::2]):
        with pytest.raises(ValueError, match="bias must be"):
            native.run(x, None, wrong)


def test_weights_of_several_dtypes_are_refused() -> None:
    case = random_case(3, ISAS[0], torch.float32)
    first = case.layers[0].linears[0]
    mixed = (LinearParts(first.values.bfloat16(), first.index, first.bias), *case.layers[0].linears[1:])
    with pytest.raises(FormatError):
        NativeEncoder([LayerParts(mixed, case.layers[0].norms)], case.shape, ISAS[0])


@pytest.mark.parametrize("isa", ISAS)
def test_one_feature_may_be_much_larger_than_the_others(isa: str) -> None:
    """BERT-like models have features tens of times larger than the rest, the first as well as any other."""
    zero = LinearParts.from_dense(torch.zeros(768, 768), None)
    gain, shift = torch.ones(768), torch.zeros(768)
    shape = EncoderShape(heads=12, head_size=64, eps=(1e-12, 1e-12), activation="gelu")
    native = NativeEncoder([LayerParts((zero,) * 6, (gain, shift, gain, shift))], shape, isa)
    for feature in (0, 5, 767):
        x = torch.randn(1, 20, 768)
        x[..., feature] = 30
        wanted = layer_norm(layer_norm(x.double(), (768,), eps=1e-12), (768,), eps=1e-12)
        error = (native.run(x).double() - wanted).abs().max() / wanted.abs().max()
        assert float(error) <= EPS32


def test_parts_that_do_not_fit_are_refused() -> None:
    case = random_case(3, ISAS[0], torch.float32)
    layer, shape = case.layers[0], case.shape

    def make(linears: Any = layer.linears, norms: Any = layer.norms, **changes: Any) -> NativeEncoder:
        return NativeEncoder([LayerParts(tuple(linears), tuple(norms))], replace(shape, **changes), ISAS[0])

    make()
    last = len(layer.linears) - 1
    small = LinearParts.from_dense(torch.zeros(8, 8), None)
    for i in range(last + 1):
        with pytest.raises(FormatError):
            make([small if i == j else part for j, part in enumerate(layer.linears)])
    with pytest.raises(FormatError, match="vector"):
        make(norms=[torch.ones(3), *layer.norms[1:]])
    with pytest.raises(FormatError, match="vector"):
        make([replace(part, bias=torch.zeros(1)) for part in layer.linears])
    for changes in ({"heads": 0}, {"heads": shape.heads + 1}, {"head_size": 4}, {"head_size": 7}):
        with pytest.raises(FormatError, match="do not make an encoder"):
            make(**changes)
    with pytest.raises(KeyError):
        make(activation="tanh")


def test_what_was_given_is_kept_alive() -> None:
    case = random_case(9, ISAS[-1], torch.float32)
    native = case.native
    y = case.run(native)
    case.layers.clear()
    rubbish = [torch.full((64, 64), torch.nan) for _ in range(200)]
    assert torch.equal(case.run(native), y) and len(rubbish) == 200

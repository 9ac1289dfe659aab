"""The cpu backend: native kernels for weights in bands of columns, float32 and bfloat16, without gradients.

Shape letters: M tokens; O, I out and in features; the rest as in `bands`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_sparse.core.stored.packing import FormatError
from hf_sparse.inference.kernels import library
from hf_sparse.inference.kernels.bands import CHUNK, MAX_INDEX, Bands, Chunks, to_bands, to_chunks
from hf_sparse.inference.kernels.cpu_limits import density_limit, few_tokens
from hf_sparse.inference.kernels.registry import BlockIndex, LayerSpec, register

PAIRS_ISAS = ("avx512bf16", "amx")
TILES_ISA = "amx"


@dataclass(frozen=True, eq=False)
class CpuWeight:
    """A weight in the layout of the kernels, checked: nothing else may reach them.

    Attributes:
        bands: the tensors, kept alive here.
        in_features: I.
        out_features: O.
        dtype: of the activations and the bias.
        isa: instruction set that computes it.
        struct: the same for C.
        address: of `struct`.
        linear: `hfs_linear` of the library.
    """

    bands: Bands
    in_features: int
    out_features: int
    dtype: torch.dtype
    isa: str
    struct: library.Weight
    address: int
    linear: Callable[..., int]


def status() -> tuple[bool, str, str]:
    """Tell whether the native kernels are live, why (not), and with which instruction set ("" if not)."""
    loaded = library.load_library()
    return loaded.handle is not None, loaded.reason, library.choose_isa() if loaded.isas else ""


class CpuBackend:
    """Native kernels on the CPU, for inference.

    Args:
        isa: instruction set; None takes the best there is, or what `HF_SPARSE_ISA` says.
        form: "rows" or "lanes" forces one of the two kernels, for tests; "auto" picks by the number of tokens.
    """

    name = "cpu"

    def __init__(self, isa: str | None = None, form: str = "auto") -> None:
        self._isa = isa
        self._form = form

    def available(self) -> tuple[bool, str]:
        """Tell whether the library is built and loads."""
        loaded = library.load_library()
        return loaded.handle is not None, loaded.reason

    def supports(self, spec: LayerSpec) -> tuple[bool, str]:
        """Float32 and bfloat16 layers on the CPU, of less than 2**31 kept columns."""
        if spec.device.type != "cpu":
            return False, f"the layer lies on {spec.device}, not on the CPU"
        if spec.dtype not in library.DTYPES:
            return False, f"dtype {spec.dtype} is neither float32 nor bfloat16"
        kept = spec.layer.kept * spec.layer.block_shape[1]
        if max(kept, *spec.layer.dense_shape) > MAX_INDEX:
            return False, f"{kept} kept columns of a weight {spec.layer.dense_shape} do not fit 32-bit indices"
        return True, "float32 or bfloat16 on the CPU"

    def wins(self, spec: LayerSpec) -> bool:
        """Where it is measured to be at least as fast as dense for any number of tokens."""
        tiles = (self._isa or library.choose_isa()) == TILES_ISA
        return spec.density <= density_limit(spec, tiles)

    def until_tokens(self, spec: LayerSpec) -> int:
        """Give up to how many tokens it beats dense where `wins` says no; 0 for none."""
        return few_tokens(spec, (self._isa or library.choose_isa()) == TILES_ISA)

    def prepare(self, values: Tensor, index: BlockIndex) -> CpuWeight:
        """Lay the blocks out in bands.

        Raises:
            FormatError: if the index does not fit the weight.
            ValueError: if the library is not live or lacks the instruction set.
        """
        isa = self._isa or library.choose_isa()
        pairs = values.dtype == torch.bfloat16 and isa in PAIRS_ISAS
        bands = to_bands(values, index, lanes=library.LANES[isa], pairs=pairs)
        if isa == TILES_ISA and bands.kind in ("neighbours", "couples"):
            bands = replace(bands, chunks=to_chunks(bands))
        return check_bands(bands, in_features=index.layer.dense_shape[1], dtype=values.dtype, isa=isa, form=self._form)

    def run(self, x: Tensor, state: CpuWeight, bias: Tensor | None, activation: str | None) -> Tensor:
        """Compute [M, O] from x [M, I].

        Raises:
            ValueError: if x does not fit the weight, or there is no activation of that name.
            TypeError: if x or the bias has another dtype or device than the weight.
        """
        # Tracers must see one op; without one, calling the library directly saves the dispatcher's time.
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) not in (Tensor, torch.nn.Parameter):
            bands, chunks = state.bands, state.bands.chunks
            tiles = [] if chunks is None else [chunks.values, chunks.start, chunks.column]
            return torch.ops.hf_sparse.cpu_linear(
                x, bands.values, bands.band_start, bands.column, tiles, bias, activation, state.isa
            )
        return _call(x, state, bias, activation)


def check_bands(bands: Bands, *, in_features: int, dtype: torch.dtype, isa: str, form: str = "auto") -> CpuWeight:
    """Check a weight in bands and make it known to C.

    Args:
        bands: the weight.
        in_features: I.
        dtype: of the activations.
        isa: instruction set, one of `library.ISAS`.
        form: "auto", "rows" or "lanes".

    Raises:
        ValueError: if the library is not live.
        FormatError: if a tensor has another dtype, device or shape, or an index points outside the weight.
    """
    handle = library.load_library().handle
    if handle is None:
        raise ValueError(f"the cpu backend cannot be used: {library.load_library().reason}")
    pairs, chunks = bands.values.dtype == torch.bfloat16, bands.chunks
    tensors: list[tuple[str, Tensor, tuple[torch.dtype, ...], tuple[int, ...]]] = [
        ("values", bands.values, (torch.float32, torch.bfloat16), (3,) if pairs else (2, 3)),
        ("band_start", bands.band_start, (torch.int32,), (1,)),
        ("column", bands.column, (torch.int32,), (1, 2) if pairs else (1,)),
    ]
    if chunks is not None:
        tensors += [
            ("chunk values", chunks.values, (torch.bfloat16,), (4,)),
            ("chunk start", chunks.start, (torch.int32,), (1,)),
            ("chunk column", chunks.column, (torch.int32,), (2, 3)),
        ]
    for name, tensor, kinds, dims in tensors:
        if tensor.dtype not in kinds or tensor.ndim not in dims or not tensor.is_cpu or not tensor.is_contiguous():
            raise FormatError(
                f"{name} must be a contiguous CPU tensor of {' or '.join(map(str, dims))} dimensions and type "
                f"{' or '.join(map(str, kinds))}, found {tensor.dtype} {list(tensor.shape)} on {tensor.device}."
            )
    steps, height, *rest = bands.values.shape
    rows = (bands.band_start.shape[0] - 1) * height
    if rows < 0 or tuple(bands.column.shape) not in ((steps,), (steps, 2)) or (pairs and rest != [2]):
        raise FormatError(
            f"values {list(bands.values.shape)}, band_start {list(bands.band_start.shape)} and column "
            f"{list(bands.column.shape)} do not belong together."
        )
    if chunks is not None:
        number = chunks.values.shape[0]
        if (
            chunks.values.shape[1:] != (height, CHUNK, 2)
            or chunks.start.shape != bands.band_start.shape
            or chunks.column.shape != (number, CHUNK, *bands.column.shape[1:])
            or (chunks.start.numel() and int(chunks.start[-1]) != number)
        ):
            raise FormatError(
                f"chunks of values {list(chunks.values.shape)}, start {list(chunks.start.shape)} and column "
                f"{list(chunks.column.shape)} do not belong to values {list(bands.values.shape)} and column "
                f"{list(bands.column.shape)}."
            )
    struct = library.Weight(
        out_features=rows,
        in_features=in_features,
        height=height,
        width=rest[0] if rest and not pairs else 1,
        steps=steps,
        band_start=bands.band_start.data_ptr(),
        column=bands.column.data_ptr(),
        values=bands.values.data_ptr(),
        kind=library.KINDS[bands.kind],
        dtype=library.DTYPES[dtype],
        isa=library.ISAS.index(isa),
        form=library.FORMS[form],
        chunk_start=None if chunks is None else chunks.start.data_ptr(),
        chunk_column=None if chunks is None else chunks.column.data_ptr(),
        chunk_values=None if chunks is None else chunks.values.data_ptr(),
    )
    address = ctypes.addressof(struct)
    if code := handle.hfs_check(address):
        raise FormatError(f"a weight of {rows} x {in_features} in bands of {height} rows: {library.STATUS[code]}.")
    return CpuWeight(bands, in_features, rows, dtype, isa, struct, address, handle.hfs_linear)


def _call(x: Tensor, weight: CpuWeight, bias: Tensor | None, activation: str | None) -> Tensor:
    # Every microsecond here shows for one token: checks are spelled out, and nothing is computed twice.
    if not x.is_cpu or x.dtype is not weight.dtype:
        raise TypeError(f"x is {x.dtype} on {x.device}, but the layer was prepared for {weight.dtype} on the CPU.")
    if x.ndim != 2 or x.shape[1] != weight.in_features:
        raise ValueError(f"x must be [tokens, {weight.in_features}], found shape {list(x.shape)}.")
    if bias is not None:
        bias = _checked_bias(bias, weight)
    code = library.ACTIVATIONS.get(activation)
    if code is None:
        raise ValueError(f"activation={activation!r} is not one of {list(library.ACTIVATIONS)}.")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("the native CPU kernels have no gradient: use torch.no_grad() or another backend.")
    if not x.is_contiguous() and x.stride(1) != 1:
        x = x.contiguous()
    tokens = x.shape[0]
    y = x.new_empty(tokens, weight.out_features)
    status = weight.linear(
        weight.address,
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        x.stride(0),
        y.data_ptr(),
        tokens,
        code,
        torch.get_num_threads(),
    )
    if status:
        raise RuntimeError(f"the native kernel refused {tokens} tokens: {library.STATUS[status]}.")
    return y


def _checked_bias(bias: Tensor, weight: CpuWeight) -> Tensor:
    if not bias.is_cpu or bias.dtype is not weight.dtype or bias.shape != (weight.out_features,):
        raise ValueError(
            f"bias must be {weight.dtype} of shape [{weight.out_features}] on the CPU, found {bias.dtype} of shape "
            f"{list(bias.shape)} on {bias.device}."
        )
    return bias.contiguous()


_OPS = torch.library.Library("hf_sparse", "FRAGMENT")
_OPS.define(
    "cpu_linear(Tensor x, Tensor values, Tensor band_start, Tensor column, Tensor[] chunks, Tensor? bias, "
    "str? activation, str isa) -> Tensor"
)


def _cpu_linear(
    x: Tensor,
    values: Tensor,
    band_start: Tensor,
    column: Tensor,
    chunks: list[Tensor],
    bias: Tensor | None,
    activation: str | None,
    isa: str,
) -> Tensor:
    bands = Bands(values, band_start, column, Chunks(*chunks) if chunks else None)
    weight = check_bands(bands, in_features=x.shape[1], dtype=x.dtype, isa=isa)
    return _call(x, weight, bias, activation)


def _cpu_linear_fake(
    x: Tensor,
    values: Tensor,
    band_start: Tensor,
    column: Tensor,
    chunks: list[Tensor],
    bias: Tensor | None,
    activation: str | None,
    isa: str,
) -> Tensor:
    return x.new_empty(x.shape[0], (band_start.shape[0] - 1) * values.shape[1])


_OPS.impl("cpu_linear", _cpu_linear, "CPU")
torch.library.register_fake("hf_sparse::cpu_linear", _cpu_linear_fake, lib=_OPS)

register(CpuBackend())

"""The cpu backend: native kernels for weights in bands of columns, float32 and bfloat16.

A block of h rows x w columns is w adjacent columns of a band of h rows, so every block shape is one layout: for each
band the input columns it keeps, and for each of those h weights. Blocks h x 1 are stored in that layout already.

Shape letters: M tokens; O, I out and in features; h, w block height and width; R bands; N kept blocks; K kept columns
of all bands, N * w.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.core.packing import FormatError
from hf_sparse.inference.kernels import library
from hf_sparse.inference.kernels.registry import BlockIndex, LayerSpec, register

MAX_INDEX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class BandWeight:
    """A weight in the layout of the kernels, checked.

    Attributes:
        values: [K, h] float32, contiguous.
        band_start: [R + 1] int32; band r keeps the columns band_start[r] to band_start[r + 1].
        column: [K] int32, in [0, I).
        in_features: I.
        out_features: O.
        dtype: of the activations and the bias.
        isa: instruction set that computes it.
        struct: the same for C.
        address: of `struct`.
        linear: `hfs_linear` of the library.
    """

    values: Tensor
    band_start: Tensor
    column: Tensor
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
        return spec.density <= (0.5 if spec.layer.block_shape[0] >= 4 else 0.2)

    def prepare(self, values: Tensor, index: BlockIndex) -> BandWeight:
        """Lay the blocks out in bands.

        Raises:
            FormatError: if the index does not fit the weight.
        """
        isa = self._isa or library.choose_isa()
        height, width = index.layer.block_shape
        bands, in_features = index.layer.grid[0], index.layer.dense_shape[1]
        # For w = 1 and float32 this shares the values' memory.
        packed = values.detach().transpose(1, 2).reshape(-1, height).to(torch.float32).contiguous()
        band_start = torch.zeros(bands + 1, dtype=torch.int64)
        torch.cumsum(torch.bincount(index.rows, minlength=bands) * width, 0, out=band_start[1:])
        column = (index.cols[:, None] * width + torch.arange(width)).reshape(-1)
        for name, tensor in (("columns", column), ("band starts", band_start)):
            if tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) <= MAX_INDEX:
                raise FormatError(f"the {name} of a weight {index.layer.dense_shape} do not fit 32-bit indices.")
        return make_weight(
            packed,
            band_start.int(),
            column.int(),
            in_features=in_features,
            dtype=values.dtype,
            isa=isa,
            form=self._form,
        )

    def run(self, x: Tensor, state: BandWeight, bias: Tensor | None, activation: str | None) -> Tensor:
        """Compute [M, O] from x [M, I].

        Raises:
            ValueError: if x does not fit the weight, or there is no activation of that name.
            TypeError: if x or the bias has another dtype or device than the weight.
        """
        # Tracers must see one op; without one, calling the library directly saves the dispatcher's time.
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) not in (Tensor, torch.nn.Parameter):
            return torch.ops.hf_sparse.cpu_linear(
                x, state.values, state.band_start, state.column, bias, activation, state.isa
            )
        return _call(x, state, bias, activation)


def make_weight(
    values: Tensor, band_start: Tensor, column: Tensor, *, in_features: int, dtype: torch.dtype, isa: str, form: str
) -> BandWeight:
    """Check a weight in the layout of the kernels; nothing else may reach them.

    Args:
        values: [K, h] float32.
        band_start: [R + 1] int32.
        column: [K] int32.
        in_features: I.
        dtype: of the activations.
        isa: instruction set.
        form: "auto", "rows" or "lanes".

    Raises:
        ValueError: if the library is not live.
        FormatError: if a tensor has another dtype, device or shape, or an index points outside the weight.
    """
    handle = library.load_library().handle
    if handle is None:
        raise ValueError(f"the cpu backend cannot be used: {library.load_library().reason}")
    for name, tensor, kind, ndim in (
        ("values", values, torch.float32, 2),
        ("band_start", band_start, torch.int32, 1),
        ("column", column, torch.int32, 1),
    ):
        if tensor.dtype != kind or tensor.ndim != ndim or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise FormatError(
                f"{name} must be a contiguous {kind} CPU tensor of {ndim} dimensions, found {tensor.dtype} on "
                f"{tensor.device} of shape {list(tensor.shape)}."
            )
    bands, height = band_start.shape[0] - 1, values.shape[1]
    if bands < 0 or column.shape[0] != values.shape[0]:
        raise FormatError(f"{list(column.shape)} columns do not fit values {list(values.shape)} in {bands} bands.")
    struct = library.Weight(
        out_features=bands * height,
        in_features=in_features,
        height=height,
        kept_columns=column.shape[0],
        band_start=band_start.data_ptr(),
        column=column.data_ptr(),
        values=values.data_ptr(),
        dtype=library.DTYPES[dtype],
        isa=library.ISAS.index(isa),
        form=library.FORMS[form],
    )
    address = ctypes.addressof(struct)
    if code := handle.hfs_check(address):
        raise FormatError(f"a weight of {bands * height} x {in_features} in {bands} bands: {library.STATUS[code]}.")
    return BandWeight(
        values, band_start, column, in_features, bands * height, dtype, isa, struct, address, handle.hfs_linear
    )


def _call(x: Tensor, weight: BandWeight, bias: Tensor | None, activation: str | None) -> Tensor:
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


def _checked_bias(bias: Tensor, weight: BandWeight) -> Tensor:
    if not bias.is_cpu or bias.dtype is not weight.dtype or bias.shape != (weight.out_features,):
        raise ValueError(
            f"bias must be {weight.dtype} of shape [{weight.out_features}] on the CPU, found {bias.dtype} of shape "
            f"{list(bias.shape)} on {bias.device}."
        )
    return bias.contiguous()


_OPS = torch.library.Library("hf_sparse", "FRAGMENT")
_OPS.define(
    "cpu_linear(Tensor x, Tensor values, Tensor band_start, Tensor column, Tensor? bias, str? activation, str isa) "
    "-> Tensor"
)


def _cpu_linear(
    x: Tensor,
    values: Tensor,
    band_start: Tensor,
    column: Tensor,
    bias: Tensor | None,
    activation: str | None,
    isa: str,
) -> Tensor:
    weight = make_weight(values, band_start, column, in_features=x.shape[1], dtype=x.dtype, isa=isa, form="auto")
    return _call(x, weight, bias, activation)


def _cpu_linear_fake(
    x: Tensor,
    values: Tensor,
    band_start: Tensor,
    column: Tensor,
    bias: Tensor | None,
    activation: str | None,
    isa: str,
) -> Tensor:
    return x.new_empty(x.shape[0], (band_start.shape[0] - 1) * values.shape[1])


_OPS.impl("cpu_linear", _cpu_linear, "CPU")
torch.library.register_fake("hf_sparse::cpu_linear", _cpu_linear_fake, lib=_OPS)

register(CpuBackend())

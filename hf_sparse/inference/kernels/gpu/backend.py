"""The gpu backend: Triton programs for weights in blocks, where torch has a GPU.

Shape letters: M tokens; O, I out and in features; the rest as in `layout`.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hf_sparse.inference.kernels.gpu import limits
from hf_sparse.inference.kernels.gpu.layout import MAX_INDEX, GpuWeight, Side, to_gpu
from hf_sparse.inference.kernels.gpu.plan import call_key
from hf_sparse.inference.kernels.reference import ACTIVATIONS, activate
from hf_sparse.inference.kernels.registry import BlockIndex, LayerSpec, register

# Rows and columns of a block from which the gradients have programs.
MIN_TILE = 16
# The oldest that the programs have run with on a GPU; what they take from it came in the releases before it.
OLDEST_TRITON = (3, 6)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _triton_version() -> tuple[int, int]:
    import triton  # it takes long, and is needed where there is a GPU alone

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def interpreted() -> bool:
    """Tell whether Triton's interpreter runs the programs, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class GpuBackend:
    """Triton kernels, with gradients where tiles have them."""

    name = "gpu"

    def available(self) -> tuple[bool, str]:
        """Tell whether there is a GPU, and Triton to compile for it."""
        if importlib.util.find_spec("triton") is None:
            return False, "triton is not installed"
        slow = interpreted()
        if not slow and not torch.cuda.is_available():
            return False, "torch finds no GPU"
        if not slow and torch.version.cuda is not None and torch.cuda.get_device_capability() < (8, 0):
            return False, f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
        if (version := _triton_version()) < OLDEST_TRITON:
            found, needed = (".".join(map(str, numbers)) for numbers in (version, OLDEST_TRITON))
            return False, f"Triton {found} is older than {needed}, which torch 2.10 brings along"
        if slow:
            return True, "Triton's interpreter (TRITON_INTERPRET=1): right, and slow"
        return True, f"Triton on {torch.cuda.get_device_name()}"

    def supports(self, spec: LayerSpec) -> tuple[bool, str]:
        """Layers in float32, bfloat16 and float16 on a GPU, that fit 32-bit indices."""
        if spec.device.type != "cuda" and not (interpreted() and spec.device.type == "cpu"):
            return False, f"the layer lies on {spec.device}, not on a GPU"
        if spec.dtype not in DTYPES:
            return False, f"dtype {spec.dtype} is none of float32, bfloat16 and float16"
        if max(*spec.layer.dense_shape, spec.layer.kept * max(spec.layer.block_shape)) > MAX_INDEX:
            return False, f"{spec.layer.kept} blocks of {spec.layer.block_shape} do not fit 32-bit indices"
        return True, "float32, bfloat16 or float16 on a GPU"

    def wins(self, spec: LayerSpec) -> bool:
        """Where it is no slower than dense from some number of tokens on: `from_tokens` knows."""
        return spec.device.type == "cuda" and limits.wins_for_many(spec)

    def from_tokens(self, state: GpuWeight) -> int | None:
        """Give the number of tokens from which it is no slower than dense."""
        return limits.wins_from(state)

    def until_tokens(self, spec: LayerSpec) -> int:
        """Give up to how many tokens it beats dense where `wins` says no; 0 for none."""
        return limits.wins_until(spec) if spec.device.type == "cuda" else 0

    def prepare(self, values: Tensor, index: BlockIndex) -> GpuWeight:
        """Make the index; the values stay where they are."""
        return to_gpu(values, index)

    def run(self, x: Tensor, state: GpuWeight, bias: Tensor | None, activation: str | None) -> Tensor:
        """Compute [M, O] from x [M, I].

        Raises:
            ValueError: if x does not fit the weight, or there is no activation of that name.
            TypeError: if x or the bias has another dtype or device than the weight.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) not in (Tensor, torch.nn.Parameter):
            side = state.forward
            return torch.ops.hf_sparse.gpu_linear(
                x, state.values, side.table, side.column, bias, activation, side.features
            )
        if x.dtype is not torch.float32 and (again := state.launches.get(call_key(x, bias, activation))) is not None:
            with on_device(x):
                return again(x)
        return call(x, state.values, state.forward, bias, activation, state.density, state.launches)

    def follows(self, state: GpuWeight, values: Tensor) -> bool:
        """Tell whether the kernels read these very values."""
        return state.values.data_ptr() == values.data_ptr() and state.values.dtype is values.dtype

    def expects_writes(self, state: GpuWeight) -> bool:
        """Tell whether the gradient of the values was asked for."""
        return "written" in state.launches

    def input_gradient(self, grad: Tensor, state: GpuWeight) -> Tensor | None:
        """Compute the gradient of x [M, I] from that of y [M, O]; None for blocks that are no tiles."""
        if not _is_tile(state):
            return None
        return call(grad, state.values, state.backward, None, None, state.density, state.launches)

    def values_gradient(self, grad: Tensor, x: Tensor, state: GpuWeight) -> Tensor | None:
        """Compute the gradient of the values [N, h, w] and of no others; None for blocks that are no tiles."""
        if "written" not in state.launches:
            # Whoever asks for this will write to the values.
            state.launches.clear()
            state.launches["written"] = True
        if not _is_tile(state) or state.values.shape[0] == 0:
            return None
        from hf_sparse.inference.kernels.gpu.gradients import sampled

        index = state.index
        with on_device(x):
            return sampled(grad, x, index.rows, index.cols, index.layer.block_shape)


def _is_tile(state: GpuWeight) -> bool:
    # The programs of the gradients take tiles of powers of two; a column in a band would be a sum of single products.
    return all(size >= MIN_TILE and size & (size - 1) == 0 for size in state.index.layer.block_shape)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of a tensor the current one, where it is not."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def call(
    x: Tensor, values: Tensor, side: Side, bias: Tensor | None, activation: str | None, density: float,
    launches: dict[Any, Any],
) -> Tensor:  # fmt: skip
    """Check what is given, choose the plan, and compute.

    Args:
        x: [M, I], any strides.
        values: [N, h, w], contiguous.
        side: the bands of the weight.
        bias: [O] or None.
        activation: by name or None.
        density: of the weight, for the plan.
        launches: remembers plans and programs for the next call.
    """
    # Imported late: it brings Triton, which need not be installed.
    from hf_sparse.inference.kernels.gpu import choice, launch

    if x.dtype is not values.dtype or x.device != values.device:
        raise TypeError(f"x is {x.dtype} on {x.device}, but the layer is {values.dtype} on {values.device}.")
    if x.ndim != 2 or x.shape[1] != side.features:
        raise ValueError(f"x must be [tokens, {side.features}], found shape {list(x.shape)}.")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {sorted(ACTIVATIONS)} or None.")
    out_features = side.bands * side.height
    if bias is not None:
        if bias.dtype is not x.dtype or bias.device != x.device or bias.shape != (out_features,):
            raise ValueError(
                f"bias must be {x.dtype} of shape [{out_features}] on {x.device}, found {bias.dtype} of shape "
                f"{list(bias.shape)} on {bias.device}."
            )
        bias = bias.contiguous()
    if x.shape[0] == 0:
        return x.new_empty(0, out_features)
    if values.shape[0] == 0:
        y = x.new_zeros(x.shape[0], out_features)
        return activate(y if bias is None else y + bias, activation)
    plan = choice.plan_for(x, values, side, density, launches)
    x = choice.suited(x, plan)
    with on_device(x):
        return launch.multiply(x, values, side, bias, activation, plan, launches)


_OPS = torch.library.Library("hf_sparse", "FRAGMENT")
_OPS.define(
    "gpu_linear(Tensor x, Tensor values, Tensor table, Tensor column, Tensor? bias, str? activation, "
    "int in_features) -> Tensor"
)


def _gpu_linear(
    x: Tensor, values: Tensor, table: Tensor, column: Tensor, bias: Tensor | None, activation: str | None,
    in_features: int,
) -> Tensor:  # fmt: skip
    height, width = values.shape[1:]
    side = Side(table, None, column, height, width, width, 1, in_features)
    return call(x, values, side, bias, activation, values.numel() / (table.shape[0] * height * in_features), {})


def _gpu_linear_fake(
    x: Tensor, values: Tensor, table: Tensor, column: Tensor, bias: Tensor | None, activation: str | None,
    in_features: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], table.shape[0] * values.shape[1])


_OPS.impl("gpu_linear", _gpu_linear, "CUDA")
_OPS.impl("gpu_linear", _gpu_linear, "CPU")
torch.library.register_fake("hf_sparse::gpu_linear", _gpu_linear_fake, lib=_OPS)

register(GpuBackend())

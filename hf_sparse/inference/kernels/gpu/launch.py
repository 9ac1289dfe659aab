"""Calling the programs: from tensors and a plan to a result. No call waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_sparse.inference.kernels.gpu import programs
from hf_sparse.inference.kernels.gpu.layout import Side
from hf_sparse.inference.kernels.gpu.plan import Plan

# Tile of the transposition.
_TILE_M, _TILE_K = 64, 64


def multiply(
    x: Tensor, values: Tensor, side: Side, bias: Tensor | None, activation: str | None, plan: Plan,
    compiled: dict[Any, Any] | None = None,
) -> Tensor:  # fmt: skip
    """Compute y = activation(x @ W.T + bias), or x @ W for a backward side, with one plan.

    Args:
        x: [M, I], any strides, M >= 1.
        values: [N, h, w] contiguous.
        side: the bands of the weight.
        bias: [O] contiguous or None.
        activation: by name or None.
        plan: how.
        compiled: remembers programs, for calls that are alike.

    Returns:
        [M, O], contiguous.
    """
    tokens = x.shape[0]
    y = x.new_empty(tokens, side.bands * side.height)
    if plan.features_first:
        x = transpose(x, plan.m).t()
    run = {"few": _few, "gather": _gather, "copy": _copy}[plan.program]
    run(x, values, side, bias, activation, plan, y, compiled if compiled is not None else {})
    return y


def transpose(x: Tensor, multiple: int) -> Tensor:
    """Lay x [M, I] out as [I, M rounded up to a multiple]; what is beyond M is zero."""
    tokens, features = x.shape
    y = x.new_empty(features, -(-tokens // multiple) * multiple)
    m, k = min(_TILE_M, multiple), _TILE_K
    grid = (-(-y.shape[1] // m) * -(-features // k),)
    programs.transpose_program[grid](
        x, y, tokens, features, x.stride(0), x.stride(1), y.stride(0), M=m, K=k, num_warps=4
    )
    return y


def precision(dtype: torch.dtype) -> str:
    """Name how float32 is multiplied: as torch does, in full unless TensorFloat-32 was asked for."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def _few(
    x: Tensor, values: Tensor, side: Side, bias: Tensor | None, activation: str | None, plan: Plan, y: Tensor,
    compiled: dict[Any, Any],
) -> None:  # fmt: skip
    grid = side.bands * -(-side.height // plan.o)
    args = (
        x, values, side.start, side.column, side.order, values if bias is None else bias, y, y.shape[0], side.bands,
        x.stride(0), x.stride(1), y.stride(0),
    )  # fmt: skip
    constants = {
        "HEIGHT": side.height, "WIDTH": side.width, "M": plan.m, "O": plan.o, "K": plan.k,
        "HAS_BIAS": bias is not None, "ACTIVATION": activation, "PRECISION": precision(x.dtype),
    }  # fmt: skip
    _start(programs.few_program, grid, args, constants, plan, compiled)


def _gather(
    x: Tensor, values: Tensor, side: Side, bias: Tensor | None, activation: str | None, plan: Plan, y: Tensor,
    compiled: dict[Any, Any],
) -> None:  # fmt: skip
    grid = -(-y.shape[0] // plan.m) * side.bands * -(-side.height // plan.o)
    args = (
        x, values, side.start, side.start if side.block is None else side.block, side.column, side.order,
        values if bias is None else bias, y, y.shape[0], side.bands, x.stride(0), x.stride(1), y.stride(0),
    )  # fmt: skip
    constants = {
        "HEIGHT": side.height, "WIDTH": side.width, "STRIDE_ROW": side.stride_row, "STRIDE_INNER": side.stride_inner,
        "M": plan.m, "O": plan.o, "K": plan.k, "GROUP": plan.group, "FEATURES_FIRST": plan.features_first,
        "SWAPPED": plan.swapped, "LISTED": side.block is not None, "HAS_BIAS": bias is not None,
        "ACTIVATION": activation, "PRECISION": precision(x.dtype),
    }  # fmt: skip
    _start(programs.gather_program, grid, args, constants, plan, compiled)


def _copy(
    x: Tensor, values: Tensor, side: Side, bias: Tensor | None, activation: str | None, plan: Plan, y: Tensor,
    compiled: dict[Any, Any],
) -> None:  # fmt: skip
    grid = -(-y.shape[0] // plan.m) * side.bands * -(-side.height // plan.o)
    listed = side.block is not None
    x_desc = TensorDescriptor(x, list(x.shape), list(x.stride()), [plan.m, plan.k])
    flat = values.view(-1, values.shape[2])
    box = [plan.k, plan.o] if listed else [plan.o, plan.k]
    values_desc = TensorDescriptor(flat, list(flat.shape), list(flat.stride()), box)
    args = (
        x_desc, values_desc, side.start, side.start if side.block is None else side.block, side.column, side.order,
        values if bias is None else bias, y, y.shape[0], side.bands, y.stride(0),
    )  # fmt: skip
    constants = {
        "HEIGHT": side.height, "WIDTH": side.width, "M": plan.m, "O": plan.o, "K": plan.k, "GROUP": plan.group,
        "SWAPPED": plan.swapped, "LISTED": listed, "HAS_BIAS": bias is not None, "ACTIVATION": activation,
        "PRECISION": precision(x.dtype),
    }  # fmt: skip
    _start(programs.copy_program, grid, args, constants, plan, {})


def _start(
    program: Any, grid: int, args: tuple[Any, ...], constants: dict[str, Any], plan: Plan, compiled: dict[Any, Any]
) -> None:
    program[(grid,)](*args, **constants, num_warps=plan.warps, num_stages=plan.stages)

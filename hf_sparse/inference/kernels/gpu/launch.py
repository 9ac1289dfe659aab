"""Calling the programs: from tensors and a plan to a result. No call waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_sparse.inference.kernels.gpu import programs
from hf_sparse.inference.kernels.gpu.layout import Side
from hf_sparse.inference.kernels.gpu.plan import Plan, call_key

_PROGRAMS = {"few": programs.few_program, "gather": programs.gather_program, "copy": programs.copy_program}
# Where y stands among the arguments of a program, and of one that takes boxes.
_OUTPUT, _BOXED_OUTPUT = 6, 7
# Entries of what is remembered of a weight.
_MOST_KEPT = 512
# Tokens, features and warps of a program that transposes.
_TILE = (64, 64, 4)


def multiply(
    x: Tensor, values: Tensor, side: Side, bias: Tensor | None, activation: str | None, plan: Plan,
    compiled: dict[Any, Any] | None = None,
) -> Tensor:  # fmt: skip
    """Compute y = activation(x @ W.T + bias), or x @ W for a backward side, with one plan.

    Args:
        x: [M, I], any strides, M >= 1.
        values: [N, h, w] contiguous, N >= 1.
        side: the bands of the weight.
        bias: [O] contiguous or None.
        activation: by name or None.
        plan: how.
        compiled: remembers programs, for calls that are alike.

    Returns:
        [M, O], contiguous.
    """
    given, tokens = x, x.shape[0]
    y = x.new_empty(tokens, side.bands * side.height)
    if plan.features_first and not (x.stride(0) == 1 and tokens % plan.m == 0 and x.stride(1) % 16 == 0):
        x = transpose(x, plan.m, plan.early).t()
    listed = side.block is not None
    shared = (
        side.table, side.column if side.block is None else side.block, side.column,
        values if bias is None else bias, y, tokens, side.bands,
    )  # fmt: skip
    sizes = {"HEIGHT": side.height, "WIDTH": side.width, "M": plan.m, "O": plan.o, "K": plan.k}
    last = {
        "HAS_BIAS": bias is not None, "ACTIVATION": activation, "PRECISION": precision(x.dtype), "EARLY": plan.early,
    }  # fmt: skip
    grid = (-(-tokens // plan.m) if plan.m > 1 else 1) * side.bands * -(-side.height // plan.o)
    args: tuple[Any, ...]
    constants: dict[str, Any]
    if plan.program == "copy":
        flat = values.view(-1, values.shape[2])
        of_values = _box(flat, plan.k, plan.o) if listed else _box(flat, plan.o, plan.k)
        args = (_box(x, plan.m, plan.k), of_values, _box(y, plan.m, plan.o), *shared, y.stride(0))
        ways = {"GROUP": plan.group, "SWAPPED": plan.swapped, "LISTED": listed, "BOXED": plan.boxed}
        constants = {**sizes, **ways, **last}
    else:
        args = (x, values, *shared, x.stride(0), x.stride(1), y.stride(0))
        constants = {**sizes, **last}
        if plan.program == "gather":
            strides = {"STRIDE_ROW": side.stride_row, "STRIDE_INNER": side.stride_inner, "GROUP": plan.group}
            ways = {"FEATURES_FIRST": plan.features_first, "SWAPPED": plan.swapped, "LISTED": listed}
            constants = {**sizes, **strides, **ways, **last}
    # What Triton compiles anew for. Finding out takes it longer than a product of few tokens, so programs are kept.
    alike = (plan, side.stride_inner, *last.values(), x.stride(), (x.data_ptr() | shared[3].data_ptr()) % 16)
    kept = None if compiled is None else compiled.get(alike)
    if kept is None:
        kept = _PROGRAMS[plan.program][(grid,)](*args, **constants, **options(plan))
    else:
        kept[(grid, 1, 1)](*args, *constants.values())
    # The interpreter gives nothing to keep.
    if compiled is not None and kept is not None:
        _make_room(compiled)
        compiled[alike] = kept
        if side.stride_inner == 1 and side.block is None:
            prepare = partial(transpose, multiple=plan.m, early=plan.early) if x is not given else None
            again = _again(kept[(grid, 1, 1)], args, tuple(constants.values()), prepare)
            compiled[call_key(given, bias, activation)] = again
    return y


def _make_room(compiled: dict[Any, Any]) -> None:
    # Every number of tokens is a call of its own: those of long ago are forgotten.
    if len(compiled) >= _MOST_KEPT:
        for key in [key for key in compiled if not isinstance(key, str)]:
            del compiled[key]


class _Tensor:
    """What a launch reads of a `TensorDescriptor`, without the checks of one."""

    __slots__ = ("base", "block_shape", "padding", "shape", "strides")

    def __init__(self, base: Tensor | None, like: Any) -> None:
        self.base, self.shape, self.strides = base, like.shape, like.strides
        self.block_shape, self.padding = like.block_shape, like.padding


def _again(
    launch: Any, args: tuple[Any, ...], constants: tuple[Any, ...], prepare: Callable[[Tensor], Tensor] | None
) -> Callable[[Tensor], Tensor]:
    # The same call with another x: a few microseconds of Python, where those above take many. What is kept here keeps
    # the bias alive, so that no other one gets its number.
    boxed = not isinstance(args[0], Tensor)
    if boxed:
        x_box, of_values, y_box, *between = args[:_BOXED_OUTPUT]
        # Their shapes alone: the tensors of this call must not live as long as the weight.
        x_box, y_box = _Tensor(None, x_box), _Tensor(None, y_box)
        y, *after = args[_BOXED_OUTPUT:]
    else:
        _, *between = args[:_OUTPUT]
        y, *after = args[_OUTPUT:]
    shape = y.shape

    def again(x: Tensor) -> Tensor:
        y = x.new_empty(shape)
        if boxed:
            launch(_Tensor(x, x_box), of_values, _Tensor(y, y_box), *between, y, *after, *constants)
        else:
            launch(x if prepare is None else prepare(x).t(), *between, y, *after, *constants)
        return y

    return again


def options(plan: Plan) -> dict[str, Any]:
    """Give what Triton calls the options of a launch."""
    found: dict[str, Any] = {"num_warps": plan.warps, "num_stages": plan.stages}
    if plan.early:
        found["launch_pdl"] = True
    return found


def _box(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def transpose(x: Tensor, multiple: int, early: int = 0, tile: tuple[int, int, int] = _TILE) -> Tensor:
    """Lay x [M, I] out as [I, M rounded up to a multiple]; what is beyond M is zero.

    Args:
        x: any strides.
        multiple: a power of two.
        early: see `Plan`.
        tile: tokens, features and warps of a program.
    """
    tokens, features = x.shape
    y = x.new_empty(features, -(-tokens // multiple) * multiple)
    m, k, warps = min(tile[0], multiple), tile[1], tile[2]
    grid = (-(-y.shape[1] // m) * -(-features // k),)
    programs.transpose_program[grid](
        x, y, tokens, features, x.stride(0), x.stride(1), y.stride(0), M=m, K=k, EARLY=early, num_warps=warps,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return y


def precision(dtype: torch.dtype) -> str:
    """Name how float32 is multiplied: as torch does, in full unless TensorFloat-32 was asked for."""
    if dtype != torch.float32:
        return "ieee"
    asked = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if asked is None:
        asked = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return "tf32" if asked == "tf32" else "ieee"

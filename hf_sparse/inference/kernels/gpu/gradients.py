"""The gradient of the kept blocks alone: a product of outputs and inputs, sampled where the weight has blocks."""

# The language of Triton has no types that Python could check.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.inference.kernels.gpu.launch import precision

# Rows and columns of a tile, and tokens that are taken at once.
_TILE, _SINGLE_TILE, _TOKENS, _SINGLE_TOKENS = 128, 32, 64, 16


@triton.jit(do_not_specialize=["tokens"])
def sampled_program(
    grad_ptr, x_ptr, rows_ptr, cols_ptr, out_ptr, tokens, stride_gm, stride_xm,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, O: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute a tile of O x K of one block: the sum over tokens of grad [tokens, O] times x [tokens, K]."""
    across: tl.constexpr = WIDTH // K
    parts: tl.constexpr = HEIGHT // O * across
    block = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    row = part // across * O + tl.arange(0, O)
    column = part % across * K + tl.arange(0, K)
    # Blocks are stored row by row, so that programs side by side read the same columns of grad.
    grads = grad_ptr + tl.load(rows_ptr + block) * HEIGHT + row
    xs = x_ptr + tl.load(cols_ptr + block) * WIDTH + column
    acc = tl.zeros((O, K), dtype=tl.float32)
    for first in tl.range(0, tokens, M):
        token = first + tl.arange(0, M)
        live = (token < tokens)[:, None]
        place = token.to(tl.int64)[:, None]
        grad = tl.load(grads[None, :] + place * stride_gm, mask=live, other=0.0)
        x = tl.load(xs[None, :] + place * stride_xm, mask=live, other=0.0)
        acc = tl.dot(tl.trans(grad), x, acc, input_precision=PRECISION)
    out = out_ptr + block.to(tl.int64) * (HEIGHT * WIDTH) + row[:, None] * WIDTH + column[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty))


def sampled(grad: Tensor, x: Tensor, rows: Tensor, cols: Tensor, block: tuple[int, int]) -> Tensor:
    """Compute the gradient of the values.

    Args:
        grad: [M, O], of y.
        x: [M, I].
        rows, cols: [N], grid row and column of each block.
        block: (h, w), both powers of two and at least 16.

    Returns:
        [N, h, w].
    """
    height, width = block
    most, taken = (_SINGLE_TILE, _SINGLE_TOKENS) if x.itemsize > 2 else (_TILE, _TOKENS)
    o, k = min(height, most), min(width, most)
    grad, x = (given if given.stride(1) == 1 else given.contiguous() for given in (grad, x))
    out = x.new_empty(rows.numel(), height, width)
    launch: Any = sampled_program[(rows.numel() * (height // o) * (width // k),)]
    launch(
        grad, x, rows, cols, out, x.shape[0], grad.stride(0), x.stride(0), HEIGHT=height, WIDTH=width, M=taken, O=o,
        K=k, PRECISION=precision(x.dtype), num_warps=8 if o * k > 64 * 128 else 4, num_stages=3,
    )  # fmt: skip
    return out

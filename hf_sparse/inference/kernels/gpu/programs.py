"""The Triton programs: the product for many tokens, the product for few, and a transposition.

All of them take a weight as `layout.Side` describes it. A program makes a tile of y: some tokens of one band of output
rows, or of a part of its rows. Along a band, step k of the sum belongs to block k // width of the band and to its
column k % width; that holds for every block shape.

Letters: M tokens of a tile; O rows of a tile; K steps of the sum that are taken at once.
"""

# The language of Triton has no types that Python could check.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _activate(y, activation: tl.constexpr):
    if activation == "relu":
        y = tl.maximum(y, 0.0)
    elif activation == "silu":
        y = y * tl.sigmoid(y)
    elif activation == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif activation == "gelu_tanh":
        # 0.5 (1 + tanh(u)) is the logistic function of 2 u.
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    return y


@triton.jit
def _tile(program, tokens, bands, table_ptr, M: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr):
    # Programs that run at the same time share the rows of x of a few tiles of tokens, which then stay in the cache.
    tiles = tl.cdiv(tokens, M)
    in_group = GROUP * bands * PARTS
    first = program // in_group * GROUP
    size = tl.minimum(tiles - first, GROUP)
    place = program % in_group
    m = first + place % size
    n = place // size
    line = table_ptr + n // PARTS * 3
    return m, tl.load(line), n % PARTS, tl.load(line + 1), tl.load(line + 2)


@triton.jit
def _store(acc, y_ptr, bias_ptr, m, row, rows, tokens, band, stride_y, HEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
           ACTIVATION: tl.constexpr):  # fmt: skip
    # acc [M, O] float32; rows are tokens, row counts within the band.
    inside = row < HEIGHT
    feature = band * HEIGHT + row
    if HAS_BIAS:
        acc += tl.load(bias_ptr + feature, mask=inside, other=0.0).to(tl.float32)[None, :]
    acc = _activate(acc, ACTIVATION)
    place = y_ptr + rows.to(tl.int64)[:, None] * stride_y + feature[None, :]
    tl.store(place, acc.to(y_ptr.dtype.element_ty), mask=(rows < tokens)[:, None] & inside[None, :])


@triton.jit
def _column(column_ptr, start, i, count, step, WIDTH: tl.constexpr, K: tl.constexpr):
    # The columns of step i of a band; those past its end are 0.
    if WIDTH % K == 0:
        split: tl.constexpr = WIDTH // K
        entry = i // split
        return tl.load(column_ptr + start + entry, mask=entry < count, other=0) * WIDTH + (i % split) * K + step
    at = i * K + step
    return tl.load(column_ptr + start + at // WIDTH, mask=at < count * WIDTH, other=0) * WIDTH + at % WIDTH


@triton.jit(do_not_specialize=["tokens", "bands"])
def gather_program(
    x_ptr, values_ptr, table_ptr, block_ptr, column_ptr, bias_ptr, y_ptr,
    tokens, bands, stride_xm, stride_xk, stride_y,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, O: tl.constexpr, K: tl.constexpr,
    STRIDE_ROW: tl.constexpr, STRIDE_INNER: tl.constexpr, GROUP: tl.constexpr, FEATURES_FIRST: tl.constexpr,
    SWAPPED: tl.constexpr, LISTED: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Multiply many tokens with pointers to every element, for any block shape and either order of x.

    FEATURES_FIRST takes x as [I, tokens rounded up to M], whose rows are gathered whole; otherwise x is [tokens, I].
    SWAPPED computes the tile of y transposed, which puts the rows of the weight on the long side of a matrix product.
    """
    parts: tl.constexpr = (HEIGHT + O - 1) // O
    m, band, part, start, count = _tile(tl.program_id(0), tokens, bands, table_ptr, M, parts, GROUP)
    rows = m * M + tl.arange(0, M)
    row = part * O + tl.arange(0, O)
    inside = row < HEIGHT
    # Tokens beyond the last repeat it: nothing is read outside of x, and their results are not stored.
    token = rows if FEATURES_FIRST else tl.minimum(rows, tokens - 1)
    x_rows = x_ptr + token.to(tl.int64) * stride_xm
    step = tl.arange(0, K)
    if SWAPPED:
        acc = tl.zeros((O, M), dtype=tl.float32)
    else:
        acc = tl.zeros((M, O), dtype=tl.float32)
    # The column of the next step is read a step ahead: what it points at can then be on its way for several steps.
    split: tl.constexpr = max(WIDTH // K, 1)
    if WIDTH % K == 0:
        steps = count * split
    else:
        steps = tl.cdiv(count * WIDTH, K)
    following = _column(column_ptr, start, 0, count, step, WIDTH, K)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    for i in tl.range(0, steps):
        column = following
        following = _column(column_ptr, start, i + 1, count, step, WIDTH, K)
        if WIDTH % K == 0:
            entry = start + i // split
            inner = (i % split) * K + step
            live = step < K
        else:
            at = i * K + step
            entry = start + at // WIDTH
            inner = at % WIDTH
            live = at < count * WIDTH
        if LISTED:
            block = tl.load(block_ptr + entry) if WIDTH % K == 0 else tl.load(block_ptr + entry, mask=live, other=0)
        else:
            block = entry
        values = values_ptr + block.to(tl.int64) * (HEIGHT * WIDTH) + inner * STRIDE_INNER
        # Past the end both are zero: a weight of zero alone would not do, 0 * inf is not 0.
        if FEATURES_FIRST:
            xs = x_rows[None, :] + column.to(tl.int64)[:, None] * stride_xk
            if WIDTH % K == 0:
                xt = tl.load(xs)
            else:
                xt = tl.load(xs, mask=live[:, None], other=0.0)
        else:
            xs = x_rows[:, None] + column[None, :] * stride_xk
            if WIDTH % K == 0:
                xt = tl.trans(tl.load(xs))
            else:
                xt = tl.trans(tl.load(xs, mask=live[None, :], other=0.0))
        if STRIDE_ROW == 1:
            ws = values[:, None] + row[None, :]
            if WIDTH % K == 0 and HEIGHT % O == 0:
                w = tl.load(ws)
            else:
                w = tl.load(ws, mask=live[:, None] & inside[None, :], other=0.0)
        else:
            ws = values[None, :] + row[:, None] * STRIDE_ROW
            if WIDTH % K == 0 and HEIGHT % O == 0:
                w = tl.trans(tl.load(ws))
            else:
                w = tl.trans(tl.load(ws, mask=live[None, :] & inside[:, None], other=0.0))
        if SWAPPED:
            acc = tl.dot(tl.trans(w), xt, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(tl.trans(xt), w, acc, input_precision=PRECISION)
    if SWAPPED:
        acc = tl.trans(acc)
    _store(acc, y_ptr, bias_ptr, m, row, rows, tokens, band, stride_y, HEIGHT, HAS_BIAS, ACTIVATION)


@triton.jit(do_not_specialize=["tokens", "bands"])
def copy_program(
    x_desc, values_desc, y_desc, table_ptr, block_ptr, column_ptr, bias_ptr, y_ptr, tokens, bands, stride_y,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, O: tl.constexpr, K: tl.constexpr,
    GROUP: tl.constexpr, SWAPPED: tl.constexpr, LISTED: tl.constexpr, BOXED: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Multiply many tokens by blocks that the copy engine brings: x [tokens, I] in boxes of [M, K], weights of [O, K].

    WIDTH is a multiple of K, and HEIGHT one of O. LISTED is the backward direction: weights come in boxes of [K, O].
    """
    parts: tl.constexpr = HEIGHT // O
    m, band, part, start, count = _tile(tl.program_id(0), tokens, bands, table_ptr, M, parts, GROUP)
    if SWAPPED:
        acc = tl.zeros((O, M), dtype=tl.float32)
    else:
        acc = tl.zeros((M, O), dtype=tl.float32)
    split: tl.constexpr = WIDTH // K
    following = tl.load(column_ptr + start, mask=count > 0, other=0) * WIDTH
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    for i in tl.range(0, count * split):
        column = following
        ahead = i + 1
        following = tl.load(column_ptr + start + ahead // split, mask=ahead < count * split, other=0) * WIDTH
        following += (ahead % split) * K
        entry = start + i // split
        inner = (i % split) * K
        x = x_desc.load([m * M, column])
        if LISTED:
            w = values_desc.load([tl.load(block_ptr + entry) * WIDTH + inner, part * O])
        else:
            w = tl.trans(values_desc.load([entry * HEIGHT + part * O, inner]))
        if SWAPPED:
            acc = tl.dot(tl.trans(w), tl.trans(x), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if SWAPPED:
        acc = tl.trans(acc)
    rows = m * M + tl.arange(0, M)
    row = part * O + tl.arange(0, O)
    if BOXED:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + band * HEIGHT + row).to(tl.float32)[None, :]
        y_desc.store([m * M, band * HEIGHT + part * O], _activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty))
    else:
        _store(acc, y_ptr, bias_ptr, m, row, rows, tokens, band, stride_y, HEIGHT, HAS_BIAS, ACTIVATION)


@triton.jit
def _weights(base, i, row, step, length, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr):
    # The weights [O, K] of chunk i of a band; zero past its end and below its last row.
    at = i * K + step
    place = (at // WIDTH).to(tl.int64) * (HEIGHT * WIDTH) + at % WIDTH
    live = (at < length)[None, :] & (row < HEIGHT)[:, None]
    return tl.load(base + place[None, :] + row[:, None] * WIDTH, mask=live, other=0.0)


@triton.jit
def _features(column_ptr, i, step, length, WIDTH: tl.constexpr, K: tl.constexpr):
    # The columns of x of chunk i of a band.
    at = i * K + step
    return tl.load(column_ptr + at // WIDTH, mask=at < length, other=0) * WIDTH + at % WIDTH


@triton.jit(do_not_specialize=["tokens", "bands"])
def few_program(
    x_ptr, values_ptr, table_ptr, block_ptr, column_ptr, bias_ptr, y_ptr,
    tokens, bands, stride_xm, stride_xk, stride_y,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, O: tl.constexpr, K: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Multiply a few tokens, M = 1 or 16 at most: read every weight once, with many reads on their way."""
    parts: tl.constexpr = (HEIGHT + O - 1) // O
    program = tl.program_id(0)
    line = table_ptr + program // parts * 3
    band, start, count = tl.load(line), tl.load(line + 1), tl.load(line + 2)
    length = count * WIDTH
    row = program % parts * O + tl.arange(0, O)
    step = tl.arange(0, K)
    token = tl.arange(0, M)
    base = values_ptr + start.to(tl.int64) * (HEIGHT * WIDTH)
    columns = column_ptr + start
    if EARLY > 0:
        gdc_launch_dependents()
    next_column = _features(columns, 0, step, length, WIDTH, K)
    if EARLY == 1:
        gdc_wait()
    next_w = _weights(base, 0, row, step, length, HEIGHT, WIDTH, K)
    if EARLY == 2:
        gdc_wait()
    if M == 1:
        acc = tl.zeros((O, K), dtype=tl.float32)
    else:
        acc = tl.zeros((O, M), dtype=tl.float32)
    for i in tl.range(0, tl.cdiv(length, K)):
        w, column = next_w, next_column
        next_column = _features(columns, i + 1, step, length, WIDTH, K)
        next_w = _weights(base, i + 1, row, step, length, HEIGHT, WIDTH, K)
        live = i * K + step < length
        if M == 1:
            x = tl.load(x_ptr + column * stride_xk, mask=live, other=0.0)
            acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
        else:
            xs = x_ptr + token[None, :] * stride_xm + column.to(tl.int64)[:, None] * stride_xk
            x = tl.load(xs, mask=live[:, None] & (token < tokens)[None, :], other=0.0)
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
    if M == 1:
        y = tl.sum(acc, 1)[None, :]
    else:
        y = tl.trans(acc)
    _store(y, y_ptr, bias_ptr, 0, row, token, tokens, band, stride_y, HEIGHT, HAS_BIAS, ACTIVATION)


@triton.jit(do_not_specialize=["tokens"])
def transpose_program(
    x_ptr, y_ptr, tokens, features, stride_xm, stride_xk, stride_y, M: tl.constexpr, K: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Lay x [tokens, I] out as [I, stride_y]: the features first."""
    tiles = tl.cdiv(features, K)
    rows = (tl.program_id(0) // tiles) * M + tl.arange(0, M)
    columns = (tl.program_id(0) % tiles) * K + tl.arange(0, K)
    inside = (rows < tokens)[:, None] & (columns < features)[None, :]
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * stride_xm + columns[None, :] * stride_xk, mask=inside, other=0.0)
    place = y_ptr + columns.to(tl.int64)[:, None] * stride_y + rows[None, :]
    tl.store(place, tl.trans(x), mask=(columns < features)[:, None] & (rows < stride_y)[None, :])

// Row segments: blocks of one output row x W neighbouring columns. A vector holds W weights of a row and is multiplied
// with the same W features of a token; the W partial sums of a row and token are added up at its end.
#pragma once
#include "lanes.h"
#include "panels.h"
#include "parallel.h"

namespace HFS_ISA {

// Lane i of the result is the sum of the lanes of v[i].
template <int W>
HFS_INLINE Vec<W> sum_lanes(const Vec<W> (&v)[W]) {
    Vec<W> quads[W / 4];
    HFS_UNROLL
    for (int i = 0; i < W; i += 4) {
        const Vec<W> a = zip_lo(v[i], v[i + 1]) + zip_hi(v[i], v[i + 1]);
        const Vec<W> b = zip_lo(v[i + 2], v[i + 3]) + zip_hi(v[i + 2], v[i + 3]);
        quads[i / 4] = pair_lo(a, b) + pair_hi(a, b);
    }
    if constexpr (W == 4) {
        return quads[0];
    } else if constexpr (W == 8) {
        return quad_lo(quads[0], quads[1]) + quad_hi(quads[0], quads[1]);
    } else {
        const Vec<W> a = quad_even(quads[0], quads[1]) + quad_odd(quads[0], quads[1]);
        const Vec<W> b = quad_even(quads[2], quads[3]) + quad_odd(quads[2], quads[3]);
        return quad_even(a, b) + quad_odd(a, b);
    }
}

// One row for R <= W tokens: sums in lanes 0 .. R - 1. U copies of the sums hide the latency of the multiply-add.
template <int W, int R>
HFS_INLINE Vec<W> segments_row(const float* __restrict x, int64_t x_stride, const int32_t* __restrict column,
                               int64_t n, const float* __restrict values) {
    constexpr int U = R <= 1 ? 4 : R <= 4 ? 2 : 1;
    Vec<W> acc[U][R];
    HFS_UNROLL
    for (int u = 0; u < U; u++) {
        HFS_UNROLL
        for (int r = 0; r < R; r++) acc[u][r] = Vec<W>{};
    }
    const auto step = [&](int64_t j, Vec<W>(&sums)[R]) __attribute__((always_inline)) {
        const float* xc = x + column[j];
        const Vec<W> w = load<W>(values + j * W);
        HFS_UNROLL
        for (int r = 0; r < R; r++) {
            sums[r] += w * load<W>(xc + r % 3 * x_stride);
            if (r % 3 == 2) xc += 3 * x_stride;
        }
    };
    int64_t j = 0;
    for (; j + U <= n; j += U) {
        HFS_UNROLL
        for (int u = 0; u < U; u++) step(j + u, acc[u]);
    }
    HFS_UNROLL
    for (int u = 0; u < U - 1; u++) {
        if (j + u < n) step(j + u, acc[u]);
    }
    Vec<W> sums[W];
    HFS_UNROLL
    for (int r = 0; r < W; r++) {
        sums[r] = r < R ? acc[0][r < R ? r : 0] : Vec<W>{};
        HFS_UNROLL
        for (int u = 1; u < U; u++) sums[r] += r < R ? acc[u][r < R ? r : 0] : Vec<W>{};
    }
    return sum_lanes<W>(sums);
}

// Rows [first, last) for R tokens; x points at the first of them.
template <int W, int R, typename Y>
static void segments_tile(const hfs_weight& w, const float* x, int64_t x_stride, const float* bias, int activation,
                          int64_t first, int64_t last, Y* y) {
    alignas(64) float strip[STRIP_ROWS * W];
    for (int64_t row = first; row < last; row += STRIP_ROWS) {
        const int64_t rows = last - row < STRIP_ROWS ? last - row : STRIP_ROWS;
        for (int64_t i = 0; i < rows; i++) {
            const int64_t start = w.band_start[row + i], n = w.band_start[row + i + 1] - start;
            const Vec<W> sums =
                segments_row<W, R>(x, x_stride, w.column + start, n, (const float*)w.values + start * W);
            store<W>(strip + i * W, bias ? sums + bias[row + i] : sums);
        }
        activate_strip<W>(strip, rows * W, activation);
        unpack_lanes<W>(strip, rows, 1, R, y + row, w.out_features);
    }
}
template <int W, int R, typename Y>
HFS_INLINE void segments_dispatch(int64_t tokens, const hfs_weight& w, const float* x, int64_t x_stride,
                                  const float* bias, int activation, int64_t first, int64_t last, Y* y) {
    if constexpr (R > 1) {
        if (tokens < R) {
            segments_dispatch<W, R - 1>(tokens, w, x, x_stride, bias, activation, first, last, y);
            return;
        }
    }
    segments_tile<W, R>(w, x, x_stride, bias, activation, first, last, y);
}

template <int W, typename X>
static int segments_linear(const Linear<Single<X>>& call, X* y) {
    const hfs_weight& w = call.weight;
    const int64_t features = w.in_features, padded = features + 16;
    // Rows that lie a multiple of 2 KB apart push each other out of the first-level cache: read a copy that does not.
    const bool copy = sizeof(X) != sizeof(float) || (call.tokens > 2 && call.x_stride * sizeof(X) % 2048 == 0);
    const int64_t tiles = (call.tokens + W - 1) / W;
    int64_t parts = call.threads == 1 ? 1 : (4 * (int64_t)call.threads + tiles - 1) / tiles;
    if (parts > call.panels.units) parts = call.panels.units;
    int failed = 0;
    parallel_for(tiles * parts, call.threads, [&](int64_t item) {
        const int64_t tile = item / parts, part = item % parts;
        const int64_t m = call.tokens * tile / tiles, count = call.tokens * (tile + 1) / tiles - m;
        const X* rows = call.x + m * call.x_stride;
        const float* x = (const float*)rows;
        int64_t x_stride = call.x_stride;
        if (copy) {
            float* scratch = hfs_scratch(0, (size_t)(W * padded));
            if (!scratch) {
                __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
                return;
            }
            for (int64_t i = 0; i < count; i++) convert_row(rows + i * x_stride, features, scratch + i * padded);
            x = scratch;
            x_stride = padded;
        }
        segments_dispatch<W, W>(count, w, x, x_stride, call.bias, call.activation,
                                call.panels.first_of_unit(call.panels.units * part / parts),
                                call.panels.first_of_unit(call.panels.units * (part + 1) / parts),
                                y + m * w.out_features);
    });
    return failed ? HFS_NO_MEMORY : HFS_OK;
}

}  // namespace HFS_ISA

// Outputs in lanes: a vector holds W output rows of one band, and an activation is broadcast to all of them.
//
// Reads row-major x and writes row-major y, so nothing is packed: the form for few tokens.
#pragma once
#include "activation.h"
#include "vec.h"

namespace HFS_ISA {

// Apply the activation to [tokens][rows] sums and write them; apart, because inlining it everywhere bloats the code.
template <int W>
static __attribute__((noinline)) void finish_rows(const float* sums, int tokens, int rows, int activation, float* y,
                                                  int64_t y_stride) {
    for (int r = 0; r < tokens; r++) {
        for (int v = 0; v < rows; v += W) {
            store<W>(y + r * y_stride + v, activate<W>(load<W>(sums + r * rows + v), activation));
        }
    }
}

// V vectors of W output rows x R tokens. U copies of the sums hide the latency of the multiply-add for few tokens.
template <int W, int V, int R, int U>
static void rows_tile(const float* __restrict x, int64_t x_stride, const int32_t* __restrict column, int64_t n,
                      const float* __restrict values, int64_t height, const float* __restrict bias, int activation,
                      float* __restrict y, int64_t y_stride) {
    Vec<W> acc[U][R][V];
    HFS_UNROLL
    for (int v = 0; v < V; v++) {
        Vec<W> b = bias ? load<W>(bias + v * W) : Vec<W>{};
        HFS_UNROLL
        for (int r = 0; r < R; r++) {
            acc[0][r][v] = b;
            HFS_UNROLL
            for (int u = 1; u < U; u++) acc[u][r][v] = Vec<W>{};
        }
    }
    int64_t j = 0;
    for (; j + U <= n; j += U) {
        HFS_UNROLL
        for (int u = 0; u < U; u++) {
            const float* xc = x + column[j + u];
            Vec<W> w[V];
            HFS_UNROLL
            for (int v = 0; v < V; v++) w[v] = load<W>(values + v * W);
            HFS_UNROLL
            for (int r = 0; r < R; r++) {
                Vec<W> xb = splat<W>(xc[r * x_stride]);
                HFS_UNROLL
                for (int v = 0; v < V; v++) acc[u][r][v] += w[v] * xb;
            }
            values += height;
        }
    }
    for (; j < n; j++) {
        const float* xc = x + column[j];
        HFS_UNROLL
        for (int r = 0; r < R; r++) {
            Vec<W> xb = splat<W>(xc[r * x_stride]);
            HFS_UNROLL
            for (int v = 0; v < V; v++) acc[0][r][v] += load<W>(values + v * W) * xb;
        }
        values += height;
    }
    alignas(64) float sums[R][V * W];
    HFS_UNROLL
    for (int r = 0; r < R; r++) {
        HFS_UNROLL
        for (int v = 0; v < V; v++) {
            Vec<W> sum = acc[0][r][v];
            HFS_UNROLL
            for (int u = 1; u < U; u++) sum += acc[u][r][v];
            if (activation == HFS_NONE) {
                store<W>(y + r * y_stride + v * W, sum);
            } else {
                store<W>(sums[r] + v * W, sum);
            }
        }
    }
    if (activation != HFS_NONE) finish_rows<W>(sums[0], R, V * W, activation, y, y_stride);
}

// Tokens per tile, leaving registers for the weights and one broadcast. Vectors narrower than the registers serve the
// odd rows of a band; few variants of them will do.
constexpr int rows_max_tokens(int W, int V) {
    return W < 4 ? 4 : V == 1 ? 12 : LANES == 16 ? 13 : 6;
}
constexpr int rows_unroll(int R, int V) { return R * V == 1 ? 8 : R * V == 2 ? 4 : R * V <= 4 ? 2 : 1; }

// One chunk of W * V rows of a band for `tokens` tokens.
template <int W, int V, int R>
HFS_INLINE void rows_chunk(const float* x, int64_t x_stride, int tokens, const int32_t* column, int64_t n,
                           const float* values, int64_t height, const float* bias, int activation, float* y,
                           int64_t y_stride) {
    if constexpr (R >= 1) {
        if (tokens == R) {
            rows_tile<W, V, R, rows_unroll(R, V)>(x, x_stride, column, n, values, height, bias, activation, y,
                                                  y_stride);
        } else {
            rows_chunk<W, V, R - 1>(x, x_stride, tokens, column, n, values, height, bias, activation, y, y_stride);
        }
    }
}

// All rows of one panel for `tokens` tokens, widest vectors first.
template <int W, int V>
HFS_INLINE void rows_width(const float* x, int64_t x_stride, int tokens, const int32_t* column, int64_t n,
                           const float* values, int64_t height, const float* bias, int activation, int64_t& row,
                           int64_t rows, float* y, int64_t y_stride) {
    constexpr int most = rows_max_tokens(W, V);
    const int tiles = (tokens + most - 1) / most, tile = (tokens + tiles - 1) / tiles;
    for (; row + W * V <= rows; row += W * V) {
        for (int m = 0; m < tokens; m += tile) {
            rows_chunk<W, V, most>(x + m * x_stride, x_stride, tokens - m < tile ? tokens - m : tile, column, n,
                                   values + row, height, bias ? bias + row : nullptr, activation,
                                   y + m * y_stride + row, y_stride);
        }
    }
}
static void rows_panel(const float* x, int64_t x_stride, int tokens, const int32_t* column, int64_t n,
                       const float* values, int64_t height, const float* bias, int activation, int64_t rows, float* y,
                       int64_t y_stride) {
    int64_t row = 0;
#define HFS_WIDTH(W, V) \
    rows_width<W, V>(x, x_stride, tokens, column, n, values, height, bias, activation, row, rows, y, y_stride)
    HFS_WIDTH(LANES, 2);
    HFS_WIDTH(LANES, 1);
    if constexpr (LANES > 8) HFS_WIDTH(8, 1);
    if constexpr (LANES > 4) HFS_WIDTH(4, 1);
    HFS_WIDTH(2, 1);
    HFS_WIDTH(1, 1);
#undef HFS_WIDTH
}

}  // namespace HFS_ISA

// Tokens in lanes: a vector holds one feature of W tokens, and a weight is broadcast to all of them.
//
// Activations of a group of T * W tokens are stored [feature][T * W], so that one column of the weight reads one
// contiguous run. A micro-tile keeps R rows x T vectors of results in registers for a whole band.
#pragma once
#include "activation.h"
#include "vec.h"

namespace HFS_ISA {

// Copy features [first, last) of `tokens` (<= W) rows of x into one vector per feature, `group` floats apart. Missing
// tokens become zeros. `packed` and `x` point at feature 0; `first` is a multiple of W.
template <int W, typename X>
static void pack_lanes(const X* x, int64_t x_stride, int tokens, int64_t first, int64_t last, float* packed,
                       int64_t group) {
    int64_t k = first;
    for (; k + W <= last; k += W) {
        Vec<W> tile[W];
        if (tokens == W) {
            HFS_UNROLL
            for (int i = 0; i < W; i++) tile[i] = read<W>(x + i * x_stride + k);
        } else {
            for (int i = 0; i < W; i++) tile[i] = i < tokens ? read<W>(x + i * x_stride + k) : Vec<W>{};
        }
        transpose<W>(tile);
        HFS_UNROLL
        for (int i = 0; i < W; i++) store<W>(packed + (k + i) * group, tile[i]);
    }
    for (; k < last; k++) {
        for (int i = 0; i < W; i++) packed[k * group + i] = i < tokens ? (float)read<1>(x + i * x_stride + k) : 0.0f;
    }
}

// Copy a strip [rows][T * W] of results back to row-major y.
template <int W, typename Y>
static void unpack_lanes(const float* strip, int64_t rows, int vectors, int tokens, Y* y, int64_t y_stride) {
    const int64_t group = (int64_t)vectors * W;
    for (int t = 0; t < vectors && t * W < tokens; t++) {
        const int valid = tokens - t * W < W ? tokens - t * W : W;
        Y* out = y + (int64_t)t * W * y_stride;
        int64_t o = 0;
        for (; o + W <= rows; o += W) {
            Vec<W> tile[W];
            HFS_UNROLL
            for (int i = 0; i < W; i++) tile[i] = load<W>(strip + (o + i) * group + t * W);
            transpose<W>(tile);
            if (valid == W) {
                HFS_UNROLL
                for (int i = 0; i < W; i++) write<W>(out + i * y_stride + o, tile[i]);
            } else {
                for (int i = 0; i < valid; i++) write<W>(out + i * y_stride + o, tile[i]);
            }
        }
        for (; o < rows; o++) {
            for (int i = 0; i < valid; i++) write<1>(out + i * y_stride + o, strip[o * group + t * W + i]);
        }
    }
}

// R rows x T vectors over n columns of one band. `stride` is the band's height: the step from column to column.
template <int R, int T, int W>
static void lanes_tile(const float* __restrict x, const int32_t* __restrict column, int64_t n,
                       const float* __restrict values, int64_t stride, const float* __restrict bias,
                       float* __restrict out) {
    Vec<W> acc[R][T];
    HFS_UNROLL
    for (int r = 0; r < R; r++) {
        Vec<W> b = bias ? splat<W>(bias[r]) : Vec<W>{};
        HFS_UNROLL
        for (int t = 0; t < T; t++) acc[r][t] = b;
    }
    for (int64_t j = 0; j < n; j++) {
        const float* xc = x + (int64_t)column[j] * (T * W);
        Vec<W> xv[T];
        HFS_UNROLL
        for (int t = 0; t < T; t++) xv[t] = load<W>(xc + t * W);
        HFS_UNROLL
        for (int r = 0; r < R; r++) {
            Vec<W> w = splat<W>(values[r]);
            HFS_UNROLL
            for (int t = 0; t < T; t++) acc[r][t] += w * xv[t];
        }
        values += stride;
    }
    HFS_UNROLL
    for (int r = 0; r < R; r++) {
        HFS_UNROLL
        for (int t = 0; t < T; t++) store<W>(out + (r * T + t) * W, acc[r][t]);
    }
}

// Rows per micro-tile that fill the register file with T vectors: 32 registers of 16 floats, else 16 registers.
template <int T, int W>
constexpr int tile_rows() {
    constexpr int registers = LANES == 16 ? 24 : 12;
    constexpr int rows = registers / T;
    return rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
}

// All rows of one panel (at most one band), largest micro-tiles first.
template <int R, int T, int W>
HFS_INLINE void lanes_rows(const float* x, const int32_t* column, int64_t n, const float* values, int64_t height,
                           const float* bias, int64_t& row, int64_t rows, float* out) {
    if constexpr (R <= tile_rows<T, W>()) {
        for (; row + R <= rows; row += R) {
            lanes_tile<R, T, W>(x, column, n, values + row, height, bias ? bias + row : nullptr, out + row * T * W);
        }
    }
}
template <int T, int W>
static void lanes_panel(const float* x, const int32_t* column, int64_t n, const float* values, int64_t height,
                        const float* bias, int64_t rows, float* out) {
    int64_t row = 0;
    lanes_rows<8, T, W>(x, column, n, values, height, bias, row, rows, out);
    lanes_rows<4, T, W>(x, column, n, values, height, bias, row, rows, out);
    lanes_rows<2, T, W>(x, column, n, values, height, bias, row, rows, out);
    lanes_rows<1, T, W>(x, column, n, values, height, bias, row, rows, out);
}

template <int W>
static void activate_strip(float* strip, int64_t size, int activation) {
    if (activation == HFS_NONE) return;
    for (int64_t i = 0; i < size; i += W) store<W>(strip + i, activate<W>(load<W>(strip + i), activation));
}

}  // namespace HFS_ISA

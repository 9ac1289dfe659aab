// Tokens in lanes: a vector holds one feature of W tokens, and a weight is broadcast to all of them.
//
// Activations of a group of T * W tokens are stored [feature][T * W], so that one column of the weight reads one
// contiguous run. A micro-tile keeps R rows x T vectors of results in registers for a whole band.
#pragma once
#include "activation.h"
#include "kinds.h"

namespace HFS_ISA {

// Copy [rows][stride] results of one vector of tokens back to row-major y.
template <int W, typename Y>
static void unpack_tile(const float* lanes, int64_t stride, int64_t rows, int64_t tokens, Y* y, int64_t y_stride) {
    int64_t o = 0;
    for (; o + W <= rows; o += W) {
        Vec<W> tile[W];
        HFS_UNROLL
        for (int i = 0; i < W; i++) tile[i] = load<W>(lanes + (o + i) * stride);
        transpose<W>(tile);
        if (tokens >= W) {
            HFS_UNROLL
            for (int i = 0; i < W; i++) write<W>(y + i * y_stride + o, tile[i]);
        } else {
            for (int i = 0; i < tokens; i++) write<W>(y + i * y_stride + o, tile[i]);
        }
    }
    for (; o < rows; o++) {
        for (int i = 0; i < W && i < tokens; i++) write<1>(y + i * y_stride + o, lanes[o * stride + i]);
    }
}

// Copy a strip [rows][T * W] of results back to row-major y.
template <int W, typename Y>
static void unpack_lanes(const float* strip, int64_t rows, int vectors, int tokens, Y* y, int64_t y_stride) {
    for (int t = 0; t < vectors && t * W < tokens; t++) {
        unpack_tile<W>(strip + t * W, (int64_t)vectors * W, rows, tokens - t * W, y + (int64_t)t * W * y_stride, y_stride);
    }
}

// R rows x T vectors over n columns of one band. `stride` is the band's height: the step from column to column.
template <typename Kind, int R, int T, int W>
static void lanes_tile(const typename Kind::Word* __restrict x, const int32_t* __restrict column, int64_t n,
                       const typename Kind::Word* __restrict values, int64_t stride, const float* __restrict bias,
                       float* __restrict out) {
    typedef typename VecOf<typename Kind::Word, W>::type KindVec;
    Vec<W> acc[R][T];
    HFS_UNROLL
    for (int r = 0; r < R; r++) {
        Vec<W> b = bias ? splat<W>(bias[r]) : Vec<W>{};
        HFS_UNROLL
        for (int t = 0; t < T; t++) acc[r][t] = b;
    }
    for (int64_t j = 0; j < n; j++) {
        KindVec xv[T];
        HFS_UNROLL
        for (int t = 0; t < T; t++) xv[t] = Kind::template lanes<W, T * W>(x + t * W, column);
        HFS_UNROLL
        for (int r = 0; r < R; r++) {
            KindVec w = splat<W>(values[r]);
            HFS_UNROLL
            for (int t = 0; t < T; t++) acc[r][t] = Kind::template add<W>(acc[r][t], w, xv[t]);
        }
        values += stride;
        column += Kind::COLUMNS;
    }
    HFS_UNROLL
    for (int r = 0; r < R; r++) {
        HFS_UNROLL
        for (int t = 0; t < T; t++) store<W>(out + (r * T + t) * W, acc[r][t]);
    }
}

// Rows per micro-tile that fill the register file with T vectors.
template <int T, int W>
constexpr int tile_rows() {
    constexpr int registers = MANY_REGISTERS ? 24 : 12;
    constexpr int rows = registers / T;
    return rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
}

// All rows of one panel (at most one band), largest micro-tiles first.
template <typename Kind, int R, int T, int W>
HFS_INLINE void lanes_rows(const typename Kind::Word* x, const Band& band, const typename Kind::Word* values,
                           const float* bias, int64_t& row, int64_t rows, float* out) {
    if constexpr (R <= tile_rows<T, W>()) {
        for (; row + R <= rows; row += R) {
            lanes_tile<Kind, R, T, W>(x, band.column, band.n, values + row, band.height, bias ? bias + row : nullptr,
                                      out + row * T * W);
        }
    }
}
template <typename Kind, int T, int W>
static void lanes_panel(const typename Kind::Word* x, const Band& band, const typename Kind::Word* values,
                        const float* bias, int64_t rows, float* out) {
    int64_t row = 0;
    lanes_rows<Kind, 8, T, W>(x, band, values, bias, row, rows, out);
    lanes_rows<Kind, 4, T, W>(x, band, values, bias, row, rows, out);
    lanes_rows<Kind, 2, T, W>(x, band, values, bias, row, rows, out);
    lanes_rows<Kind, 1, T, W>(x, band, values, bias, row, rows, out);
}

template <int W>
static void activate_strip(float* strip, int64_t size, int activation) {
    if (activation == HFS_NONE) return;
    for (int64_t i = 0; i < size; i += W) store<W>(strip + i, activate<W>(load<W>(strip + i), activation));
}

}  // namespace HFS_ISA

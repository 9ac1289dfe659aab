// Outputs in lanes: a vector holds W output rows of one band, and an activation is broadcast to all of them.
//
// Reads row-major x and writes row-major y, so nothing is packed: the form for few tokens.
#pragma once
#include "activation.h"
#include "kinds.h"

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

struct RowsOut {
    float* y;
    int64_t y_stride;
    int activation;
};

// One column (or pair) of a band for R tokens. Rows of x are addressed in threes, base + {0, 1, 2} * stride: an
// address that the load computes itself.
template <typename Kind, int W, int V, int R>
HFS_INLINE void rows_column(const typename Kind::X* x, int64_t x_stride, const int32_t* column,
                            const typename Kind::Word* values, Vec<W> (&acc)[R][V]) {
    typename VecOf<typename Kind::Word, W>::type w[V];
    HFS_UNROLL
    for (int v = 0; v < V; v++) w[v] = load<W>(values + v * W);
    HFS_UNROLL
    for (int r = 0; r < R; r++) {
        const auto xb = splat<W>(Kind::one(x + r % 3 * x_stride, column));
        if (r % 3 == 2) x += 3 * x_stride;
        HFS_UNROLL
        for (int v = 0; v < V; v++) acc[r][v] = Kind::template add<W>(acc[r][v], w[v], xb);
    }
}

// V vectors of W output rows x R tokens. U copies of the sums hide the latency of the multiply-add for few tokens.
template <typename Kind, int W, int V, int R>
static void rows_tile(const typename Kind::X* __restrict x, int64_t x_stride, const Band& band,
                      const typename Kind::Word* __restrict values, const float* __restrict bias,
                      const RowsOut& out) {
    constexpr int U = R * V <= 2 ? 4 : R * V <= 4 ? 2 : 1;
    const int32_t* __restrict column = band.column;
    const int64_t n = band.n, height = band.height;
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
            rows_column<Kind, W, V, R>(x, x_stride, column + (j + u) * Kind::COLUMNS, values, acc[u]);
            values += height;
        }
    }
    HFS_UNROLL
    for (int u = 0; u < U - 1; u++) {
        if (j + u < n) {
            rows_column<Kind, W, V, R>(x, x_stride, column + (j + u) * Kind::COLUMNS, values + u * height, acc[u]);
        }
    }
    alignas(64) float sums[R][V * W];
    HFS_UNROLL
    for (int r = 0; r < R; r++) {
        HFS_UNROLL
        for (int v = 0; v < V; v++) {
            Vec<W> sum = acc[0][r][v];
            HFS_UNROLL
            for (int u = 1; u < U; u++) sum += acc[u][r][v];
            store<W>(out.activation == HFS_NONE ? out.y + r * out.y_stride + v * W : sums[r] + v * W, sum);
        }
    }
    if (out.activation != HFS_NONE) finish_rows<W>(sums[0], R, V * W, out.activation, out.y, out.y_stride);
}

// Tokens per tile, leaving registers for the weights and one broadcast. Vectors narrower than the registers serve the
// odd rows of a band; few variants of them will do.
constexpr int rows_max_tokens(int W, int V) { return W < 4 ? 4 : W < 8 && W < LANES ? 6 : V == 1 ? 12 : MANY_REGISTERS ? 13 : 6; }

template <typename Kind>
using RowsTile = void (*)(const typename Kind::X*, int64_t, const Band&, const typename Kind::Word*, const float*,
                          const RowsOut&);

template <typename Kind, int W, int V, int R>
static RowsTile<Kind> rows_tile_for(int64_t tokens) {
    if constexpr (R > 1) {
        if (tokens < R) return rows_tile_for<Kind, W, V, R - 1>(tokens);
    }
    return rows_tile<Kind, W, V, R>;
}

// How the rows of one panel are cut into tiles, for one number of tokens: worked out once per call.
template <typename Kind>
struct RowsPlan {
    struct Step {
        RowsTile<Kind> tile;
        int row, token;
    };
    static constexpr int MOST = 256;  // PANEL_ROWS single rows x tokens in fours, and to spare
    Step steps[MOST];
    int count = 0;

    template <int W, int V>
    void add(int64_t& row, int64_t rows, int64_t tokens) {
        constexpr int most = rows_max_tokens(W, V);
        const int64_t tiles = (tokens + most - 1) / most;
        for (; row + W * V <= rows; row += W * V) {
            for (int64_t i = 0; i < tiles; i++) {
                const int64_t token = tokens * i / tiles, size = tokens * (i + 1) / tiles - token;
                steps[count++] = {rows_tile_for<Kind, W, V, most>(size), (int)row, (int)token};
            }
        }
    }
    // The widest vectors first.
    RowsPlan(int64_t rows, int64_t tokens) {
        int64_t row = 0;
        add<LANES, 2>(row, rows, tokens);
        add<LANES, 1>(row, rows, tokens);
        if constexpr (LANES > 8) add<8, 1>(row, rows, tokens);
        if constexpr (LANES > 4) add<4, 1>(row, rows, tokens);
        add<2, 1>(row, rows, tokens);
        add<1, 1>(row, rows, tokens);
    }
    void run(const typename Kind::X* x, int64_t x_stride, const Band& band, const typename Kind::Word* values,
             const float* bias, const RowsOut& out) const {
        for (int i = 0; i < count; i++) {
            const Step& s = steps[i];
            s.tile(x + s.token * x_stride, x_stride, band, values + s.row, bias ? bias + s.row : nullptr,
                   {out.y + s.token * out.y_stride + s.row, out.y_stride, out.activation});
        }
    }
};

}  // namespace HFS_ISA

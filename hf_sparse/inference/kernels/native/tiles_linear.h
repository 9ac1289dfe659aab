// y = activation(x @ weight.T + bias) by matrix tiles: groups of tokens, and the way back to row-major.
#pragma once
#include "linear.h"
#include "tiles.h"

namespace HFS_ISA {

constexpr int64_t TILE_STRIP = 32;  // rows of results that leave lane order together: a cache line of y

// Results [rows][G] of one vector of tokens, at most 32 rows: add the bias, apply the activation, copy to row-major y.
template <bool BIAS>
static void finish_tile(float* results, int64_t group, int64_t rows, const float* bias, int activation, int tokens, bf16* y,
                        int64_t y_stride) {
    const auto sum = [&](int64_t o) __attribute__((always_inline)) {
        const Vec<16> row = load<16>(results + o * group);
        return BIAS ? row + bias[o] : row;
    };
    if (activation != HFS_NONE || rows < TILE_STRIP) {
        for (int64_t o = 0; o < rows; o++) store<16>(results + o * group, activate<16>(sum(o), activation));
        if (BIAS) return finish_tile<false>(results, group, rows, nullptr, HFS_NONE, tokens, y, y_stride);
    }
    if (rows < TILE_STRIP) return unpack_tile<16>(results, group, rows, tokens, y, y_stride);
    // Two rows to a word, all of them to a cache line.
    Vec<16> tile[16];
    HFS_UNROLL
    for (int i = 0; i < 16; i++) tile[i] = floats<16>(pair_words<16>(sum(2 * i), sum(2 * i + 1)));
    transpose<16>(tile);
    if (tokens >= 16) {
        HFS_UNROLL
        for (int i = 0; i < 16; i++) __builtin_memcpy(y + i * y_stride, &tile[i], 64);
    } else {
        for (int i = 0; i < tokens; i++) __builtin_memcpy(y + i * y_stride, &tile[i], 64);
    }
}

// Units [first, last) for one packed group of tokens that begins at token `head`.
template <typename Kind, int T>
static void tiles_group(const Linear<Kind>& call, bf16* y, int64_t first, int64_t last,
                        const typename Kind::Word* packed, int64_t head) {
    constexpr int64_t G = T * 16;
    const Panels& panels = call.panels;
    const int64_t end = panels.first_of_unit(last), y_stride = call.weight.out_features;
    Tiles<T> tiles;
    alignas(64) float strip[(TILE_STRIP + PANEL_ROWS) * G];
    for (int64_t unit = first; unit < last; unit++) {
        const int64_t begin = panels.first_of_unit(unit), row = panels.row(begin);
        int64_t filled = 0;
        for (int64_t i = begin; i < panels.first_of_unit(unit + 1); i++) {
            const Chunks next = i + 1 < end ? chunks_of<Kind>(panels, i + 1) : Chunks{};
            tiles_panel<Kind>(tiles, packed, chunks_of<Kind>(panels, i), next.n ? next.column : nullptr, nullptr, panels.rows(i),
                              strip + filled * G);
            filled += panels.rows(i);
        }
        for (int64_t o = 0; o < filled; o += TILE_STRIP) {
            const int64_t rows = filled - o < TILE_STRIP ? filled - o : TILE_STRIP;
            const float* bias = call.bias ? call.bias + row + o : nullptr;
            for (int64_t t = 0; t < T && head + t * 16 < call.tokens; t++) {
                const int64_t token = head + t * 16;
                (bias ? finish_tile<true> : finish_tile<false>)(strip + o * G + t * 16, G, rows, bias, call.activation,
                                                                (int)(call.tokens - token),
                                                                y + token * y_stride + row + o, y_stride);
            }
        }
    }
}
template <typename Kind, int T>
HFS_INLINE void tiles_dispatch(int64_t vectors, const Linear<Kind>& call, bf16* y, int64_t first, int64_t last,
                               const typename Kind::Word* packed, int64_t head) {
    if constexpr (T >= 1) {
        if (vectors == T) {
            tiles_group<Kind, T>(call, y, first, last, packed, head);
        } else {
            tiles_dispatch<Kind, T - 1>(vectors, call, y, first, last, packed, head);
        }
    }
}

// Tiles take 16 tokens however few there are, and are still measured to beat the rows form from 4 tokens on, for bands of
// any height; the lanes form they always beat.
static bool prefer_tiles(const hfs_weight& w, int64_t tokens) {
    if (!w.chunk_start || w.form == HFS_ROWS) return false;
    return w.form == HFS_LANES_FORM || tokens >= 4;
}

template <typename Kind>
static int tiles_linear(const hfs_weight& weight, const hfs_call& call) {
    if (call.tokens == 0 || weight.out_features == 0) return HFS_OK;
    const float* bias;
    if (!wide_bias<bf16>(weight, call, bias)) return HFS_NO_MEMORY;
    const Linear<Kind> job = {weight, Panels(weight, TILE_STRIP), bias, (const bf16*)call.x, call.x_stride, call.tokens,
                              call.activation, worth_threads(weight, call)};
    const auto run = [&](int64_t vectors, int64_t first, int64_t last, const typename Kind::Word* packed, int64_t head) {
        tiles_dispatch<Kind, MAX_TILE_VECTORS>(vectors, job, (bf16*)call.y, first, last, packed, head);
    };
    return run_groups<16>(job, MAX_TILE_VECTORS, run);
}

}  // namespace HFS_ISA

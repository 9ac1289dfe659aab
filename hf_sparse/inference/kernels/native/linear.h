// y = activation(x @ weight.T + bias) for one instruction set: the two forms, cut into pieces of work.
#pragma once
#include "lanes.h"
#include "parallel.h"
#include "rows.h"

namespace HFS_ISA {

constexpr int64_t PANEL_ROWS = 32;  // rows of a band computed together; higher bands are cut
constexpr int64_t STRIP_ROWS = 16;  // rows of results that leave lane order together
constexpr int MAX_VECTORS = 8;      // vectors of tokens per group

// The rows of a weight as panels (at most PANEL_ROWS rows of one band) and units (panels that fill a strip).
struct Panels {
    const hfs_weight& weight;
    int64_t per_band, count, per_unit, units;

    explicit Panels(const hfs_weight& w) : weight(w) {
        per_band = (w.height + PANEL_ROWS - 1) / PANEL_ROWS;
        count = w.out_features / w.height * per_band;
        per_unit = w.height < STRIP_ROWS ? (STRIP_ROWS + w.height - 1) / w.height : 1;
        units = (count + per_unit - 1) / per_unit;
    }
    int64_t first_of_unit(int64_t unit) const { return unit * per_unit < count ? unit * per_unit : count; }
    int64_t row(int64_t panel) const { return panel / per_band * weight.height + panel % per_band * PANEL_ROWS; }
    int64_t rows(int64_t panel) const {
        const int64_t left = weight.height - panel % per_band * PANEL_ROWS;
        return left < PANEL_ROWS ? left : PANEL_ROWS;
    }
};

// Vectors of tokens per group: as many as still leave a full register file for the rows of a band.
static int max_vectors(int64_t height) {
    if (LANES == 16) return height >= 8 ? 3 : height >= 4 ? 6 : MAX_VECTORS;
    return height >= 4 ? 3 : height >= 2 ? 6 : MAX_VECTORS;
}

// Units [first, last) for one packed group of tokens.
template <int T, int W, typename Y>
static void lanes_group(const Panels& panels, int64_t first, int64_t last, const float* packed, int tokens, Y* y,
                        int64_t y_stride) {
    const hfs_weight& w = panels.weight;
    alignas(64) float strip[(STRIP_ROWS + PANEL_ROWS) * T * W];
    for (int64_t unit = first; unit < last; unit++) {
        const int64_t begin = panels.first_of_unit(unit), end = panels.first_of_unit(unit + 1);
        const int64_t top = panels.row(begin);
        int64_t filled = 0;
        for (int64_t panel = begin; panel < end; panel++) {
            const int64_t band = panel / panels.per_band, row = panels.row(panel), rows = panels.rows(panel);
            const int64_t start = w.band_start[band], n = w.band_start[band + 1] - start;
            lanes_panel<T, W>(packed, w.column + start, n,
                              w.values + start * w.height + (row - band * w.height), w.height,
                              w.bias ? w.bias + row : nullptr, rows, strip + filled * T * W);
            filled += rows;
        }
        activate_strip<W>(strip, filled * T * W, w.activation);
        unpack_lanes<W>(strip, filled, T, tokens, y + top, y_stride);
    }
}
template <int T, int W, typename Y>
HFS_INLINE void lanes_dispatch(int vectors, const Panels& panels, int64_t first, int64_t last, const float* packed,
                               int tokens, Y* y, int64_t y_stride) {
    if constexpr (T >= 1) {
        if (vectors == T) {
            lanes_group<T, W>(panels, first, last, packed, tokens, y, y_stride);
        } else {
            lanes_dispatch<T - 1, W>(vectors, panels, first, last, packed, tokens, y, y_stride);
        }
    }
}

template <int W, typename X>
static int lanes_linear(const hfs_weight& w, const X* x, int64_t x_stride, X* y, int64_t y_stride, int64_t tokens,
                        int threads) {
    constexpr int most = W == LANES ? MAX_VECTORS : 1;
    const Panels panels(w);
    const int64_t tiles = (tokens + W - 1) / W;
    const int64_t per_group = W == LANES ? max_vectors(w.height) : 1;
    const int64_t groups = (tiles + per_group - 1) / per_group;
    // Groups differ by one tile at most, so none is left with a lone vector. first_tile(groups) is tiles.
    const auto first_tile = [&](int64_t group) { return tiles * group / groups; };
    const auto tokens_from = [&](int64_t tile) { return (int)(tokens - tile * W); };
    const auto pack_tile = [&](int64_t group, int64_t tile, int64_t first, int64_t last, float* packed) {
        const int64_t head = first_tile(group), vectors = first_tile(group + 1) - head;
        const int left = tokens_from(tile);
        pack_lanes<W>(x + tile * W * x_stride, x_stride, left < W ? left : W, first, last, packed + (tile - head) * W,
                      vectors * W);
    };
    const auto run = [&](int64_t group, int64_t first, int64_t last, const float* packed) {
        const int64_t head = first_tile(group), vectors = first_tile(group + 1) - head;
        const int left = tokens_from(head);
        lanes_dispatch<most, W>((int)vectors, panels, first, last, packed, left, y + head * W * y_stride, y_stride);
    };

    if (threads == 1 || groups >= 4 * (int64_t)threads) {
        int failed = 0;
        parallel_for(groups, threads, [&](int64_t group) {
            float* packed = hfs_scratch(0, (size_t)(per_group * W * w.in_features));
            if (!packed) {
                __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
                return;
            }
            for (int64_t tile = first_tile(group); tile < first_tile(group + 1); tile++) {
                pack_tile(group, tile, 0, w.in_features, packed);
            }
            run(group, 0, panels.units, packed);
        });
        return failed ? HFS_NO_MEMORY : HFS_OK;
    }
    // Too few groups to go round: pack all tokens together, then share out groups x ranges of rows.
    float* packed = hfs_scratch(1, (size_t)(tiles * W * w.in_features));
    if (!packed) return HFS_NO_MEMORY;
    const int64_t slice = 128, slices = (w.in_features + slice - 1) / slice;
    parallel_for(tiles * slices, threads, [&](int64_t item) {
        const int64_t tile = item / slices, first = item % slices * slice;
        int64_t group = tile * groups / tiles;
        while (first_tile(group + 1) <= tile) group++;
        const int64_t last = first + slice < w.in_features ? first + slice : w.in_features;
        pack_tile(group, tile, first, last, packed + first_tile(group) * W * w.in_features);
    });
    int64_t parts = (4 * (int64_t)threads + groups - 1) / groups;
    if (parts > panels.units) parts = panels.units;
    parallel_for(groups * parts, threads, [&](int64_t item) {
        const int64_t group = item / parts, part = item % parts;
        run(group, panels.units * part / parts, panels.units * (part + 1) / parts,
            packed + first_tile(group) * W * w.in_features);
    });
    return HFS_OK;
}

template <typename X>
static int rows_linear(const hfs_weight& w, const X* x, int64_t x_stride, X* y, int64_t y_stride, int64_t tokens,
                       int threads) {
    const float* source;
    if constexpr (sizeof(X) == sizeof(float)) {
        source = x;
    } else {
        float* wide = hfs_scratch(0, (size_t)(tokens * w.in_features));
        if (!wide) return HFS_NO_MEMORY;
        parallel_for(tokens, threads, [&](int64_t m) {
            const X* from = x + m * x_stride;
            float* to = wide + m * w.in_features;
            int64_t k = 0;
            for (; k + LANES <= w.in_features; k += LANES) store<LANES>(to + k, read<LANES>(from + k));
            for (; k < w.in_features; k++) to[k] = read<1>(from + k);
        });
        source = wide;
        x_stride = w.in_features;
    }
    const Panels panels(w);
    const int64_t most = rows_max_tokens(w.height >= 2 * LANES ? 2 : 1);
    const int64_t tiles = (tokens + most - 1) / most;
    int64_t parts = threads == 1 ? 1 : (4 * (int64_t)threads + tiles - 1) / tiles;
    if (parts > panels.units) parts = panels.units;
    parallel_for(tiles * parts, threads, [&](int64_t item) {
        const int64_t tile = item / parts, part = item % parts;
        const int64_t m = tokens * tile / tiles, count = tokens * (tile + 1) / tiles - m;
        const int64_t end = panels.first_of_unit(panels.units * (part + 1) / parts);
        for (int64_t panel = panels.first_of_unit(panels.units * part / parts); panel < end; panel++) {
            const int64_t band = panel / panels.per_band, row = panels.row(panel);
            const int64_t start = w.band_start[band], n = w.band_start[band + 1] - start;
            rows_panel(source + m * x_stride, x_stride, (int)count, w.column + start, n,
                       w.values + start * w.height + (row - band * w.height), w.height,
                       w.bias ? w.bias + row : nullptr, w.activation, panels.rows(panel), y + m * y_stride + row,
                       y_stride);
        }
    });
    return HFS_OK;
}

// Rows for few tokens, lanes for many.
static bool prefer_lanes(const hfs_weight& w, int64_t tokens) {
    if (w.height >= 4) return tokens > 12;
    return tokens >= 4;
}

// Below this many multiply-adds a second thread costs more than it brings.
constexpr double PARALLEL_WORK = 4e5;

template <typename X>
static int linear(const hfs_weight& w, const X* x, int64_t x_stride, X* y, int64_t y_stride, int64_t tokens, int form,
                  int threads) {
    if (tokens == 0 || w.out_features == 0) return HFS_OK;
    if ((double)w.kept_columns * (double)w.height * (double)tokens < PARALLEL_WORK) threads = 1;
    const bool lanes = form == HFS_AUTO ? prefer_lanes(w, tokens) : form == HFS_LANES_FORM;
    if (!lanes) return rows_linear(w, x, x_stride, y, y_stride, tokens, threads);
    if (LANES > 4 && tokens <= 4) return lanes_linear<4>(w, x, x_stride, y, y_stride, tokens, threads);
    if (LANES > 8 && tokens <= 8) return lanes_linear<8>(w, x, x_stride, y, y_stride, tokens, threads);
    return lanes_linear<LANES>(w, x, x_stride, y, y_stride, tokens, threads);
}

}  // namespace HFS_ISA

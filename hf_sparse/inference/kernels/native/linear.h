// y = activation(x @ weight.T + bias) for one instruction set: the two forms, cut into pieces of work.
#pragma once
#include "lanes.h"
#include "panels.h"
#include "parallel.h"
#include "rows.h"
#include "segments.h"

namespace HFS_ISA {

constexpr int MAX_VECTORS = 8;  // vectors of tokens per group

// Vectors of tokens per group: as many as still leave a full register file for the rows of a band.
static int max_vectors(int64_t height) {
    if (LANES == 16) return height >= 8 ? 3 : height >= 4 ? 6 : MAX_VECTORS;
    return height >= 4 ? 3 : height >= 2 ? 6 : MAX_VECTORS;
}

// Units [first, last) for one packed group of tokens that begins at token `head`.
template <typename Kind, int T, int W>
static void lanes_group(const Linear<Kind>& call, typename Kind::X* y, int64_t first, int64_t last,
                        const typename Kind::Word* packed, int64_t head) {
    const Panels& panels = call.panels;
    const int64_t y_stride = call.weight.out_features;
    alignas(64) float strip[(STRIP_ROWS + PANEL_ROWS) * T * W];
    for (int64_t unit = first; unit < last; unit++) {
        const int64_t begin = panels.first_of_unit(unit), end = panels.first_of_unit(unit + 1);
        int64_t filled = 0;
        for (int64_t i = begin; i < end; i++) {
            lanes_panel<typename Kind::Core, T, W>(packed, call.band(i), call.values(i), call.bias_of(i),
                                                   panels.rows(i), strip + filled * T * W);
            filled += panels.rows(i);
        }
        activate_strip<W>(strip, filled * T * W, call.activation);
        unpack_lanes<W>(strip, filled, T, (int)(call.tokens - head), y + head * y_stride + panels.row(begin),
                        y_stride);
    }
}
template <typename Kind, int T, int W>
HFS_INLINE void lanes_dispatch(int64_t vectors, const Linear<Kind>& call, typename Kind::X* y, int64_t first,
                               int64_t last, const typename Kind::Word* packed, int64_t head) {
    if constexpr (T >= 1) {
        if (vectors == T) {
            lanes_group<Kind, T, W>(call, y, first, last, packed, head);
        } else {
            lanes_dispatch<Kind, T - 1, W>(vectors, call, y, first, last, packed, head);
        }
    }
}

// Pack the tokens in groups of at most `per_group` vectors, and share out groups, or groups x units, as
// run(vectors, first unit, last unit, packed, first token).
template <int W, typename Kind, typename Run>
static int run_groups(const Linear<Kind>& call, int64_t per_group, const Run& run_group) {
    typedef typename Kind::Word Word;
    const int64_t features = call.weight.in_features, packed_features = Kind::packed_features(features);
    const int64_t units = call.panels.units, threads = call.threads;
    const int64_t tiles = (call.tokens + W - 1) / W;
    const int64_t groups = (tiles + per_group - 1) / per_group;
    // Groups differ by one tile at most, so none is left with a lone vector.
    const auto first_tile = [=](int64_t group) { return tiles * group / groups; };
    const auto pack = [&](int64_t group, int64_t tile, int64_t first, int64_t last, Word* packed) {
        const int64_t head = first_tile(group), left = call.tokens - tile * W;
        Kind::template pack<W>(call.x + tile * W * call.x_stride, call.x_stride, (int)(left < W ? left : W), first,
                               last, packed + (tile - head) * W, (first_tile(group + 1) - head) * W);
    };
    const auto run = [&](int64_t group, int64_t first, int64_t last, const Word* packed) {
        const int64_t head = first_tile(group);
        run_group(first_tile(group + 1) - head, first, last, packed, head * W);
    };

    if (threads == 1 || groups >= 4 * threads) {
        int failed = 0;
        parallel_for(groups, (int)threads, [&](int64_t group) {
            Word* packed = (Word*)hfs_scratch(0, (size_t)(per_group * W * packed_features));
            if (!packed) {
                __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
                return;
            }
            for (int64_t tile = first_tile(group); tile < first_tile(group + 1); tile++) {
                pack(group, tile, 0, features, packed);
            }
            run(group, 0, units, packed);
        });
        return failed ? HFS_NO_MEMORY : HFS_OK;
    }
    // Too few groups to go round: pack all tokens together, then share out groups x ranges of rows.
    Word* packed = (Word*)hfs_scratch(1, (size_t)(tiles * W * packed_features));
    if (!packed) return HFS_NO_MEMORY;
    const int64_t slice = 128, slices = (features + slice - 1) / slice;
    parallel_for(tiles * slices, (int)threads, [&](int64_t item) {
        const int64_t tile = item / slices, first = item % slices * slice;
        int64_t group = tile * groups / tiles;
        while (first_tile(group + 1) <= tile) group++;
        pack(group, tile, first, first + slice < features ? first + slice : features,
             packed + first_tile(group) * W * packed_features);
    });
    int64_t parts = (4 * threads + groups - 1) / groups;
    if (parts > units) parts = units;
    parallel_for(groups * parts, (int)threads, [&](int64_t item) {
        const int64_t group = item / parts, part = item % parts;
        run(group, units * part / parts, units * (part + 1) / parts, packed + first_tile(group) * W * packed_features);
    });
    return HFS_OK;
}

template <int W, typename Kind>
static int lanes_linear(const Linear<Kind>& call, typename Kind::X* y) {
    constexpr int most = W == LANES ? MAX_VECTORS : 1;
    const auto run = [&](int64_t vectors, int64_t first, int64_t last, const typename Kind::Word* packed, int64_t head) {
        lanes_dispatch<Kind, most, W>(vectors, call, y, first, last, packed, head);
    };
    return run_groups<W>(call, W == LANES ? max_vectors(call.weight.height) : 1, run);
}

// Rows are summed and written in float32 whatever the type of x.
template <typename Kind>
static void rows_linear(const Linear<Kind>& call, float* y) {
    const Panels& panels = call.panels;
    const int64_t most = rows_max_tokens(LANES, call.weight.height >= 2 * LANES ? 2 : 1);
    const int64_t y_stride = call.weight.out_features;
    const int64_t tiles = (call.tokens + most - 1) / most;
    int64_t parts = call.threads == 1 ? 1 : (4 * (int64_t)call.threads + tiles - 1) / tiles;
    if (parts > panels.units) parts = panels.units;
    parallel_for(tiles * parts, call.threads, [&](int64_t item) {
        const int64_t tile = item / parts, part = item % parts;
        const int64_t m = call.tokens * tile / tiles, count = call.tokens * (tile + 1) / tiles - m;
        const int64_t first = panels.first_of_unit(panels.units * part / parts);
        const int64_t end = panels.first_of_unit(panels.units * (part + 1) / parts);
        // Panels of a band differ in rows only if the height is no multiple of PANEL_ROWS: the last is shorter.
        const RowsPlan<Kind> whole(panels.rows(0), count), last(panels.rows(panels.per_band - 1), count);
        for (int64_t i = first; i < end; i++) {
            const RowsPlan<Kind>& plan = (i + 1) % panels.per_band ? whole : last;
            plan.run(call.x + m * call.x_stride, call.x_stride, call.band(i), call.values(i), call.bias_of(i),
                     {y + m * y_stride + panels.row(i), y_stride, call.activation});
        }
    });
}

// Few tokens of bfloat16: the results, and for float32 weights the activations too, pass through float32 copies.
template <typename Kind>
static int rows_linear_bf16(const Linear<Kind>& call, bf16* y) {
    constexpr bool widen = sizeof(typename Kind::X) != sizeof(typename Kind::Core::X);
    const int64_t features = widen ? call.weight.in_features : 0, outputs = call.weight.out_features;
    float* sums = hfs_scratch(0, (size_t)(call.tokens * (features + outputs)));
    if (!sums) return HFS_NO_MEMORY;
    if constexpr (widen) {
        float* x = sums + call.tokens * outputs;
        for (int64_t m = 0; m < call.tokens; m++) convert_row(call.x + m * call.x_stride, features, x + m * features);
        rows_linear<typename Kind::Core>({call.weight, call.panels, call.bias, x, features, call.tokens,
                                          call.activation, call.threads}, sums);
    } else {
        rows_linear(call, sums);
    }
    for (int64_t m = 0; m < call.tokens; m++) convert_row(sums + m * outputs, outputs, y + m * outputs);
    return HFS_OK;
}

// Rows for few tokens, lanes for many: where they cross depends on how much of a vector a band fills, and on whether
// the rows of x lie so that they push each other out of the first-level cache.
static bool prefer_lanes(const hfs_weight& w, int64_t x_row_bytes, int64_t tokens) {
    if (x_row_bytes % 2048 == 0 && tokens >= 4) return true;
    if (w.height >= 2 * LANES) return false;
    if (LANES == 16 && w.height >= 4) return tokens > 12;
    return tokens >= (w.height >= 8 ? 7 : w.height >= 4 ? 5 : w.height >= 2 ? 4 : 3);
}

// Below this many multiply-adds a second thread costs more than it brings.
constexpr double PARALLEL_WORK = 4e5;

static int worth_threads(const hfs_weight& w, const hfs_call& call) {
    const double work = (double)w.steps * (double)w.height * (double)w.width * (double)call.tokens;
    return work < PARALLEL_WORK ? 1 : call.threads;
}

// The bias in float32; false if there is no memory.
template <typename X>
static bool wide_bias(const hfs_weight& weight, const hfs_call& call, const float*& bias) {
    bias = (const float*)call.bias;
    if (sizeof(X) == sizeof(float) || !bias) return true;
    float* wide = hfs_scratch(2, (size_t)weight.out_features);
    if (wide) convert_row((const bf16*)call.bias, weight.out_features, wide);
    bias = wide;
    return wide;
}

template <typename Kind>
static int linear(const hfs_weight& weight, const hfs_call& call) {
    typedef typename Kind::X X;
    if (call.tokens == 0 || weight.out_features == 0) return HFS_OK;
    const float* bias;
    if (!wide_bias<X>(weight, call, bias)) return HFS_NO_MEMORY;
    const Linear<Kind> job = {weight, Panels(weight), bias, (const X*)call.x, call.x_stride, call.tokens,
                              call.activation, worth_threads(weight, call)};
    X* y = (X*)call.y;
#if !defined(HFS_PAIRS)
    if (weight.kind == HFS_SEGMENTS) {
        if (weight.width == 4) return segments_linear<4>(job, y);
        if constexpr (LANES >= 16) {
            if (weight.width == 16) return segments_linear<16>(job, y);
        }
        if constexpr (LANES >= 8) return segments_linear<8>(job, y);
    }
#endif
    const bool lanes = weight.form == HFS_AUTO
                           ? prefer_lanes(weight, call.x_stride * (int64_t)sizeof(X), call.tokens)
                           : weight.form == HFS_LANES_FORM;
    if (!lanes) {
        if constexpr (sizeof(X) == sizeof(float)) {
            rows_linear(job, y);
            return HFS_OK;
        } else {
            return rows_linear_bf16(job, y);
        }
    }
    if (LANES > 4 && call.tokens <= 4) return lanes_linear<4>(job, y);
    if (LANES > 8 && call.tokens <= 8) return lanes_linear<8>(job, y);
    return lanes_linear<LANES>(job, y);
}

}  // namespace HFS_ISA

// A linear from lanes to lanes: of one group of T vectors of tokens, to wherever its rows are wanted.
#pragma once
#include "lanes.h"
#include "panels.h"
#include "words.h"
#if defined(HFS_TILES)
#include "tiles.h"
#endif

namespace HFS_ISA {

#if defined(HFS_TILES)
template <typename Kind, int T, int W, typename Finish>
static void linear_tiles(const Panels& panels, const float* bias, const uint32_t* in, int64_t part, int64_t parts,
                         float* direct, float* strip, const Finish& finish) {
    const int64_t end = panels.count * (part + 1) / parts;
    Tiles<T> tiles;
    for (int64_t i = panels.count * part / parts; i < end; i++) {
        const Chunks next = i + 1 < end ? chunks_of<Kind>(panels, i + 1) : Chunks{};
        const int64_t row = panels.row(i), rows = panels.rows(i);
        tiles_panel<Kind, T>(tiles, in, chunks_of<Kind>(panels, i), next.n ? next.column : nullptr,
                             bias ? bias + row : nullptr, rows, direct ? direct + row * T * W : strip);
        if (!direct) finish(row, rows, strip);
    }
}
#endif

// Panels [count * part / parts, ...) of a weight. finish(row, rows, strip) is given [rows][T * W] results, unless
// `direct` says where all rows of them belong.
template <int T, int W, typename Finish>
static void linear_lanes(const hfs_weight& w, const float* bias, const Lanes& in, int64_t part, int64_t parts,
                   float* direct, const Finish& finish) {
    const Panels panels(w);
    alignas(64) float strip[PANEL_ROWS * T * W];
#if defined(HFS_TILES)
    if (w.chunk_start) {
        if (w.kind == HFS_NEIGHBOURS) {
            linear_tiles<Neighbours, T, W>(panels, bias, in.neighbours, part, parts, direct, strip, finish);
        } else {
            linear_tiles<Couples, T, W>(panels, bias, in.couples, part, parts, direct, strip, finish);
        }
        return;
    }
#endif
    for (int64_t i = panels.count * part / parts; i < panels.count * (part + 1) / parts; i++) {
        const int64_t row = panels.row(i), rows = panels.rows(i), b = i / panels.per_band;
        const int64_t start = w.band_start[b], inside = row - b * w.height;
        const Band band = {w.column + start * (w.kind == HFS_COUPLES ? 2 : 1), w.band_start[b + 1] - start, w.height};
        const void* values = (const uint32_t*)w.values + start * w.height + inside;
        const float* shift = bias ? bias + row : nullptr;
        float* out = direct ? direct + row * T * W : strip;
#if defined(HFS_PAIRS)
        if (w.kind == HFS_NEIGHBOURS) {
            lanes_panel<Neighbours, T, W>(in.neighbours, band, (const uint32_t*)values, shift, rows, out);
        } else {
            lanes_panel<Couples, T, W>(in.couples, band, (const uint32_t*)values, shift, rows, out);
        }
#else
        lanes_panel<Single<float>, T, W>(in.singles, band, (const float*)values, shift, rows, out);
#endif
        if (!direct) finish(row, rows, strip);
    }
}

// Results that become bfloat16 need no more of GELU than that.
template <int W, bool ROUNDED>
HFS_INLINE void activate_results(float* strip, int64_t size, int activation) {
    if (activation != HFS_GELU) return activate_strip<W>(strip, size, activation);
    for (int64_t i = 0; i < size; i += W) {
        store<W>(strip + i, gelu_polynomial<W, ROUNDED ? 7 : 12>(load<W>(strip + i)));
    }
}

struct Nothing {
    void operator()(int64_t, int64_t, float*) const {}
};

}  // namespace HFS_ISA

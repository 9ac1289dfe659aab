// One call, and how its weight is cut into pieces of work.
#pragma once
#include "kernel.h"
#include "kinds.h"

namespace HFS_ISA {

constexpr int64_t PANEL_ROWS = 32;  // rows of a band computed together; higher bands are cut
constexpr int64_t STRIP_ROWS = 16;  // rows of results that leave lane order together

// The rows of a weight as panels (at most PANEL_ROWS rows of one band) and units (panels that fill a strip).
struct Panels {
    const hfs_weight& weight;
    int64_t per_band, count, per_unit, units;

    explicit Panels(const hfs_weight& w, int64_t strip_rows = STRIP_ROWS) : weight(w) {
        per_band = (w.height + PANEL_ROWS - 1) / PANEL_ROWS;
        count = w.out_features / w.height * per_band;
        per_unit = w.height < strip_rows ? (strip_rows + w.height - 1) / w.height : 1;
        units = (count + per_unit - 1) / per_unit;
    }
    int64_t first_of_unit(int64_t unit) const { return unit * per_unit < count ? unit * per_unit : count; }
    int64_t row(int64_t panel) const { return panel / per_band * weight.height + panel % per_band * PANEL_ROWS; }
    int64_t rows(int64_t panel) const {
        const int64_t left = weight.height - panel % per_band * PANEL_ROWS;
        return left < PANEL_ROWS ? left : PANEL_ROWS;
    }
};

// One call: the weight in panels, and the tensors with their types.
template <typename Kind>
struct Linear {
    typedef typename Kind::X X;
    typedef typename Kind::Word Word;
    const hfs_weight& weight;
    Panels panels;
    const float* bias;
    const X* x;
    int64_t x_stride;
    int64_t tokens;
    int activation, threads;

    Band band(int64_t panel) const {
        const int64_t b = panel / panels.per_band, start = weight.band_start[b];
        return {weight.column + start * Kind::COLUMNS, weight.band_start[b + 1] - start, weight.height};
    }
    const Word* values(int64_t panel) const {
        const int64_t start = weight.band_start[panel / panels.per_band];
        return (const Word*)weight.values + start * weight.height + panel % panels.per_band * PANEL_ROWS;
    }
    const float* bias_of(int64_t panel) const { return bias ? bias + panels.row(panel) : nullptr; }
};

// Copy a row from one type to the other.
template <typename From, typename To>
static void convert_row(const From* from, int64_t count, To* to) {
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) write<LANES>(to + k, read<LANES>(from + k));
    for (; k < count; k++) write<1>(to + k, read<1>(from + k));
}

}  // namespace HFS_ISA

// One pass over the blocks of a float32 weight in training: the group lasso's gradient or proximal step, and the masks.
//
// In plain torch these are several passes each, and memory is what they wait for. Here a band of rows is read from
// memory once: its norms are taken, and it is written while it is still in a near cache, if it is not too high for that.
#pragma once
#include "norm.h"
#include "parallel.h"

namespace HFS_ISA {

// Elements of a tile: what a core's own cache holds of two tensors.
constexpr int64_t TILE = 1 << 15;
// Rows whose squares are summed in float32. Longer sums go on in double: no height or width of a block costs accuracy.
constexpr int64_t SHORT_SUM = 16;

// W bits from any position on, read without a look past the last byte.
template <int W>
HFS_INLINE Words<W> keep_words(const uint8_t* bits, int64_t bytes, int64_t position) {
    const int64_t byte = position >> 3;
    uint32_t window = 0;
    for (int i = 0; i < (W == 1 ? 1 : 3); i++) window |= byte + i < bytes ? (uint32_t)bits[byte + i] << 8 * i : 0;
    window >>= position & 7;
    if constexpr (W == 1) {
        return 0u - (window & 1);
    } else {
        Words<W> lane;
        HFS_UNROLL
        for (int i = 0; i < W; i++) lane[i] = (uint32_t)i;
        return 0u - (splat<W>(window) >> lane & 1u);
    }
}

// MODE and MASKED are those of the pass, known to the compiler: the loops over rows hold no question.
template <int MODE, bool MASKED>
struct PrunePass {
    const hfs_prune& p;
    int64_t tile_blocks, tiles, bytes;  // blocks of a tile side by side, tiles of a band, bytes of all bits
    float amount;
    double* sums;  // of each tile: a sum that depends on no thread
    int32_t status;

    // What a block is multiplied by, given the sum of its squares; adds its penalty up.
    template <int W>
    Vec<W> factor(Vec<W> squares, Vec<W> coef, Doubles<W>& penalty) const {
        const Vec<W> norm = square_root<W>(squares), zero{}, one = splat<W>(1.0f);
        penalty += doubles<W>(coef * norm);
        const Vec<W> share = amount * coef / (norm > zero ? norm : one), left = one - share;
        // A block of zeros has no gradient; what is not a number stays none, so that a run that diverged is seen to have.
        if (MODE == HFS_GRADIENT) return norm > zero ? share : norm;
        return left < zero ? zero : left;
    }

    // Columns [from, to) of squares -> factors and words, where every column is a block and bits lie side by side.
    template <int W>
    int64_t columns(int64_t from, int64_t to, int64_t first, float* factors, uint32_t* keep, double& sum) const {
        Doubles<W> penalty{};
        for (; from + W <= to; from += W) {
            if (MODE != HFS_MASK) {
                const Vec<W> coef = p.coef ? load<W>(p.coef + first + from) : splat<W>(1.0f);
                store<W>(factors + from, factor<W>(load<W>(factors + from), coef, penalty));
            }
            if (MASKED) store<W>(keep + from, keep_words<W>(p.bits, bytes, first + from));
        }
        if constexpr (W == 1) {
            sum += penalty;
        } else {
            for (int i = 0; i < W; i++) sum += penalty[i];
        }
        return from;
    }

    void run(int64_t item) {
        const int64_t band = item / tiles, first_block = item % tiles * tile_blocks;
        const int64_t all_blocks = p.cols / p.width;
        const int64_t blocks = all_blocks - first_block < tile_blocks ? all_blocks - first_block : tile_blocks;
        const int64_t cols = blocks * p.width;
        float* factors = hfs_scratch(0, (size_t)(4 * cols));
        if (!factors) {
            __atomic_store_n(&status, HFS_NO_MEMORY, __ATOMIC_RELAXED);
            return;
        }
        uint32_t* keep = (uint32_t*)(factors + cols);
        double* totals = (double*)(factors + 2 * cols);
        float* target = p.target + band * p.height * p.cols + first_block * p.width;
        const float* weight = MODE == HFS_GRADIENT ? p.weight + (target - p.target) : target;
        double sum = 0;
        if (MODE != HFS_MASK) squares(weight, cols, factors, totals);
        const int64_t first = band * p.row_step + first_block * p.col_step;
        if (MODE == HFS_MASK && p.width >= LANES) return clear(target, blocks, first);
        if (p.width == 1 && p.col_step == 1) {
            const int64_t at = columns<LANES>(0, cols, first, factors, keep, sum);
            columns<1>(at, cols, first, factors, keep, sum);
        } else {
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t at = first + b * p.col_step;
                if (MODE != HFS_MASK) {
                    float* of_block = factors + b * p.width;
                    const float value = factor<1>((float)total(of_block, p.width), p.coef ? p.coef[at] : 1.0f, sum);
                    fill(of_block, p.width, value);
                }
                if (MASKED) fill(keep + b * p.width, p.width, 0u - (p.bits[at >> 3] >> (at & 7) & 1u));
            }
        }
        if (sums) sums[item] = sum;
        for (int64_t i = 0; i < p.height; i++, target += p.cols, weight += p.cols) {
            const int64_t at = row<LANES>(0, cols, target, weight, factors, keep);
            row<1>(at, cols, target, weight, factors, keep);
        }
    }

    // Wide blocks: those that stay are not even read.
    void clear(float* target, int64_t blocks, int64_t first) const {
        for (int64_t i = 0; i < p.height; i++, target += p.cols) {
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t at = first + b * p.col_step;
                if (!(p.bits[at >> 3] >> (at & 7) & 1)) fill(target + b * p.width, p.width, 0.0f);
            }
        }
    }

    static double total(const float* values, int64_t count) {
        Doubles<4> four{};
        int64_t j = 0;
        for (; j + 4 <= count; j += 4) four += doubles<4>(load<4>(values + j));
        double sum = (four[0] + four[1]) + (four[2] + four[3]);
        for (; j < count; j++) sum += values[j];
        return sum;
    }

    template <typename T>
    static void fill(T* to, int64_t count, T value) {
        int64_t j = 0;
        for (; j + LANES <= count; j += LANES) store<LANES>(to + j, splat<LANES>(value));
        for (; j + 4 <= count; j += 4) store<4>(to + j, splat<4>(value));
        for (; j < count; j++) to[j] = value;
    }

    // Squares of each column, summed over the rows of the band.
    void squares(const float* weight, int64_t cols, float* sums_of, double* totals) const {
        const bool tall = p.height > SHORT_SUM;
        for (int64_t j = 0; tall && j < cols; j++) totals[j] = 0;
        for (int64_t top = 0; top < p.height; top += SHORT_SUM) {
            for (int64_t j = 0; j < cols; j++) sums_of[j] = 0;
            for (int64_t i = top; i < p.height && i < top + SHORT_SUM; i++, weight += p.cols) {
                add_squares<1>(add_squares<LANES>(0, cols, weight, sums_of), cols, weight, sums_of);
            }
            if (tall) add_sums<1>(add_sums<LANES>(0, cols, sums_of, totals), cols, sums_of, totals);
        }
        for (int64_t j = 0; tall && j < cols; j++) sums_of[j] = (float)totals[j];
    }

    template <int W>
    static int64_t add_squares(int64_t j, int64_t cols, const float* weight, float* sums_of) {
        for (; j + W <= cols; j += W) {
            const Vec<W> w = load<W>(weight + j);
            store<W>(sums_of + j, load<W>(sums_of + j) + w * w);
        }
        return j;
    }

    template <int W>
    static int64_t add_sums(int64_t j, int64_t cols, const float* sums_of, double* totals) {
        for (; j + W <= cols; j += W) store<W>(totals + j, load<W>(totals + j) + doubles<W>(load<W>(sums_of + j)));
        return j;
    }

    template <int W>
    int64_t row(int64_t j, int64_t cols, float* target, const float* weight, const float* factors,
                const uint32_t* keep) const {
        for (; j + W <= cols; j += W) {
            Vec<W> value = load<W>(target + j);
            if constexpr (MODE == HFS_SHRINK) value *= load<W>(factors + j);
            if constexpr (MODE == HFS_GRADIENT) value += load<W>(factors + j) * load<W>(weight + j);
            // By words, not by a product: what is pruned is zero even where it was not a number.
            if constexpr (MASKED) value = floats<W>(words<W>(value) & load<W>(keep + j));
            store<W>(target + j, value);
        }
        return j;
    }
};

template <int MODE, bool MASKED>
static int run_pass(const hfs_prune& p) {
    const int64_t bands = p.rows / p.height, blocks = p.cols / p.width;
    if (bands == 0 || blocks == 0) return HFS_OK;
    int64_t tile = TILE / p.height;
    tile = tile < 4 * LANES ? 4 * LANES : tile > 1024 ? 1024 : tile;
    const int64_t tile_blocks = tile > p.width ? tile / p.width : 1;
    const int64_t tiles = (blocks + tile_blocks - 1) / tile_blocks, items = bands * tiles;
    double* sums = nullptr;
    if (p.penalty && !(sums = (double*)hfs_scratch(2, (size_t)(2 * items)))) return HFS_NO_MEMORY;
    const float scale = p.scale ? *p.scale : 1.0f, moved = p.moved && !*p.moved ? 0.0f : 1.0f;
    PrunePass<MODE, MASKED> pass = {p, tile_blocks, tiles, (bands * blocks + 7) / 8, p.amount * scale * moved, sums, HFS_OK};
    // Little work is not worth the start of a team.
    const int threads = p.rows * p.cols < 4 * TILE ? 1 : p.threads;
    parallel_for(items, threads, [&pass](int64_t item) { pass.run(item); });
    if (p.penalty && pass.status == HFS_OK) {
        double total = 0;
        for (int64_t i = 0; i < items; i++) total += sums[i];
        *p.penalty = (float)total;
    }
    return pass.status;
}

static int prune_pass(const hfs_prune& p) {
    switch (p.mode) {
        case HFS_GRADIENT: return p.bits ? run_pass<HFS_GRADIENT, true>(p) : run_pass<HFS_GRADIENT, false>(p);
        case HFS_SHRINK: return p.bits ? run_pass<HFS_SHRINK, true>(p) : run_pass<HFS_SHRINK, false>(p);
        default: return p.bits ? run_pass<HFS_MASK, true>(p) : HFS_OK;
    }
}

}  // namespace HFS_ISA

// Attention of one head by matrix tiles: the same sums as attention.h, in bfloat16, 16 keys x 16 queries at a time.
//
// Keys lie [token][feature] and values [feature][token], so that both are tiles of weights as they stand; queries are
// [pair of features][token], tiles of activations. Keys are taken in units of 32, which is a tile of values.
#pragma once
#include "attention.h"
#include "tiles.h"

namespace HFS_ISA {

constexpr int UNIT = 32;                       // keys
constexpr int UNITS = KEY_TILES * LANES / UNIT;  // per block

struct TileHead {
    const uint32_t* query;  // [features / 2][query_stride], at the first query of the run
    int64_t query_stride;   // words
    int64_t features;       // of the head, a multiple of 32
    const uint32_t* key;    // [keys][key_stride] words, at the first pair of the head
    int64_t key_stride;     // words
    const bf16* value;      // [features][value_stride], keys up to a multiple of 32
    int64_t value_stride;
    int64_t tiles;          // of 16 keys
    const int32_t* seen;    // the key tiles that are not masked as a whole, ascending
    int64_t seen_count;
    const float* mask;      // [keys], divided by scale
    const float* bias;      // [key][bias_stride] of the first query, divided by scale; or null
    int64_t bias_stride;
    float scale;
};

// Scores [16][T * 16] of the keys of one tile. Registers 0 to 2 hold them, 6 keys, 7 queries.
template <int T>
HFS_INLINE void score_tile(const TileHead& head, int64_t tile, float* scores) {
    constexpr int64_t G = T * 16;
    const float* mask = head.mask + tile * 16;
    bool zero = !head.bias;
    for (int r = 0; r < 16; r++) zero &= mask[r] == 0.0f;
    for (int r = 0; r < 16 && !zero; r++) {
        HFS_UNROLL
        for (int t = 0; t < T; t++) {
            Vec<16> start = splat<16>(mask[r]);
            if (head.bias) start += load<16>(head.bias + (tile * 16 + r) * head.bias_stride + t * 16);
            store<16>(scores + r * G + t * 16, start);
        }
    }
    for_results<1, T>([&](auto result, int, int t) __attribute__((always_inline)) {
        if (zero) {
            tile_zero<result()>();
        } else {
            tile_load<result()>(scores + t * 16, G * 4);
        }
    });
    const uint32_t* key = head.key + tile * 16 * head.key_stride;
    for (int64_t c = 0; c < head.features / 2; c += CHUNK) {
        tile_load<6>(key + c, head.key_stride * 4);
        for_results<1, T>([&](auto result, int, int t) __attribute__((always_inline)) {
            tile_load<7>(head.query + c * head.query_stride + t * 16, head.query_stride * 4);
            tile_dot<result(), 6, 7>();
        });
    }
    for_results<1, T>([&](auto result, int, int t) __attribute__((always_inline)) {
        tile_store<result()>(scores + t * 16, G * 4);
    });
}

// Features [d, d + 32) of out [..][out_stride]: the values of `count` units of keys, weighted and added up.
template <int T>
HFS_INLINE void weigh_tiles(const TileHead& head, const uint32_t* weights, const int32_t* units, int64_t count, int64_t d,
                            bool first, float* out, int64_t out_stride) {
    out += d * out_stride;
    for_results<2, T>([&](auto result, int h, int t) __attribute__((always_inline)) {
        if (first) {
            tile_zero<result()>();
        } else {
            tile_load<result()>(out + h * 16 * out_stride + t * 16, out_stride * 4);
        }
    });
    for (int64_t i = 0; i < count; i++) {
        const bf16* value = head.value + d * head.value_stride + (int64_t)units[i] * UNIT;
        const uint32_t* weight = weights + i * (UNIT / 2) * T * 16;
        for_results<2, T>([&](auto result, int h, int t) __attribute__((always_inline)) {
            if (t == 0) tile_load<6>(value + h * 16 * head.value_stride, head.value_stride * 2);
            tile_load<7>(weight + t * 16, T * 64);
            tile_dot<result(), 6, 7>();
        });
    }
    for_results<2, T>([&](auto result, int h, int t) __attribute__((always_inline)) {
        tile_store<result()>(out + h * 16 * out_stride + t * 16, out_stride * 4);
    });
}

template <int T>
HFS_INLINE void scale_rows(float* out, int64_t rows, int64_t stride, const Vec<16> (&factor)[T]) {
    for (int64_t d = 0; d < rows; d++) {
        HFS_UNROLL
        for (int t = 0; t < T; t++) {
            store<16>(out + d * stride + t * 16, load<16>(out + d * stride + t * 16) * factor[t]);
        }
    }
}

// out[d][t] at out + d * out_stride + t * 16, for T tiles of queries. `scores` holds KEY_TILES * 16 * T * 16 floats. The
// tile registers must be shaped for 16 rows.
template <int T>
static void attend_tiles(const TileHead& head, float* scores, float* out, int64_t out_stride) {
    constexpr int64_t G = T * 16;
    const Vec<16> factor = splat<16>(head.scale * 1.44269504f);
    Vec<16> top[T], sum[T];
    int64_t next = 0;
    for (bool first = true; next < head.seen_count; first = false) {
        int32_t units[UNITS];
        int64_t count = 0;
        for (; next < head.seen_count; next++) {
            const int32_t unit = head.seen[next] / 2;
            if (count && units[count - 1] == unit) continue;
            if (count == UNITS) break;
            units[count++] = unit;
        }
        for (int64_t i = 0; i < 2 * count; i++) {
            const int64_t tile = 2 * units[i / 2] + i % 2;
            if (tile < head.tiles) {
                score_tile<T>(head, tile, scores + i * 16 * G);
            } else {
                for (int64_t j = 0; j < 16 * G; j += 16) store<16>(scores + i * 16 * G + j, splat<16>(MASKED));
            }
        }
        Vec<16> shrink[T];
        HFS_UNROLL
        for (int t = 0; t < T; t++) {
            Vec<16> even = splat<16>(MASKED), odd = even;
            for (int64_t j = 0; j < count * UNIT; j += 2) {
                const Vec<16> a = load<16>(scores + j * G + t * 16), b = load<16>(scores + (j + 1) * G + t * 16);
                even = a > even ? a : even;
                odd = b > odd ? b : odd;
            }
            Vec<16> now = even > odd ? even : odd;
            if (!first) now = top[t] > now ? top[t] : now;
            shrink[t] = first ? Vec<16>{} : exp2_negative<16, 6>((top[t] - now) * factor);
            top[t] = now;
            const Vec<16> block = exponentials<Neighbours, 16>(scores + t * 16, count * UNIT, G, now, factor);
            sum[t] = first ? block : sum[t] * shrink[t] + block;
        }
        if (!first) scale_rows<T>(out, head.features, out_stride, shrink);
        for (int64_t d = 0; d < head.features; d += 32) {
            weigh_tiles<T>(head, (const uint32_t*)scores, units, count, d, first, out, out_stride);
        }
    }
    HFS_UNROLL
    for (int t = 0; t < T; t++) sum[t] = 1.0f / sum[t];
    scale_rows<T>(out, head.features, out_stride, sum);
}

}  // namespace HFS_ISA

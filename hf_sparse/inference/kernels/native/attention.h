// Attention of one head with queries in lanes: scores stand as [key][query], so that softmax is vertical.
//
// softmax(q k' * scale + mask + bias) v for a run of T tiles of W queries, over all key tiles of their sequence, in
// blocks of keys that stay in the first-level cache (Milakov and Gimelshein 2018, "Online normalizer calculation for
// softmax"; Dao et al. 2022, FlashAttention).
#pragma once
#include "activation.h"
#include "words.h"

namespace HFS_ISA {

constexpr int KEY_TILES = 8;         // tiles of W keys per block
constexpr float MASKED = -1e30f;     // a key that nobody sees: exp underflows to zero, and differences stay finite

// 2^x for x <= 0; relative error 2e-7 with 6 terms, 4e-6 with 4, which is far below the rounding of bfloat16.
template <int W, int TERMS>
HFS_INLINE Vec<W> exp2_negative(Vec<W> x) {
#if defined(__AVX512F__)
    static_assert(W == 16, "a full register");
    const Vec<W> n = (Vec<W>)_mm512_roundscale_ps((__m512)x, 0), r = x - n;
#else
    x = x < -100.0f ? splat<W>(-100.0f) : x;  // what is smaller would make denormal products, which take long
    const float round = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    const Vec<W> shifted = x + round, r = x - (shifted - round);
#endif
    Vec<W> p;
    if constexpr (TERMS >= 6) {
        p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
        p = p * r + 9.618437357674640e-3f;
        p = p * r + 5.550332471162809e-2f;
    } else {
        p = r * 9.6182e-3f + 5.55036e-2f;
    }
    p = p * r + 2.402264791363012e-1f;
    p = p * r + 6.931472028550421e-1f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return (Vec<W>)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * floats<W>((words<W>(shifted) << 23) + (127u << 23));
#endif
}

// Where a tile of tokens has its features: feature d of the tile lies at `at` + d * stride.
template <typename Word>
struct Tile {
    const Word* at;
    int64_t stride;
};

// acc[r][t] += sum over d of w[d * w_step + r * w_row] * x[d * x_step][t]: R rows of scalars times T vectors.
template <typename Kind, int R, int T, int W>
HFS_INLINE void broadcast_rows(const typename Kind::Word* __restrict x, int64_t x_step,
                               const typename Kind::Word* __restrict w, int64_t w_step, int64_t w_row, int64_t n,
                               Vec<W> (&acc)[R][T]) {
    for (int64_t d = 0; d < n; d++) {
        typename VecOf<typename Kind::Word, W>::type xv[T];
        HFS_UNROLL
        for (int t = 0; t < T; t++) xv[t] = load<W>(x + d * x_step + t * W);
        HFS_UNROLL
        for (int r = 0; r < R; r++) {
            const auto wv = splat<W>(w[d * w_step + r * w_row]);
            HFS_UNROLL
            for (int t = 0; t < T; t++) acc[r][t] = Kind::template add<W>(acc[r][t], wv, xv[t]);
        }
    }
}

template <typename Word>
struct Head {
    Tile<Word> query;              // of the first query tile of the run; the next ones follow at W
    int64_t size;                  // steps of a score: features, or pairs of them
    int64_t features;              // of the head
    const Tile<Word>* key;         // [tiles]
    const Tile<Word>* value;       // [tiles]; rows of W floats, or of W / 2 words of two tokens
    const int32_t* seen;           // the key tiles that are not masked as a whole, ascending
    int64_t seen_count;
    const float* mask;             // [keys], divided by scale
    const float* bias;             // [key][bias_stride] of the first query, divided by scale; or null
    int64_t bias_stride;
    float scale;
};

template <int T, int W>
constexpr int attention_rows() {
    constexpr int rows = MANY_REGISTERS ? 8 : T <= 2 ? 4 : 2;
    return rows < W ? rows : W;
}

// Features [d, d + R) of what the head gives: the values of one block of keys, weighted and added up.
template <typename Kind, int R, int T, int W>
static void weigh_values(const Head<typename Kind::Word>& head, const typename Kind::Word* weights, int64_t first,
                         int64_t count, int64_t d, const Vec<W> (&shrink)[T], const Vec<W> (&finish)[T], float* out,
                         int64_t out_stride) {
    constexpr int steps = sizeof(typename Kind::X) == 2 ? W / 2 : W;
    Vec<W> acc[R][T];
    HFS_UNROLL
    for (int r = 0; r < R; r++) {
        HFS_UNROLL
        for (int t = 0; t < T; t++) {
            acc[r][t] = first ? load<W>(out + (d + r) * out_stride + t * W) * shrink[t] : Vec<W>{};
        }
    }
    for (int64_t i = 0; i < count; i++) {
        const auto& value = head.value[head.seen[first + i]];
        broadcast_rows<Kind, R, T, W>(weights + i * steps * T * W, T * W, value.at + d * value.stride, 1, value.stride,
                                      steps, acc);
    }
    HFS_UNROLL
    for (int r = 0; r < R; r++) {
        HFS_UNROLL
        for (int t = 0; t < T; t++) store<W>(out + (d + r) * out_stride + t * W, acc[r][t] * finish[t]);
    }
}

// Scores of one block of keys into `scores`, and the largest of each query.
template <typename Kind, int T, int W>
HFS_INLINE void score_keys(const Head<typename Kind::Word>& head, int64_t first, int64_t count, float* scores,
                           Vec<W> (&top)[T]) {
    constexpr int R = attention_rows<T, W>();
    HFS_UNROLL
    for (int t = 0; t < T; t++) top[t] = splat<W>(MASKED);
    for (int64_t i = 0; i < count; i++) {
        const int64_t tile = head.seen[first + i];
        for (int row = 0; row < W; row += R) {
            const int64_t key = tile * W + row;
            Vec<W> acc[R][T];
            HFS_UNROLL
            for (int r = 0; r < R; r++) {
                HFS_UNROLL
                for (int t = 0; t < T; t++) acc[r][t] = splat<W>(head.mask[key + r]);
            }
            if (head.bias) {
                for (int r = 0; r < R; r++) {
                    HFS_UNROLL
                    for (int t = 0; t < T; t++) acc[r][t] += load<W>(head.bias + (key + r) * head.bias_stride + t * W);
                }
            }
            broadcast_rows<Kind, R, T, W>(head.query.at, head.query.stride, head.key[tile].at + row,
                                          head.key[tile].stride, 1, head.size, acc);
            HFS_UNROLL
            for (int r = 0; r < R; r++) {
                HFS_UNROLL
                for (int t = 0; t < T; t++) {
                    top[t] = acc[r][t] > top[t] ? acc[r][t] : top[t];
                    store<W>(scores + ((i * W + row + r) * T + t) * W, acc[r][t]);
                }
            }
        }
    }
}

// Exponentials of `count` scores [count][stride] of one vector of queries, in place; gives their sum.
template <typename Kind, int W>
HFS_INLINE Vec<W> exponentials(float* scores, int64_t count, int64_t stride, Vec<W> top, Vec<W> factor) {
    constexpr bool pairs = sizeof(typename Kind::X) == 2;
    const Vec<W> offset = top * factor;
    Vec<W> even{}, odd{};
    for (int64_t j = 0; j < count; j += 2) {
        const Vec<W> a = exp2_negative<W, pairs ? 4 : 6>(load<W>(scores + j * stride) * factor - offset);
        const Vec<W> b = exp2_negative<W, pairs ? 4 : 6>(load<W>(scores + (j + 1) * stride) * factor - offset);
        even += a;
        odd += b;
#if defined(HFS_PAIRS)
        // Words of two keys, over scores that were read already.
        store<W>((uint32_t*)scores + j / 2 * stride, pair_words<W>(a, b));
#else
        store<W>(scores + j * stride, a);
        store<W>(scores + (j + 1) * stride, b);
#endif
    }
    return even + odd;
}

// out[d][t] at out + d * out_stride + t * W. `scores` holds KEY_TILES * W * T * W floats. Features come in eights.
template <typename Kind, int T, int W>
static void attend(const Head<typename Kind::Word>& head, float* scores, float* out, int64_t out_stride) {
    constexpr int R = attention_rows<T, W>();
    const Vec<W> factor = splat<W>(head.scale * 1.44269504f);
    Vec<W> top[T], sum[T];
    for (int64_t first = 0; first < head.seen_count; first += KEY_TILES) {
        const int64_t count = head.seen_count - first < KEY_TILES ? head.seen_count - first : KEY_TILES;
        const bool last = first + count == head.seen_count;
        Vec<W> now[T], shrink[T], finish[T];
        score_keys<Kind, T, W>(head, first, count, scores, now);
        HFS_UNROLL
        for (int t = 0; t < T; t++) {
            if (first) now[t] = top[t] > now[t] ? top[t] : now[t];
            shrink[t] = first ? exp2_negative<W, 6>((top[t] - now[t]) * factor) : Vec<W>{};
            top[t] = now[t];
            const Vec<W> block = exponentials<Kind, W>(scores + t * W, count * W, T * W, now[t], factor);
            sum[t] = first ? sum[t] * shrink[t] + block : block;
            finish[t] = last ? 1.0f / sum[t] : splat<W>(1.0f);
        }
        for (int64_t d = 0; d < head.features; d += R) {
            weigh_values<Kind, R, T, W>(head, (const typename Kind::Word*)scores, first, count, d, shrink, finish, out,
                                        out_stride);
        }
    }
}

}  // namespace HFS_ISA

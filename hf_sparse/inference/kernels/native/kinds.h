// What a kernel multiplies: single float32 weights, or pairs of bfloat16 weights of one row.
//
// A kind says how a weight is stored (Word: four bytes per row either way), how activations are packed for the lanes
// form, and how one step of a sum is taken. `column` of a step is one number, or two for Couples.
#pragma once
#include "vec.h"

namespace HFS_ISA {

// 32 vector registers, or 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool MANY_REGISTERS = true;
#else
constexpr bool MANY_REGISTERS = false;
#endif

// The columns that one band keeps.
struct Band {
    const int32_t* column;
    int64_t n;  // steps: columns, or pairs of them
    int64_t height;
};

// Load one tile of W tokens x W features for packing; missing tokens become zeros.
template <int W, typename X>
HFS_INLINE void read_tile(const X* x, int64_t x_stride, int tokens, Vec<W> (&tile)[W]) {
    if (tokens == W) {
        HFS_UNROLL
        for (int i = 0; i < W; i++) tile[i] = read<W>(x + i * x_stride);
    } else {
        for (int i = 0; i < W; i++) tile[i] = i < tokens ? read<W>(x + i * x_stride) : Vec<W>{};
    }
}

// One float32 weight per row and column; activations of type A (float or bf16) become float32 lanes.
template <typename A>
struct Single {
    typedef A X;
    typedef Single<float> Core;  // what the micro-kernels see once x is packed
    typedef float Word;
    static constexpr int COLUMNS = 1;

    static int64_t packed_features(int64_t features) { return features; }

    // Copy features [first, last) of `tokens` (<= W) rows of x into vectors `group` words apart. `packed` and `x` point
    // at feature 0; `first` is a multiple of 2 W.
    template <int W>
    static void pack(const A* x, int64_t x_stride, int tokens, int64_t first, int64_t last, float* packed,
                     int64_t group) {
        int64_t k = first;
        for (; k + W <= last; k += W) {
            Vec<W> tile[W];
            read_tile<W>(x + k, x_stride, tokens, tile);
            transpose<W>(tile);
            HFS_UNROLL
            for (int i = 0; i < W; i++) store<W>(packed + (k + i) * group, tile[i]);
        }
        for (; k < last; k++) {
            for (int i = 0; i < W; i++) {
                packed[k * group + i] = i < tokens ? (float)read<1>(x + i * x_stride + k) : 0.0f;
            }
        }
    }
    template <int W, int GROUP>
    HFS_INLINE Vec<W> lanes(const float* x, const int32_t* column) {
        return load<W>(x + (int64_t)column[0] * GROUP);
    }
    HFS_INLINE float one(const A* x, const int32_t* column) { return read<1>(x + column[0]); }
    template <int W>
    HFS_INLINE Vec<W> add(Vec<W> sum, Vec<W> w, Vec<W> x) {
        return sum + w * x;
    }
};

#if defined(HFS_PAIRS)

// sum + w.lo * x.lo + w.hi * x.hi in every lane, where lo and hi are the bfloat16 halves of a word.
template <int W>
HFS_INLINE Vec<W> dot_pairs(Vec<W> sum, Words<W> w, Words<W> x) {
#if defined(__AVX512BF16__)
    if constexpr (W == 16) {
        return (Vec<16>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
    } else if constexpr (W == 8) {
        return (Vec<8>)_mm256_dpbf16_ps((__m256)sum, (__m256bh)w, (__m256bh)x);
    } else if constexpr (W == 4) {
        return (Vec<4>)_mm_dpbf16_ps((__m128)sum, (__m128bh)w, (__m128bh)x);
    }
#endif
    sum += floats<W>(w << 16) * floats<W>(x << 16);
    return sum + floats<W>(w & 0xffff0000u) * floats<W>(x & 0xffff0000u);
}

HFS_INLINE uint32_t word_of(bf16 lo, bf16 hi) { return lo.bits | (uint32_t)hi.bits << 16; }

// Load one tile of W tokens x W words (2 W features).
template <int W>
HFS_INLINE void read_words(const bf16* x, int64_t x_stride, int tokens, Vec<W> (&tile)[W]) {
    for (int i = 0; i < W; i++) {
        tile[i] = Vec<W>{};
        if (i < tokens) __builtin_memcpy(&tile[i], x + i * x_stride, sizeof tile[i]);
    }
    transpose<W>(tile);
}

// Pairs of neighbouring columns 2 c and 2 c + 1, stored under c: blocks whose width is even.
struct Neighbours {
    typedef bf16 X;
    typedef Neighbours Core;
    typedef uint32_t Word;
    static constexpr int COLUMNS = 1;

    static int64_t packed_features(int64_t features) { return features / 2; }

    template <int W>
    static void pack(const bf16* x, int64_t x_stride, int tokens, int64_t first, int64_t last, uint32_t* packed,
                     int64_t group) {
        int64_t k = first;
        for (; k + 2 * W <= last; k += 2 * W) {
            Vec<W> tile[W];
            read_words<W>(x + k, x_stride, tokens, tile);
            HFS_UNROLL
            for (int i = 0; i < W; i++) store<W>(packed + (k / 2 + i) * group, words<W>(tile[i]));
        }
        for (; k < last; k += 2) {
            for (int i = 0; i < W; i++) {
                const bf16* token = x + i * x_stride + k;
                packed[k / 2 * group + i] = i < tokens ? word_of(token[0], token[1]) : 0;
            }
        }
    }
    template <int W, int GROUP>
    HFS_INLINE Words<W> lanes(const uint32_t* x, const int32_t* column) {
        return load<W>(x + (int64_t)column[0] * GROUP);
    }
    HFS_INLINE uint32_t one(const bf16* x, const int32_t* column) {
        uint32_t word;
        __builtin_memcpy(&word, x + 2 * (int64_t)column[0], sizeof word);
        return word;
    }
    template <int W>
    HFS_INLINE Vec<W> add(Vec<W> sum, Words<W> w, Words<W> x) {
        return dot_pairs<W>(sum, w, x);
    }
};

// Any two columns of a band. Each activation is packed into both halves of its word, so that a pair is a blend.
struct Couples {
    typedef bf16 X;
    typedef Couples Core;
    typedef uint32_t Word;
    static constexpr int COLUMNS = 2;

    static int64_t packed_features(int64_t features) { return features; }

    template <int W>
    static void pack(const bf16* x, int64_t x_stride, int tokens, int64_t first, int64_t last, uint32_t* packed,
                     int64_t group) {
        int64_t k = first;
        for (; k + 2 * W <= last; k += 2 * W) {
            Vec<W> tile[W];
            read_words<W>(x + k, x_stride, tokens, tile);
            HFS_UNROLL
            for (int i = 0; i < W; i++) {
                const Words<W> lo = words<W>(tile[i]) << 16, hi = words<W>(tile[i]) & 0xffff0000u;
                store<W>(packed + (k + 2 * i) * group, lo | lo >> 16);
                store<W>(packed + (k + 2 * i + 1) * group, hi | hi >> 16);
            }
        }
        for (; k < last; k++) {
            for (int i = 0; i < W; i++) {
                const bf16 token = i < tokens ? x[i * x_stride + k] : bf16{0};
                packed[k * group + i] = word_of(token, token);
            }
        }
    }
    template <int W, int GROUP>
    HFS_INLINE Words<W> lanes(const uint32_t* x, const int32_t* column) {
        const Words<W> a = load<W>(x + (int64_t)column[0] * GROUP), b = load<W>(x + (int64_t)column[1] * GROUP);
#if defined(__AVX512BF16__)
        if constexpr (W == 16) return (Words<16>)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)a, (__m512i)b);
        if constexpr (W == 8) return (Words<8>)_mm256_blend_epi16((__m256i)a, (__m256i)b, 0xaa);
#endif
        return (a & 0xffffu) | (b & 0xffff0000u);
    }
    HFS_INLINE uint32_t one(const bf16* x, const int32_t* column) { return word_of(x[column[0]], x[column[1]]); }
    template <int W>
    HFS_INLINE Vec<W> add(Vec<W> sum, Words<W> w, Words<W> x) {
        return dot_pairs<W>(sum, w, x);
    }
};

#endif  // HFS_PAIRS

}  // namespace HFS_ISA

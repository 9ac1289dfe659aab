// SIMD vectors of W floats from GCC/Clang vector extensions: one source for every instruction set.
//
// Each translation unit that includes this defines HFS_ISA (a namespace of its own, so that code compiled for one
// instruction set is never linked into another) and HFS_LANES (floats per register: 16, 8 or 4).
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define HFS_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define HFS_UNROLL _Pragma("clang loop unroll(full)")
#define HFS_SHUFFLE(W, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define HFS_UNROLL _Pragma("GCC unroll 32")
#define HFS_SHUFFLE(W, a, b, ...) __builtin_shuffle(a, b, (Ints<W>){__VA_ARGS__})
#endif

namespace HFS_ISA {

constexpr int LANES = HFS_LANES;

template <typename T, int W>
struct VecOf {
    typedef T type __attribute__((vector_size(W * sizeof(T))));
};
template <typename T>
struct VecOf<T, 1> {
    typedef T type;
};
template <int W>
using Vec = typename VecOf<float, W>::type;
template <int W>
using Ints = typename VecOf<int32_t, W>::type;
template <int W>
using Words = typename VecOf<uint32_t, W>::type;
template <int W>
using Halves = typename VecOf<uint16_t, W>::type;
template <int W>
using Doubles = typename VecOf<double, W>::type;

// memcpy is how C++ spells an unaligned load; it compiles to one instruction.
template <int W, typename T>
HFS_INLINE typename VecOf<T, W>::type load(const T* p) {
    typename VecOf<T, W>::type v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <int W, typename T>
HFS_INLINE void store(T* p, typename VecOf<T, W>::type v) {
    __builtin_memcpy(p, &v, sizeof v);
}
template <int W, typename T>
HFS_INLINE typename VecOf<T, W>::type splat(T s) {
    return s - typename VecOf<T, W>::type{};
}
template <int W>
HFS_INLINE Words<W> words(Vec<W> v) {
    Words<W> u;
    __builtin_memcpy(&u, &v, sizeof u);
    return u;
}
template <int W>
HFS_INLINE Vec<W> floats(Words<W> u) {
    Vec<W> v;
    __builtin_memcpy(&v, &u, sizeof v);
    return v;
}

template <int W>
HFS_INLINE Doubles<W> doubles(Vec<W> v) {
    if constexpr (W == 1) {
        return v;
    } else {
        return __builtin_convertvector(v, Doubles<W>);
    }
}

// bfloat16 is the upper half of a float32. Rounding is to nearest even, and a NaN stays a NaN.
struct bf16 {
    uint16_t bits;
};
HFS_INLINE float widen(bf16 h) {
    uint32_t u = (uint32_t)h.bits << 16;
    float f;
    __builtin_memcpy(&f, &u, sizeof f);
    return f;
}
HFS_INLINE bf16 narrow(float f) {
    uint32_t u;
    __builtin_memcpy(&u, &f, sizeof u);
    bf16 h;
    h.bits = f != f ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    return h;
}

// One way to read and write W values whatever their type in memory; arithmetic is always float32.
template <int W>
HFS_INLINE Vec<W> read(const float* p) {
    return load<W>(p);
}
template <int W>
HFS_INLINE Vec<W> read(const bf16* p) {
    if constexpr (W == 1) {
        return widen(*p);
    } else {
        Halves<W> h;
        __builtin_memcpy(&h, p, sizeof h);
        return floats<W>(__builtin_convertvector(h, Words<W>) << 16);
    }
}
template <int W>
HFS_INLINE void write(float* p, Vec<W> v) {
    store<W>(p, v);
}
template <int W>
HFS_INLINE void write(bf16* p, Vec<W> v) {
    if constexpr (W == 1) {
        *p = narrow(v);
    } else {
        Words<W> u = words<W>(v);
        u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
        u = v != v ? Words<W>{} + 0x7fc0 : u;
        Halves<W> h = __builtin_convertvector(u, Halves<W>);
        __builtin_memcpy(p, &h, sizeof h);
    }
}

// The steps of a transpose: pairs of floats, pairs of pairs, then whole 128-bit lanes.
HFS_INLINE Vec<4> zip_lo(Vec<4> a, Vec<4> b) { return HFS_SHUFFLE(4, a, b, 0, 4, 1, 5); }
HFS_INLINE Vec<4> zip_hi(Vec<4> a, Vec<4> b) { return HFS_SHUFFLE(4, a, b, 2, 6, 3, 7); }
HFS_INLINE Vec<4> pair_lo(Vec<4> a, Vec<4> b) { return HFS_SHUFFLE(4, a, b, 0, 1, 4, 5); }
HFS_INLINE Vec<4> pair_hi(Vec<4> a, Vec<4> b) { return HFS_SHUFFLE(4, a, b, 2, 3, 6, 7); }

HFS_INLINE Vec<8> zip_lo(Vec<8> a, Vec<8> b) { return HFS_SHUFFLE(8, a, b, 0, 8, 1, 9, 4, 12, 5, 13); }
HFS_INLINE Vec<8> zip_hi(Vec<8> a, Vec<8> b) { return HFS_SHUFFLE(8, a, b, 2, 10, 3, 11, 6, 14, 7, 15); }
HFS_INLINE Vec<8> pair_lo(Vec<8> a, Vec<8> b) { return HFS_SHUFFLE(8, a, b, 0, 1, 8, 9, 4, 5, 12, 13); }
HFS_INLINE Vec<8> pair_hi(Vec<8> a, Vec<8> b) { return HFS_SHUFFLE(8, a, b, 2, 3, 10, 11, 6, 7, 14, 15); }
HFS_INLINE Vec<8> quad_lo(Vec<8> a, Vec<8> b) { return HFS_SHUFFLE(8, a, b, 0, 1, 2, 3, 8, 9, 10, 11); }
HFS_INLINE Vec<8> quad_hi(Vec<8> a, Vec<8> b) { return HFS_SHUFFLE(8, a, b, 4, 5, 6, 7, 12, 13, 14, 15); }

HFS_INLINE Vec<16> zip_lo(Vec<16> a, Vec<16> b) {
    return HFS_SHUFFLE(16, a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
}
HFS_INLINE Vec<16> zip_hi(Vec<16> a, Vec<16> b) {
    return HFS_SHUFFLE(16, a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
HFS_INLINE Vec<16> pair_lo(Vec<16> a, Vec<16> b) {
    return HFS_SHUFFLE(16, a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
}
HFS_INLINE Vec<16> pair_hi(Vec<16> a, Vec<16> b) {
    return HFS_SHUFFLE(16, a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
HFS_INLINE Vec<16> quad_even(Vec<16> a, Vec<16> b) {
    return HFS_SHUFFLE(16, a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
}
HFS_INLINE Vec<16> quad_odd(Vec<16> a, Vec<16> b) {
    return HFS_SHUFFLE(16, a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

// Transpose a W x W tile held in W registers.
template <int W>
HFS_INLINE void transpose(Vec<W> (&r)[W]) {
    Vec<W> t[W];
    HFS_UNROLL
    for (int i = 0; i < W; i += 4) {
        Vec<W> a = zip_lo(r[i], r[i + 1]), b = zip_hi(r[i], r[i + 1]);
        Vec<W> c = zip_lo(r[i + 2], r[i + 3]), d = zip_hi(r[i + 2], r[i + 3]);
        t[i] = pair_lo(a, c);
        t[i + 1] = pair_hi(a, c);
        t[i + 2] = pair_lo(b, d);
        t[i + 3] = pair_hi(b, d);
    }
    if constexpr (W == 4) {
        HFS_UNROLL
        for (int i = 0; i < 4; i++) r[i] = t[i];
    } else if constexpr (W == 8) {
        HFS_UNROLL
        for (int i = 0; i < 4; i++) {
            r[i] = quad_lo(t[i], t[i + 4]);
            r[i + 4] = quad_hi(t[i], t[i + 4]);
        }
    } else {
        HFS_UNROLL
        for (int i = 0; i < 4; i++) {
            Vec<W> a = quad_even(t[i], t[i + 4]), b = quad_odd(t[i], t[i + 4]);
            Vec<W> c = quad_even(t[i + 8], t[i + 12]), d = quad_odd(t[i + 8], t[i + 12]);
            r[i] = quad_even(a, c);
            r[i + 4] = quad_even(b, d);
            r[i + 8] = quad_odd(a, c);
            r[i + 12] = quad_odd(b, d);
        }
    }
}

}  // namespace HFS_ISA

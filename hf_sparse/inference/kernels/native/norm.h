// LayerNorm with tokens in lanes: every lane is normalised over the rows of its column.
#pragma once
#include "vec.h"

namespace HFS_ISA {

template <int W>
HFS_INLINE Vec<W> square_root(Vec<W> x) {
    Vec<W> r;
#if defined(__AVX512F__)
    if constexpr (W == 16) return (Vec<W>)_mm512_sqrt_ps((__m512)x);
#endif
#if defined(__AVX2__)
    if constexpr (W == 8) return (Vec<W>)_mm256_sqrt_ps((__m256)x);
#endif
    for (int i = 0; i < W; i++) ((float*)&r)[i] = __builtin_sqrtf(((const float*)&x)[i]);
    return r;
}

// out = LayerNorm(out + residual) * gain + shift, over `rows` rows [G]; out and residual are written and read in place.
template <int T, int W>
static void add_norm(float* out, const float* residual, int64_t rows, const float* gain, const float* shift, float eps) {
    constexpr int64_t G = T * W;
    Vec<W> sum[T], squares[T];
    HFS_UNROLL
    for (int t = 0; t < T; t++) sum[t] = squares[t] = Vec<W>{};
    for (int64_t i = 0; i < rows; i++) {
        HFS_UNROLL
        for (int t = 0; t < T; t++) {
            const Vec<W> x = load<W>(out + i * G + t * W) + load<W>(residual + i * G + t * W);
            store<W>(out + i * G + t * W, x);
            sum[t] += x;
        }
    }
    HFS_UNROLL
    for (int t = 0; t < T; t++) sum[t] = sum[t] * (1.0f / (float)rows);
    // A pass of its own: squares of what is not centred would cancel where one feature or the mean is large.
    for (int64_t i = 0; i < rows; i++) {
        HFS_UNROLL
        for (int t = 0; t < T; t++) {
            const Vec<W> centred = load<W>(out + i * G + t * W) - sum[t];
            squares[t] += centred * centred;
        }
    }
    HFS_UNROLL
    for (int t = 0; t < T; t++) squares[t] = 1.0f / square_root<W>(squares[t] * (1.0f / (float)rows) + eps);
    for (int64_t i = 0; i < rows; i++) {
        HFS_UNROLL
        for (int t = 0; t < T; t++) {
            const Vec<W> x = (load<W>(out + i * G + t * W) - sum[t]) * squares[t];
            store<W>(out + i * G + t * W, x * gain[i] + shift[i]);
        }
    }
}

}  // namespace HFS_ISA

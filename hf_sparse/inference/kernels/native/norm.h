// LayerNorm with tokens in lanes: every lane is normalised over the rows of its column.
#pragma once
#include "vec.h"

namespace HFS_ISA {

template <int W>
HFS_INLINE Vec<W> square_root(Vec<W> x) {
    Vec<W> r;
    for (int i = 0; i < W; i++) ((float*)&r)[i] = __builtin_sqrtf(((const float*)&x)[i]);
    return r;
}

// out = LayerNorm(out + residual) * gain + shift, over `rows` rows [G]; out and residual are written and read in place.
template <int T, int W>
static void add_norm(float* out, const float* residual, int64_t rows, const float* gain, const float* shift, float eps) {
    constexpr int64_t G = T * W;
    Vec<W> sum[T], squares[T], first[T];
    HFS_UNROLL
    for (int t = 0; t < T; t++) {
        // Sums are taken of differences to the first row: squares of a large common mean would cancel.
        first[t] = load<W>(out + t * W) + load<W>(residual + t * W);
        sum[t] = squares[t] = Vec<W>{};
    }
    for (int64_t i = 0; i < rows; i++) {
        HFS_UNROLL
        for (int t = 0; t < T; t++) {
            const Vec<W> x = load<W>(out + i * G + t * W) + load<W>(residual + i * G + t * W);
            store<W>(out + i * G + t * W, x);
            const Vec<W> centred = x - first[t];
            sum[t] += centred;
            squares[t] += centred * centred;
        }
    }
    Vec<W> scale[T], offset[T];
    HFS_UNROLL
    for (int t = 0; t < T; t++) {
        const Vec<W> mean = sum[t] * (1.0f / (float)rows);
        const Vec<W> spread = squares[t] * (1.0f / (float)rows) - mean * mean;
        scale[t] = 1.0f / square_root<W>((spread > 0.0f ? spread : Vec<W>{}) + eps);
        offset[t] = -(mean + first[t]) * scale[t];
    }
    for (int64_t i = 0; i < rows; i++) {
        HFS_UNROLL
        for (int t = 0; t < T; t++) {
            const Vec<W> x = load<W>(out + i * G + t * W) * scale[t] + offset[t];
            store<W>(out + i * G + t * W, x * gain[i] + shift[i]);
        }
    }
}

}  // namespace HFS_ISA

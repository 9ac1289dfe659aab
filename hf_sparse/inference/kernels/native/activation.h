// Activations on vectors of floats. Errors: exp 2e-7 relative, erf 2e-7 absolute; NaN stays NaN, +inf stays +inf.
#pragma once
#include "hf_sparse_kernels.h"
#include "vec.h"

namespace HFS_ISA {

// exp by splitting x = n ln 2 + r: 2^n from the exponent bits, exp(r) from a polynomial (Cephes expf).
template <int W>
HFS_INLINE Vec<W> exp(Vec<W> x) {
    x = x > 88.0f ? splat<W>(88.0f) : x;
    x = x < -87.0f ? splat<W>(-87.0f) : x;
    const float round = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    Vec<W> shifted = x * 1.44269504f + round;
    Vec<W> n = shifted - round;
    Vec<W> r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Vec<W> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    return p * floats<W>((words<W>(shifted) << 23) + (127u << 23));
}

template <int W>
HFS_INLINE Vec<W> magnitude(Vec<W> x) {
    return floats<W>(words<W>(x) & 0x7fffffffu);
}

template <int W>
HFS_INLINE Vec<W> relu(Vec<W> x) {
    return x < 0.0f ? Vec<W>{} : x;
}

// gelu(x) = relu(x) - |x| / 2 * erfc(|x| / sqrt 2): no cancellation on either side. erfc: Abramowitz and Stegun 7.1.26.
template <int W>
HFS_INLINE Vec<W> gelu(Vec<W> x) {
    Vec<W> a = magnitude<W>(x);
    a = a > 16.0f ? splat<W>(16.0f) : a;
    Vec<W> z = a * 0.70710678f;
    Vec<W> t = 1.0f / (z * 0.3275911f + 1.0f);
    Vec<W> p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    return relu<W>(x) - (a * 0.5f) * (p * t * exp<W>(-(z * z)));
}

// gelu(x) = x (1/2 + x P(x^2)) without exp or division. P is the best polynomial for the error of x^2 P(x^2) on [-c, c]
// with c P(c^2) = 1/2, so that x beyond c, taken as c, gives 0 or x. Largest error 2e-6 with 12 as the degree; 8e-5 with
// 7, for results that become bfloat16.
template <int W, int DEGREE>
HFS_INLINE Vec<W> gelu_polynomial(Vec<W> x) {
    static_assert(DEGREE == 7 || DEGREE == 12, "a fit of this degree");
    constexpr float c = DEGREE == 12 ? 5.2f : 4.2f;
    constexpr float fit12[] = {8.557990918e-04f,  -2.502587054e-03f, 2.861268556e-03f, -3.508310842e-03f,
                               7.550514850e-03f,  -1.310121374e-02f, 1.839033745e-02f, -2.459415357e-02f,
                               3.190665217e-02f,  -3.994119613e-02f, 5.003020964e-02f, -6.774340628e-02f,
                               1.359499320e-01f};
    constexpr float fit7[] = {-3.743433771e-03f, 1.117493151e-02f, -1.646812212e-02f, 2.377860717e-02f,
                              -3.792593028e-02f, 5.594848845e-02f, -8.157148821e-02f, 1.678545663e-01f};
    const float* fit = DEGREE == 12 ? fit12 : fit7;
    Vec<W> inside = x > c ? splat<W>(c) : x;
    inside = inside < -c ? splat<W>(-c) : inside;
    const Vec<W> t = inside * inside * (2.0f / (c * c)) - 1.0f;
    Vec<W> p = splat<W>(fit[0]);
    HFS_UNROLL
    for (int i = 1; i <= DEGREE; i++) p = p * t + fit[i];
    return x * (inside * p + 0.5f);
}

template <int W>
HFS_INLINE Vec<W> silu(Vec<W> x) {
    return x / (exp<W>(-x) + 1.0f);
}

// 0.5 x (1 + tanh u) = x / (1 + exp(-2u)).
template <int W>
HFS_INLINE Vec<W> gelu_tanh(Vec<W> x) {
    Vec<W> u = x * (x * x * 0.044715f + 1.0f) * 1.5957691216f;
    return x / (exp<W>(-u) + 1.0f);
}

template <int W>
HFS_INLINE Vec<W> activate(Vec<W> x, int activation) {
    switch (activation) {
        case HFS_GELU: return gelu<W>(x);
        case HFS_GELU_TANH: return gelu_tanh<W>(x);
        case HFS_SILU: return silu<W>(x);
        case HFS_RELU: return relu<W>(x);
        default: return x;
    }
}

}  // namespace HFS_ISA

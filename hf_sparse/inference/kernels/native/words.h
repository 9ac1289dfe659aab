// Lane buffers of a group of tokens, and the words that kernels of bfloat16 pairs read instead. G: tokens of the group.
#pragma once
#include "kinds.h"

namespace HFS_ISA {

// What a linear reads: one of these, depending on how its weight is stored. Null where no weight asks for it.
struct Lanes {
    float* singles = nullptr;        // [features][G]
    uint32_t* neighbours = nullptr;  // [features / 2][G], two features in a word
    uint32_t* couples = nullptr;     // [features][G], a feature in both halves of its word
};

#if defined(HFS_PAIRS)

// bfloat16 bits of floats in the lower halves of words, rounded to nearest even; NaN stays NaN.
template <int W>
HFS_INLINE Words<W> rounded(Vec<W> v) {
    const Words<W> u = words<W>(v);
    return v != v ? Words<W>{} + 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

// Word i holds the bfloat16 of lo[i] in its lower half and of hi[i] in its upper half.
template <int W>
HFS_INLINE Words<W> pair_words(Vec<W> lo, Vec<W> hi) {
#if defined(__AVX512BF16__)
    if constexpr (W == 16) {
        const __m512i interleave =
            _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                             19, 3, 18, 2, 17, 1, 16, 0);
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)hi, (__m512)lo);
        return (Words<16>)_mm512_permutexvar_epi16(interleave, both);
    }
#endif
    return rounded<W>(lo) | rounded<W>(hi) << 16;
}

// Convert `count` rows [G] of floats, an even number, into the words that are asked for; the first row is feature `row`.
template <int W>
HFS_INLINE void to_words(const float* from, int64_t row, int64_t count, int64_t group, const Lanes& to) {
    for (int64_t i = 0; i < count; i += 2) {
        for (int64_t g = 0; g < group; g += W) {
            const Vec<W> lo = load<W>(from + i * group + g), hi = load<W>(from + (i + 1) * group + g);
            if (to.neighbours) store<W>(to.neighbours + (row + i) / 2 * group + g, pair_words<W>(lo, hi));
            if (to.couples) {
                store<W>(to.couples + (row + i) * group + g, pair_words<W>(lo, lo));
                store<W>(to.couples + (row + i + 1) * group + g, pair_words<W>(hi, hi));
            }
        }
    }
}

#endif  // HFS_PAIRS

}  // namespace HFS_ISA

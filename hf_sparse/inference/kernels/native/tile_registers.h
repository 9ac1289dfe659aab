// The instructions on matrix tiles. Not the intrinsics of the compiler: those of GCC take register numbers from macros
// alone, and say nothing of the memory that they read and write.
#pragma once
#include "vec.h"

namespace HFS_ISA {

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

HFS_INLINE void tile_shape(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes)); }
HFS_INLINE void tile_release() { __asm__ volatile("tilerelease"); }
template <int R>
HFS_INLINE void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(R));
}
template <int R>
HFS_INLINE void tile_load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(R) : "memory");
}
template <int R>
HFS_INLINE void tile_store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(R) : "memory");
}
// SUM += LEFT * RIGHT.
template <int SUM, int LEFT, int RIGHT>
HFS_INLINE void tile_dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(LEFT), "i"(RIGHT));
}

}  // namespace HFS_ISA

// Matrix tiles in plain C++, for machines and compilers without: what the instructions do as their manual describes it,
// and an end to the program where it promises a fault.
#pragma once
#include <stdlib.h>
#include <string.h>

#include "../vec.h"

namespace HFS_ISA {

struct TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

struct EmulatedTiles {
    bool shaped = false;
    TileShapes shapes;
    unsigned char data[8][16][64];
};
static thread_local EmulatedTiles emulated;

static inline void tile_demand(bool ok) {
    if (!ok) abort();
}
static inline void tile_shape(const TileShapes& shapes) {
    static_assert(sizeof shapes == 64, "what ldtilecfg reads");
    tile_demand(shapes.palette == 1);
    for (int i = 0; i < 8; i++) tile_demand(shapes.rows[i] >= 1 && shapes.rows[i] <= 16 && shapes.row_bytes[i] <= 64);
    emulated.shaped = true;
    emulated.shapes = shapes;
    memset(emulated.data, 0, sizeof emulated.data);
}
static inline void tile_release() { emulated.shaped = false; }
template <int R>
static inline void tile_zero() {
    tile_demand(emulated.shaped);
    memset(emulated.data[R], 0, sizeof emulated.data[R]);
}
template <int R>
static inline void tile_load(const void* from, int64_t stride) {
    tile_zero<R>();
    for (int r = 0; r < emulated.shapes.rows[R]; r++) {
        memcpy(emulated.data[R][r], (const char*)from + r * stride, emulated.shapes.row_bytes[R]);
    }
}
template <int R>
static inline void tile_store(void* to, int64_t stride) {
    tile_demand(emulated.shaped);
    for (int r = 0; r < emulated.shapes.rows[R]; r++) {
        memcpy((char*)to + r * stride, emulated.data[R][r], emulated.shapes.row_bytes[R]);
    }
}
template <int SUM, int LEFT, int RIGHT>
static inline void tile_dot() {
    const TileShapes& shapes = emulated.shapes;
    tile_demand(emulated.shaped && shapes.rows[LEFT] == shapes.rows[SUM] &&
                shapes.row_bytes[LEFT] == 4 * shapes.rows[RIGHT] && shapes.row_bytes[RIGHT] == shapes.row_bytes[SUM]);
    const auto half = [](int tile, int row, int place) {
        bf16 h;
        memcpy(&h, emulated.data[tile][row] + 2 * place, sizeof h);
        return widen(h);
    };
    for (int m = 0; m < shapes.rows[SUM]; m++) {
        for (int n = 0; n < shapes.row_bytes[SUM] / 4; n++) {
            float sum;
            memcpy(&sum, emulated.data[SUM][m] + 4 * n, sizeof sum);
            for (int k = 0; k < shapes.rows[RIGHT]; k++) {
                sum += half(LEFT, m, 2 * k) * half(RIGHT, k, 2 * n);
                sum += half(LEFT, m, 2 * k + 1) * half(RIGHT, k, 2 * n + 1);
            }
            memcpy(emulated.data[SUM][m] + 4 * n, &sum, sizeof sum);
        }
    }
}

}  // namespace HFS_ISA

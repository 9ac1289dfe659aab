// Matrix tiles (AMX): a tile of 16 pairs x 16 tokens of bfloat16 meets a tile of 16 rows x 16 pairs of weights.
//
// Activations of a group of T * 16 tokens are stored as for the lanes. The pairs that a band keeps are copied into tiles of
// their own, one chunk of 16 ahead of the product: what was written just now cannot be loaded as a tile without waiting.
// Every chunk is full: where a band ends within one, its last pair stands again, with weights of zero.
#pragma once
#include <type_traits>

#include "panels.h"
#include "words.h"

#if defined(__AMX_BF16__)
#include "tile_registers.h"
#else
#include "tests/tile_registers.h"
#endif

namespace HFS_ISA {

constexpr int CHUNK = 16;             // pairs in a tile
constexpr int TILE_ROWS = 16;         // rows of weights, and of results, in a tile
constexpr int MAX_TILE_VECTORS = 3;   // vectors of a group: more results than that leave no registers for two tiles of rows

// What a thread keeps from panel to panel of one group.
template <int T>
class Tiles {
  public:
    // Gathered pairs: those of one chunk are written while the last ones are multiplied.
    alignas(64) uint32_t gathered[2][T][CHUNK * 16];
    int turn = 0;                    // which of them comes next
    const int32_t* ready = nullptr;  // the chunk that is there already

    Tiles() = default;
    Tiles(const Tiles&) = delete;
    // The registers belong to whoever uses them in this thread; nobody relies on what they hold between calls.
    ~Tiles() {
        if (rows_) tile_release();
    }
    // Registers 0 to 5 hold results, 6 weights, 7 activations. A panel of more than 16 rows is two tiles, which overlap if
    // the number is odd.
    void shape(int64_t panel_rows) {
        const int rows = (int)(panel_rows > TILE_ROWS ? (panel_rows + 1) / 2 : panel_rows);
        if (rows == rows_) return;
        rows_ = rows;
        TileShapes shapes;
        for (int i = 0; i < 8; i++) {
            shapes.row_bytes[i] = 64;
            shapes.rows[i] = (uint8_t)(i < 7 ? rows : CHUNK);
        }
        tile_shape(shapes);
    }

  private:
    int rows_ = 0;
};

// The chunks of a panel (at most 32 rows of one band).
struct Chunks {
    const int32_t* column;   // [n][CHUNK], or [n][CHUNK][2] for couples
    const uint32_t* values;  // [n][height][CHUNK]
    int64_t n;
    int64_t height;
};

template <typename Kind>
HFS_INLINE Chunks chunks_of(const Panels& panels, int64_t panel) {
    const hfs_weight& w = panels.weight;
    const int64_t band = panel / panels.per_band, start = w.chunk_start[band];
    return {w.chunk_column + start * CHUNK * Kind::COLUMNS,
            (const uint32_t*)w.chunk_values + (start * w.height + panel % panels.per_band * PANEL_ROWS) * CHUNK,
            w.chunk_start[band + 1] - start, w.height};
}

template <typename Kind, int T>
HFS_INLINE void gather_chunk(const typename Kind::Word* x, const int32_t* column, uint32_t* tile) {
    HFS_UNROLL
    for (int i = 0; i < CHUNK; i++) {
        store<16>(tile + i * 16, Kind::template lanes<16, T * 16>(x, column + i * Kind::COLUMNS));
    }
}

// For the results [rows][T * 16] of H tiles of rows: do something with each register and its place in memory.
template <int H, int T, int I = 0, typename Place>
HFS_INLINE void for_results(const Place& place) {
    if constexpr (I < H * T) {
        place(std::integral_constant<int, I / T * 3 + I % T>(), I / T, I % T);
        for_results<H, T, I + 1>(place);
    }
}

// Whether the pairs of a chunk follow each other, as in a dense weight or in wide blocks: they are a tile where they stand.
template <typename Kind>
HFS_INLINE bool stands(const int32_t* column) {
    if (Kind::COLUMNS > 1 || column[CHUNK - 1] != column[0] + CHUNK - 1) return false;
    bool follow = true;
    for (int i = 1; i < CHUNK - 1; i++) follow &= column[i] == column[0] + i;
    return follow;
}

// The tile of activations of vector t: at + t * step, rows `stride` bytes apart.
struct ChunkPlace {
    const uint32_t* at;
    int64_t step, stride;
};

// Vectors t to T of one chunk. Two tiles of weights change places, so that each vector meets both.
template <typename Kind, int H, int T, int t>
HFS_INLINE void multiply_chunk(const typename Kind::Word* x, const ChunkPlace& now, uint32_t* later, const int32_t* ahead,
                               const uint32_t* first, const uint32_t* second) {
    if constexpr (t < T) {
        constexpr int h = H == 2 ? t % 2 : 0;
        if (ahead) gather_chunk<Kind, T>(x + t * 16, ahead, later + t * CHUNK * 16);
        tile_load<7>(now.at + t * now.step, now.stride);
        tile_dot<h * 3 + t, 6, 7>();
        if constexpr (H == 2) {
            tile_load<6>(h ? first : second, 64);
            tile_dot<(1 - h) * 3 + t, 6, 7>();
        }
        multiply_chunk<Kind, H, T, t + 1>(x, now, later, ahead, first, second);
    }
}

template <typename Kind, int H, int T>
static void tiles_rows(Tiles<T>& tiles, const typename Kind::Word* __restrict x, const Chunks& panel, const int32_t* next,
                       const float* bias, int64_t rows, float* __restrict out) {
    constexpr int64_t G = T * 16;
    const int64_t second = H == 2 ? rows / 2 : 0;  // first row of the second tile
    const int32_t* column = panel.column;
    const uint32_t* values = panel.values;
    alignas(64) float start[2 * TILE_ROWS * 16];
    if (bias) {
        for (int64_t r = 0; r < rows; r++) store<16>(start + r * 16, splat<16>(bias[r]));
    }
    if (panel.n && tiles.ready != column && !stands<Kind>(column)) {
        HFS_UNROLL
        for (int t = 0; t < T; t++) gather_chunk<Kind, T>(x + t * 16, column, tiles.gathered[tiles.turn][t]);
    }
    for_results<H, T>([&](auto result, int h, int) __attribute__((always_inline)) {
        if (bias) {
            tile_load<result()>(start + h * second * 16, 64);
        } else {
            tile_zero<result()>();
        }
    });
    for (int64_t j = panel.n; j > 0; j--) {
        ChunkPlace now = {tiles.gathered[tiles.turn][0], CHUNK * 16, 64};
        if (stands<Kind>(column)) now = {(const uint32_t*)x + column[0] * G, 16, G * (int64_t)sizeof(uint32_t)};
        tiles.turn = 1 - tiles.turn;
        column = j > 1 ? column + CHUNK * Kind::COLUMNS : next;
        const int32_t* ahead = column && !stands<Kind>(column) ? column : nullptr;
        tile_load<6>(values, 64);
        multiply_chunk<Kind, H, T, 0>(x, now, tiles.gathered[tiles.turn][0], ahead, values, values + second * CHUNK);
        values += panel.height * CHUNK;
    }
    if (panel.n) tiles.ready = next;
    for_results<H, T>([&](auto result, int h, int t) __attribute__((always_inline)) {
        tile_store<result()>(out + h * second * G + t * 16, G * sizeof(float));
    });
}

// All rows of one panel: the counterpart of lanes_panel. out: [rows][T * 16]. `next` is null, or the first chunk of the panel
// that is computed next, with the same tiles and x: it is gathered ahead.
template <typename Kind, int T>
static void tiles_panel(Tiles<T>& tiles, const typename Kind::Word* x, const Chunks& panel, const int32_t* next,
                        const float* bias, int64_t rows, float* out) {
    static_assert(T <= MAX_TILE_VECTORS, "results are registers 0 to 2 and 3 to 5");
    tiles.shape(rows);
    if (rows <= TILE_ROWS) {
        tiles_rows<Kind, 1>(tiles, x, panel, next, bias, rows, out);
    } else {
        tiles_rows<Kind, 2>(tiles, x, panel, next, bias, rows, out);
    }
}

}  // namespace HFS_ISA

// The steps of an encoder on a chunk of sequences, and the phases in which a team of threads takes them.
#pragma once
#include "encoder_linear.h"
#include "encoder_memory.h"
#include "norm.h"
#if defined(HFS_TILES)
#include "attention_tiles.h"
#endif

namespace HFS_ISA {

// A few sequences, all layers: one thread alone, or a team of them phase by phase. X is the type of x and y.
template <typename X>
struct EncoderChunk : EncoderMemory {
    enum { ATTEND = 1, REST = 2, OUTPUT = 2, NORM = 3, UP = 4, DOWN = 5, LAST_NORM = 6 };

    using EncoderMemory::EncoderMemory;

    int phases() const { return 1 + per_layer * (int)e.layers; }
    int64_t items(int phase) const {
        if (phase == 0) return groups;
        const int step = (phase - 1) % per_layer;
        if (step == 0) return groups * parts;
        if (step == ATTEND) return groups * e.heads;
        if (parts == 1) return groups;
        return step == NORM || step == LAST_NORM ? groups : groups * parts;
    }
    void run(int phase, int64_t item) {
        const bool shared = phase > 0 && items(phase) == groups * parts;
        const int64_t group = phase > 0 && (phase - 1) % per_layer == ATTEND ? item / e.heads
                              : shared                                       ? item / parts
                                                                             : item;
        switch (first_tile(group + 1) - first_tile(group)) {
            case 1: return run_group<1>(phase, group, item);
            case 2: return run_group<2>(phase, group, item);
            default: return run_group<3>(phase, group, item);
        }
    }

    template <int T>
    void run_group(int phase, int64_t group, int64_t item) {
        if (phase == 0) return pack_group<T>(group);
        const int64_t number = (phase - 1) / per_layer;
        const hfs_encoder_layer& layer = e.layer[number];
        const bool last = number + 1 == e.layers;
        const int step = (phase - 1) % per_layer;
        const int64_t part = item % parts;
        if (step == 0) return project<T>(layer, group, part);
        if (step == ATTEND) return attend_group<T>(group, item % e.heads);
        if (parts == 1) {
            float* memory = thread_memory();
            if (!memory) return;
            Lanes between;
            if (!PAIRS) between.singles = memory;
            if (PAIRS && call.neighbours[INNER]) between.neighbours = (uint32_t*)memory;
            if (PAIRS && call.couples[INNER]) {
                between.couples = (uint32_t*)memory + (call.neighbours[INNER] ? (inner + 1) / 2 * T * W : 0);
            }
            output<T>(layer, group, 0, 1);
            norm<T>(layer, group, 0, false);
            up<T>(layer, group, between, 0, 1);
            down<T>(layer, group, between, 0, 1);
            return norm<T>(layer, group, 1, last);
        }
        switch (step) {
            case OUTPUT: return output<T>(layer, group, part, parts);
            case NORM: return norm<T>(layer, group, 0, false);
            case UP: return up<T>(layer, group, of(ff, group, inner), part, parts);
            case DOWN: return down<T>(layer, group, of(ff, group, inner), part, parts);
            default: return norm<T>(layer, group, 1, last);
        }
    }

    template <int T>
    void pack_group(int64_t group) {
        float* lanes = of(hidden.singles, group, e.hidden);
        for (int t = 0; t < T; t++) {
            const int64_t tile = first_tile(group) + t, head = tile % call.tiles * W;
            const int64_t left = call.length - head;
            const X* x = (const X*)call.x + ((first_sequence + tile / call.tiles) * call.length + head) * e.hidden;
            Single<X>::template pack<W>(x, e.hidden, (int)(left < W ? left : W), 0, e.hidden, lanes + t * W, T * W);
        }
#if defined(HFS_PAIRS)
        to_words<W>(lanes, 0, e.hidden, T * W, of(hidden, group, e.hidden));
#endif
        // A unit of keys that a sequence fills by half is finished with values of zero.
        for (int64_t tile = first_tile(group); tiled && call.tiles % 2 && tile < first_tile(group + 1); tile++) {
            if (tile % call.tiles + 1 < call.tiles) continue;
            bf16* values = (bf16*)value + tile / call.tiles * width * value_stride + call.tiles * W;
            for (int64_t row = 0; row < width; row++) __builtin_memset(values + row * value_stride, 0, W * sizeof(bf16));
        }
    }

    // Queries, keys and values of a group.
    template <int T>
    void project(const hfs_encoder_layer& layer, int64_t group, int64_t part) {
        const Lanes in = of(hidden, group, e.hidden);
#if defined(HFS_TILES)
        if (tiled) {
            Lanes words;
            words.neighbours = of(query, group, width / 2);
            linear_lanes<T, W>(*layer.weight[0], layer.bias[0], in, part, parts, nullptr,
                      [&](int64_t row, int64_t rows, const float* strip) { to_words<W>(strip, row, rows, T * W, words); });
            project_keys<T>(layer, in, group, part);
            return project_values<T>(layer, in, group, part);
        }
#endif
        for (int i = 0; i < 3; i++) {
            Word* out = of(i == 0 ? query : i == 1 ? key : value, group, PAIRS ? width / 2 : width);
#if defined(HFS_PAIRS)
            if (i < 2) {
                Lanes words;
                words.neighbours = out;
                linear_lanes<T, W>(*layer.weight[i], layer.bias[i], in, part, parts, nullptr,
                          [&](int64_t row, int64_t rows, const float* strip) { to_words<W>(strip, row, rows, T * W, words); });
            } else {
                // Tokens lie side by side: their bfloat16 are the pairs that attention multiplies.
                bf16* halves = (bf16*)out;
                linear_lanes<T, W>(*layer.weight[i], layer.bias[i], in, part, parts, nullptr,
                          [&](int64_t row, int64_t rows, const float* strip) {
                              for (int64_t k = 0; k < rows * T * W; k += W) {
                                  write<W>(halves + row * T * W + k, load<W>(strip + k));
                              }
                          });
            }
#else
            linear_lanes<T, W>(*layer.weight[i], layer.bias[i], in, part, parts, out, Nothing());
#endif
        }
    }

#if defined(HFS_TILES)
    // Keys as [token][feature]: transposed in squares where one thread has all rows, else word by word.
    template <int T>
    void project_keys(const hfs_encoder_layer& layer, const Lanes& in, int64_t group, int64_t part) {
        constexpr int64_t G = T * W;
        const int64_t stride = width / 2;
        uint32_t* out = key + first_tile(group) * W * stride;
        float* lanes = parts == 1 ? thread_memory() : nullptr;
        if (parts == 1 && !lanes) return;
        linear_lanes<T, W>(*layer.weight[1], layer.bias[1], in, part, parts, lanes,
                  [&](int64_t row, int64_t rows, const float* strip) {
                      for (int64_t i = 0; i < rows; i += 2) {
                          for (int64_t g = 0; g < G; g += W) {
                              uint32_t pair[W];
                              store<W>(pair, pair_words<W>(load<W>(strip + i * G + g), load<W>(strip + (i + 1) * G + g)));
                              for (int j = 0; j < W; j++) out[(g + j) * stride + (row + i) / 2] = pair[j];
                          }
                      }
                  });
        for (int64_t f = 0; lanes && f < width; f += 2 * W) {
            for (int64_t g = 0; g < G; g += W) {
                const float* from = lanes + f * G + g;
                Vec<W> square[W];
                HFS_UNROLL
                for (int i = 0; i < W; i++) {
                    square[i] = floats<W>(pair_words<W>(load<W>(from + 2 * i * G), load<W>(from + (2 * i + 1) * G)));
                }
                transpose<W>(square);
                HFS_UNROLL
                for (int i = 0; i < W; i++) store<W>(out + (g + i) * stride + f / 2, words<W>(square[i]));
            }
        }
    }

    // Values as [sequence][feature][token].
    template <int T>
    void project_values(const hfs_encoder_layer& layer, const Lanes& in, int64_t group, int64_t part) {
        bf16* out[T];
        for (int t = 0; t < T; t++) {
            const int64_t tile = first_tile(group) + t;
            out[t] = (bf16*)value + tile / call.tiles * width * value_stride + tile % call.tiles * W;
        }
        linear_lanes<T, W>(*layer.weight[2], layer.bias[2], in, part, parts, nullptr,
                  [&](int64_t row, int64_t rows, const float* strip) {
                      for (int64_t i = 0; i < rows; i++) {
                          HFS_UNROLL
                          for (int t = 0; t < T; t++) {
                              write<W>(out[t] + (row + i) * value_stride, load<W>(strip + (i * T + t) * W));
                          }
                      }
                  });
    }
#endif

    // One head of a group, a run of tiles of one sequence after the other.
    template <int T>
    void attend_group(int64_t group, int64_t head) {
        constexpr int64_t G = T * W;
        float* memory = thread_memory();
        if (!memory) return;
        float* scores = memory;
        float* mixed = scores + KEY_TILES * W * G;
        Tile<Word>* keys = (Tile<Word>*)(((uintptr_t)(mixed + e.head_size * G) + 15) / 16 * 16);
        Tile<Word>* values = keys + call.tiles;
        const int64_t size = PAIRS ? e.head_size / 2 : e.head_size, features = PAIRS ? width / 2 : width;
        const int64_t last = first_tile(group + 1);
#if defined(HFS_TILES)
        Tiles<1> registers;
        if (tiled) registers.shape(TILE_ROWS);
#endif
        for (int64_t tile = first_tile(group); tile < last;) {
            const int64_t sequence = tile / call.tiles, begin = sequence * call.tiles;
            const int64_t end = begin + call.tiles < last ? begin + call.tiles : last;
            const int64_t offset = (tile - first_tile(group)) * W, row = first_sequence + sequence;
            const int64_t padded = call.tiles * W, square = (call.length + 15) / 16 * 16;
            const float* bias = call.bias ? call.bias + head * square * square + (tile - begin) * W : nullptr;
            const Word* queries = of(query, group, features) + head * size * G + offset;
            const int32_t* seen = call.seen + row * call.tiles;
            const float* mask = call.mask + row * padded;
            float* out = PAIRS ? mixed + offset : of(attention.singles, group, width) + head * e.head_size * G + offset;
            const int64_t run = end - tile;
            tile = end;
#if defined(HFS_TILES)
            if (tiled) {
                const TileHead job = {queries, G, e.head_size, key + begin * W * (width / 2) + head * size, width / 2,
                                      (const bf16*)value + (sequence * width + head * e.head_size) * value_stride,
                                      value_stride, call.tiles, seen, call.counts[row], mask, bias, square, e.scale};
                switch (run) {
                    case 1: attend_tiles<1>(job, scores, out, G); break;
                    case 2: attend_tiles<2>(job, scores, out, G); break;
                    default: attend_tiles<3>(job, scores, out, G); break;
                }
                continue;
            }
#endif
            int64_t g = group_of(begin);
            for (int64_t i = 0; i < call.tiles; i++) {
                while (first_tile(g + 1) <= begin + i) g++;
                const int64_t tokens = (first_tile(g + 1) - first_tile(g)) * W;
                const int64_t at = (begin + i - first_tile(g)) * W;
                keys[i] = {of(key, g, features) + head * size * tokens + at, tokens};
                // Words of values hold two tokens for pairs.
                const int64_t step = PAIRS ? tokens / 2 : tokens;
                values[i] = {of(value, g, features) + head * e.head_size * step + (PAIRS ? at / 2 : at), step};
            }
            const Head<Word> job = {{queries, G}, size, e.head_size, keys, values, seen, call.counts[row], mask, bias, square,
                                    e.scale};
            switch (run) {
                case 1: attend<Scores, 1, W>(job, scores, out, G); break;
                case 2: attend<Scores, 2, W>(job, scores, out, G); break;
                default: attend<Scores, 3, W>(job, scores, out, G); break;
            }
        }
#if defined(HFS_PAIRS)
        to_words<W>(mixed, head * e.head_size, e.head_size, G, of(attention, group, width));
#endif
    }

    template <int T>
    void output(const hfs_encoder_layer& layer, int64_t group, int64_t part, int64_t of_parts) {
        linear_lanes<T, W>(*layer.weight[3], layer.bias[3], of(attention, group, width), part, of_parts,
                  of(normed.singles, group, e.hidden), Nothing());
    }
    template <int T>
    void up(const hfs_encoder_layer& layer, int64_t group, const Lanes& out, int64_t part, int64_t of_parts) {
        linear_lanes<T, W>(*layer.weight[4], layer.bias[4], of(normed, group, e.hidden), part, of_parts, nullptr,
                  [&](int64_t row, int64_t rows, float* strip) {
                      activate_results<W, PAIRS>(strip, rows * T * W, e.activation);
#if defined(HFS_PAIRS)
                      to_words<W>(strip, row, rows, T * W, out);
#else
                      __builtin_memcpy(out.singles + row * T * W, strip, (size_t)(rows * T * W) * sizeof(float));
#endif
                  });
    }
    template <int T>
    void down(const hfs_encoder_layer& layer, int64_t group, const Lanes& in, int64_t part, int64_t of_parts) {
        // The residual is in `normed`; the sum grows in `hidden`, which this layer has read.
        linear_lanes<T, W>(*layer.weight[5], layer.bias[5], in, part, of_parts, of(hidden.singles, group, e.hidden), Nothing());
    }

    // normed = LayerNorm(normed + hidden) after attention; hidden = LayerNorm(hidden + normed) at the end of a layer.
    template <int T>
    void norm(const hfs_encoder_layer& layer, int64_t group, int which, bool last) {
        const Lanes h = of(hidden, group, e.hidden), n = of(normed, group, e.hidden);
        const Lanes& out = which ? h : n;
        add_norm<T, W>(out.singles, (which ? n : h).singles, e.hidden, layer.norm[2 * which], layer.norm[2 * which + 1],
                       e.eps[which]);
        if (last) return unpack_group<T>(group);
#if defined(HFS_PAIRS)
        to_words<W>(out.singles, 0, e.hidden, T * W, out);
#endif
    }

    template <int T>
    void unpack_group(int64_t group) {
        const float* lanes = of(hidden.singles, group, e.hidden);
        for (int t = 0; t < T; t++) {
            const int64_t tile = first_tile(group) + t, head = tile % call.tiles * W;
            const int64_t left = call.length - head;
            X* y = (X*)call.y + ((first_sequence + tile / call.tiles) * call.length + head) * e.hidden;
            unpack_tile<W>(lanes + t * W, T * W, e.hidden, left < W ? left : W, y, e.hidden);
        }
    }
};

}  // namespace HFS_ISA

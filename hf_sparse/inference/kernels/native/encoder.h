// A whole encoder of post-LayerNorm transformer layers (BERT and its relatives). Activations stay with tokens in lanes from
// the first layer to the last: tiles of W tokens of one sequence, T tiles to a group, [feature][T * W] in memory.
#pragma once
#include "attention.h"
#include "lanes.h"
#include "norm.h"
#include "panels.h"
#include "team.h"

namespace HFS_ISA {

#if defined(HFS_PAIRS)
typedef Neighbours Scores;  // what attention multiplies
#else
typedef Single<float> Scores;
#endif
constexpr bool PAIRS = sizeof(Scores::X) == 2;
constexpr int MOST_TILES = 3;  // per group

// What the sequences of a call share.
struct EncoderCall {
    const hfs_encoder& encoder;
    const void* x;
    void* y;
    int64_t length;         // tokens of a sequence
    int64_t tiles;          // of a sequence
    const float* mask;      // [batch][tiles * W], divided by scale
    const int32_t* seen;    // [batch][tiles], key tiles that are not masked as a whole
    const int32_t* counts;  // [batch], how many
    const float* bias;      // [heads][keys][queries], both padded to sixteens, divided by scale; or null
    bool neighbours[4], couples[4];  // which words the inputs of the linears need: hidden, attention, normed, inner
};

// A few sequences, all layers: one thread alone, or a team of them phase by phase.
template <typename X>
struct EncoderChunk {
    static constexpr int W = LANES;
    typedef Scores::Word Word;
    enum { HIDDEN = 0, ATTENTION = 1, NORMED = 2, INNER = 3 };
    enum { ATTEND = 1, REST = 2, OUTPUT = 2, NORM = 3, UP = 4, DOWN = 5, LAST_NORM = 6 };

    const EncoderCall& call;
    const hfs_encoder& e;
    const int64_t first_sequence, tiles, width, inner;
    const int threads;
    int64_t groups, parts;
    int per_layer;
    int failed = 0;
    // [features] lane buffers of all groups, one behind the other
    Lanes hidden, attention, normed, ff;
    float *value32, *summed;
    Word *query, *key, *value;

    EncoderChunk(const EncoderCall& c, int64_t first, int64_t sequences, int team)
        : call(c), e(c.encoder), first_sequence(first), tiles(sequences * c.tiles), width(e.heads * e.head_size),
          inner(e.intermediate), threads(team) {
        groups = (tiles + MOST_TILES - 1) / MOST_TILES;
        // A multiple of the team, if there are tiles enough; else rows are shared out, too.
        if (threads > 1) groups = (groups + threads - 1) / threads * threads;
        if (groups > tiles) groups = tiles;
        parts = groups >= threads ? 1 : (2 * threads + groups - 1) / groups;
        per_layer = parts > 1 ? 7 : 3;
    }

    int64_t tokens() const { return tiles * W; }
    int64_t first_tile(int64_t group) const { return tiles * group / groups; }
    int64_t group_of(int64_t tile) const {
        int64_t group = tile * groups / tiles;
        while (first_tile(group + 1) <= tile) group++;
        return group;
    }

    // Set the buffers up in shared memory, and give how many words (of four bytes) they take.
    int64_t lay_out(float* memory) {
        int64_t used = 0;
        const auto take = [&](int64_t features) {
            float* here = memory ? memory + used : nullptr;
            used += (features * tokens() + 15) / 16 * 16;
            return here;
        };
        const auto take_words = [&](Lanes& lanes, int input, int64_t features) {
            if (PAIRS && call.neighbours[input]) lanes.neighbours = (uint32_t*)take((features + 1) / 2);
            if (PAIRS && call.couples[input]) lanes.couples = (uint32_t*)take(features);
        };
        hidden.singles = take(e.hidden);
        take_words(hidden, HIDDEN, e.hidden);
        query = (Word*)take(PAIRS ? width / 2 : width);
        key = (Word*)take(PAIRS ? width / 2 : width);
        value = (Word*)take(PAIRS ? width / 2 : width);
        if (!PAIRS) attention.singles = take(width);
        take_words(attention, ATTENTION, width);
        normed.singles = take(e.hidden);
        take_words(normed, NORMED, e.hidden);
        if (parts > 1) {
            if (!PAIRS) ff.singles = take(inner);
            take_words(ff, INNER, inner);
        }
        return used;
    }
    // The same for one group in memory of one thread: what is between the two linears of the feed-forward part.
    int64_t private_words() const {
        const int64_t most = MOST_TILES * W;
        const int64_t inner_words = (!PAIRS ? inner : 0) + (call.neighbours[INNER] ? (inner + 1) / 2 : 0) +
                                    (call.couples[INNER] ? inner : 0);
        return most * (parts > 1 ? 0 : inner_words) + KEY_TILES * W * most + e.head_size * most +
               2 * call.tiles * (int64_t)(sizeof(Tile<Word>) / 4) + 64;
    }

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

    // A group's part of a buffer.
    template <typename P>
    P* of(P* buffer, int64_t group, int64_t features) const {
        return buffer ? buffer + first_tile(group) * W * features : nullptr;
    }
    Lanes of(const Lanes& lanes, int64_t group, int64_t features) const {
        return {of(lanes.singles, group, features), of(lanes.neighbours, group, (features + 1) / 2),
                of(lanes.couples, group, features)};
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

    float* thread_memory() {
        float* memory = hfs_scratch(0, (size_t)private_words());
        if (!memory) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return memory;
    }

    // Panels [count * part / parts, ...) of a weight. finish(row, rows, strip) is given [rows][T * W] results, unless
    // `direct` says where all rows of them belong.
    template <int T, typename Finish>
    static void linear(const hfs_weight& w, const float* bias, const Lanes& in, int64_t part, int64_t parts,
                       float* direct, const Finish& finish) {
        const Panels panels(w);
        alignas(64) float strip[PANEL_ROWS * T * W];
        for (int64_t i = panels.count * part / parts; i < panels.count * (part + 1) / parts; i++) {
            const int64_t row = panels.row(i), rows = panels.rows(i), b = i / panels.per_band;
            const int64_t start = w.band_start[b], inside = row - b * w.height;
            const Band band = {w.column + start * (w.kind == HFS_COUPLES ? 2 : 1), w.band_start[b + 1] - start, w.height};
            const void* values = (const uint32_t*)w.values + start * w.height + inside;
            const float* shift = bias ? bias + row : nullptr;
            float* out = direct ? direct + row * T * W : strip;
#if defined(HFS_PAIRS)
            if (w.kind == HFS_NEIGHBOURS) {
                lanes_panel<Neighbours, T, W>(in.neighbours, band, (const uint32_t*)values, shift, rows, out);
            } else {
                lanes_panel<Couples, T, W>(in.couples, band, (const uint32_t*)values, shift, rows, out);
            }
#else
            lanes_panel<Single<float>, T, W>(in.singles, band, (const float*)values, shift, rows, out);
#endif
            if (!direct) finish(row, rows, strip);
        }
    }
    struct Nothing {
        void operator()(int64_t, int64_t, float*) const {}
    };

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
    }

    // Queries, keys and values of a group.
    template <int T>
    void project(const hfs_encoder_layer& layer, int64_t group, int64_t part) {
        const Lanes in = of(hidden, group, e.hidden);
        for (int i = 0; i < 3; i++) {
            Word* out = of(i == 0 ? query : i == 1 ? key : value, group, PAIRS ? width / 2 : width);
#if defined(HFS_PAIRS)
            if (i < 2) {
                Lanes words;
                words.neighbours = out;
                linear<T>(*layer.weight[i], layer.bias[i], in, part, parts, nullptr,
                          [&](int64_t row, int64_t rows, const float* strip) { to_words<W>(strip, row, rows, T * W, words); });
            } else {
                // Tokens lie side by side: their bfloat16 are the pairs that attention multiplies.
                bf16* halves = (bf16*)out;
                linear<T>(*layer.weight[i], layer.bias[i], in, part, parts, nullptr,
                          [&](int64_t row, int64_t rows, const float* strip) {
                              for (int64_t k = 0; k < rows * T * W; k += W) {
                                  write<W>(halves + row * T * W + k, load<W>(strip + k));
                              }
                          });
            }
#else
            linear<T>(*layer.weight[i], layer.bias[i], in, part, parts, out, Nothing());
#endif
        }
    }

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
        for (int64_t tile = first_tile(group); tile < last;) {
            const int64_t sequence = tile / call.tiles, begin = sequence * call.tiles;
            const int64_t end = begin + call.tiles < last ? begin + call.tiles : last;
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
            const int64_t offset = (tile - first_tile(group)) * W, row = first_sequence + sequence;
            const int64_t padded = call.tiles * W, square = (call.length + 15) / 16 * 16;
            const Head<Word> job = {{of(query, group, features) + head * size * G + offset, G},
                                    size,
                                    e.head_size,
                                    keys,
                                    values,
                                    call.seen + row * call.tiles,
                                    call.counts[row],
                                    call.mask + row * padded,
                                    call.bias ? call.bias + head * square * square + (tile - begin) * W : nullptr,
                                    square,
                                    e.scale};
            float* out = PAIRS ? mixed + offset : of(attention.singles, group, width) + head * e.head_size * G + offset;
            switch (end - tile) {
                case 1: attend<Scores, 1, W>(job, scores, out, G); break;
                case 2: attend<Scores, 2, W>(job, scores, out, G); break;
                default: attend<Scores, 3, W>(job, scores, out, G); break;
            }
            tile = end;
        }
#if defined(HFS_PAIRS)
        to_words<W>(mixed, head * e.head_size, e.head_size, G, of(attention, group, width));
#endif
    }

    template <int T>
    void output(const hfs_encoder_layer& layer, int64_t group, int64_t part, int64_t of_parts) {
        linear<T>(*layer.weight[3], layer.bias[3], of(attention, group, width), part, of_parts,
                  of(normed.singles, group, e.hidden), Nothing());
    }
    void activate_rows(float* strip, int64_t size) const {
        if (e.activation != HFS_GELU) return activate_strip<W>(strip, size, e.activation);
        for (int64_t i = 0; i < size; i += W) {
            store<W>(strip + i, gelu_polynomial<W, PAIRS ? 8 : 12>(load<W>(strip + i)));
        }
    }

    template <int T>
    void up(const hfs_encoder_layer& layer, int64_t group, const Lanes& out, int64_t part, int64_t of_parts) {
        linear<T>(*layer.weight[4], layer.bias[4], of(normed, group, e.hidden), part, of_parts, nullptr,
                  [&](int64_t row, int64_t rows, float* strip) {
                      activate_rows(strip, rows * T * W);
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
        linear<T>(*layer.weight[5], layer.bias[5], in, part, of_parts, of(hidden.singles, group, e.hidden), Nothing());
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

// Tokens of a chunk: enough to keep the weights of a layer busy, few enough for activations to stay in the cache.
constexpr int64_t CHUNK_TOKENS = 128;

template <typename X>
static int run_chunk(const EncoderCall& call, int64_t first, int64_t sequences, int threads) {
    EncoderChunk<X> chunk(call, first, sequences, threads);
    float* memory = hfs_scratch(1, (size_t)chunk.lay_out(nullptr));
    if (!memory) return HFS_NO_MEMORY;
    chunk.lay_out(memory);
    run_phases(chunk.phases(), threads, chunk);
    return chunk.failed ? HFS_NO_MEMORY : HFS_OK;
}

// Copy the mask to whole tiles, divided by scale, and list the key tiles that anybody sees. False if a sequence has none.
static bool read_mask(const hfs_encoder& e, const float* mask, int64_t batch, int64_t length, int64_t tiles, float* out,
                      int32_t* seen, int32_t* counts) {
    bool ok = true;
    for (int64_t b = 0; b < batch; b++) {
        counts[b] = 0;
        for (int64_t t = 0; t < tiles; t++) {
            bool any = false;
            for (int64_t i = t * LANES; i < (t + 1) * LANES; i++) {
                float value = i < length ? (mask ? mask[b * length + i] / e.scale : 0.0f) : MASKED;
                value = value < MASKED ? MASKED : value;
                out[(b * tiles) * LANES + i] = value;
                any |= !(value <= MASKED);
            }
            if (any) seen[b * tiles + counts[b]++] = (int32_t)t;
        }
        ok &= counts[b] > 0;
    }
    return ok;
}

template <typename X>
static int run_encoder(const hfs_encoder& e, const hfs_encoder_call& given) {
    const int64_t tiles = (given.length + LANES - 1) / LANES, batch = given.batch;
    float* memory = hfs_scratch(2, (size_t)(batch * tiles * (LANES + 1) + batch));
    if (!memory) return HFS_NO_MEMORY;
    int32_t* seen = (int32_t*)(memory + batch * tiles * LANES);
    int32_t* counts = seen + batch * tiles;
    if (!read_mask(e, given.mask, batch, given.length, tiles, memory, seen, counts)) return HFS_ALL_MASKED;
    EncoderCall call = {e, given.x, given.y, given.length, tiles, memory, seen, counts, given.bias, {}, {}};
    const int inputs[6] = {0, 0, 0, 1, 2, 3};
    for (int64_t l = 0; l < e.layers; l++) {
        for (int i = 0; i < 6; i++) {
            const bool couples = e.layer[l].weight[i]->kind == HFS_COUPLES;
            (couples ? call.couples : call.neighbours)[inputs[i]] = true;
        }
    }
    // A chunk per thread at a time, if there are sequences for all; otherwise the threads share one chunk.
    const int64_t per_chunk = (CHUNK_TOKENS + tiles * LANES - 1) / (tiles * LANES);
    const int64_t chunks = (batch + per_chunk - 1) / per_chunk;
    int failed = HFS_OK;
    if (given.threads > 1 && chunks >= given.threads) {
        parallel_for(chunks, given.threads, [&](int64_t i) {
            const int64_t first = batch * i / chunks;
            const int status = run_chunk<X>(call, first, batch * (i + 1) / chunks - first, 1);
            if (status) __atomic_store_n(&failed, status, __ATOMIC_RELAXED);
        });
        return failed;
    }
    for (int64_t i = 0; i < chunks && !failed; i++) {
        const int64_t first = batch * i / chunks;
        failed = run_chunk<X>(call, first, batch * (i + 1) / chunks - first, given.threads);
    }
    return failed;
}

}  // namespace HFS_ISA

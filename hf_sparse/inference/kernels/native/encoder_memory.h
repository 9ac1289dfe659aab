// What an encoder keeps in memory for a few sequences: lane buffers of groups of tokens, and where each group lies.
#pragma once
#include "attention.h"
#include "parallel.h"

namespace HFS_ISA {

#if defined(HFS_PAIRS)
typedef Neighbours Scores;  // what attention multiplies
#else
typedef Single<float> Scores;
#endif
constexpr bool PAIRS = sizeof(Scores::X) == 2;
#if defined(HFS_TILES)
constexpr bool TILED = true;
#else
constexpr bool TILED = false;
#endif
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

// The buffers of a chunk of sequences: [features][T * W] for each group, one group behind the other.
struct EncoderMemory {
    static constexpr int W = LANES;
    typedef Scores::Word Word;
    enum { HIDDEN = 0, ATTENTION = 1, NORMED = 2, INNER = 3 };

    const EncoderCall& call;
    const hfs_encoder& e;
    const int64_t first_sequence, sequences, tiles, width, inner;
    const int threads;
    const bool tiled;  // whether attention is by matrix tiles, which take the features of a head by 32
    const int64_t value_stride;
    int64_t groups, parts;
    int per_layer;
    int failed = 0;
    Lanes hidden, attention, normed, ff;
    Word *query, *key, *value;
    int32_t* claims;  // of a team

    EncoderMemory(const EncoderCall& c, int64_t first, int64_t count, int team)
        : call(c), e(c.encoder), first_sequence(first), sequences(count), tiles(count * c.tiles),
          width(e.heads * e.head_size), inner(e.intermediate), threads(team), tiled(TILED && e.head_size % 32 == 0),
          value_stride((c.tiles + 1) / 2 * 2 * W) {
        groups = (tiles + MOST_TILES - 1) / MOST_TILES;
        // A multiple of the team, if there are tiles enough for groups of two; else rows are shared out, too.
        if (threads > 1) groups = (groups + threads - 1) / threads * threads;
        if (threads > 1 && groups > tiles / 2) groups = tiles > 1 ? tiles / 2 : 1;
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
        const auto take_values = [&] {
            float* here = memory ? memory + used : nullptr;
            used += sequences * width * value_stride / 2;
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
        value = (Word*)(tiled ? take_values() : take(PAIRS ? width / 2 : width));
        if (!PAIRS) attention.singles = take(width);
        take_words(attention, ATTENTION, width);
        normed.singles = take(e.hidden);
        take_words(normed, NORMED, e.hidden);
        if (parts > 1) {
            if (!PAIRS) ff.singles = take(inner);
            take_words(ff, INNER, inner);
        }
        claims = (int32_t*)(memory ? memory + used : nullptr);
        return used + most_items();
    }
    // The same for one group in memory of one thread: what is between the two linears of the feed-forward part.
    int64_t private_words() const {
        const int64_t most = MOST_TILES * W;
        const int64_t inner_words = (!PAIRS ? inner : 0) + (call.neighbours[INNER] ? (inner + 1) / 2 : 0) +
                                    (call.couples[INNER] ? inner : 0);
        return most * (parts > 1 ? 0 : inner_words) + KEY_TILES * W * most + e.head_size * most +
               2 * call.tiles * (int64_t)(sizeof(Tile<Word>) / 4) + (tiled && parts == 1 ? width * most : 0) + 64;
    }

    int64_t most_items() const { return groups * (e.heads > parts ? e.heads : parts); }

    // A group's part of a buffer.
    template <typename P>
    P* of(P* buffer, int64_t group, int64_t features) const {
        return buffer ? buffer + first_tile(group) * W * features : nullptr;
    }
    Lanes of(const Lanes& lanes, int64_t group, int64_t features) const {
        return {of(lanes.singles, group, features), of(lanes.neighbours, group, (features + 1) / 2),
                of(lanes.couples, group, features)};
    }

    float* thread_memory() {
        float* memory = hfs_scratch(0, (size_t)private_words());
        if (!memory) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return memory;
    }
};

}  // namespace HFS_ISA

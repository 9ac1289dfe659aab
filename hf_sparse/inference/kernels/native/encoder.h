// A whole encoder of post-LayerNorm transformer layers (BERT and its relatives). Activations stay with tokens in lanes from
// the first layer to the last: tiles of W tokens of one sequence, T tiles to a group, [feature][T * W] in memory.
#pragma once
#include "encoder_chunk.h"
#include "team.h"

namespace HFS_ISA {

// Tokens of a chunk: enough to keep the weights of a layer busy, few enough for activations to stay in the cache.
constexpr int64_t CHUNK_TOKENS = 128;
// Multiply-adds below which a second thread costs more than it brings: activations wander between the cores.
constexpr double ENCODER_PARALLEL_WORK = 6e7;

template <typename X>
static int run_chunk(const EncoderCall& call, int64_t first, int64_t sequences, int threads) {
    EncoderChunk<X> chunk(call, first, sequences, threads);
    float* memory = hfs_scratch(1, (size_t)chunk.lay_out(nullptr));
    if (!memory) return HFS_NO_MEMORY;
    chunk.lay_out(memory);
    if (threads > 1) __builtin_memset(chunk.claims, 0, (size_t)chunk.most_items() * sizeof(int32_t));
    run_phases(chunk.phases(), threads, chunk.claims, chunk);
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
    double work = 0;
    for (int64_t l = 0; l < e.layers; l++) {
        for (int i = 0; i < 6; i++) {
            const bool couples = e.layer[l].weight[i]->kind == HFS_COUPLES;
            (couples ? call.couples : call.neighbours)[inputs[i]] = true;
            work += (double)e.layer[l].weight[i]->steps * (double)e.layer[l].weight[i]->height;
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
    const int threads = work * (double)(batch * given.length) < ENCODER_PARALLEL_WORK ? 1 : given.threads;
    for (int64_t i = 0; i < chunks && !failed; i++) {
        const int64_t first = batch * i / chunks;
        failed = run_chunk<X>(call, first, batch * (i + 1) / chunks - first, threads);
    }
    return failed;
}

}  // namespace HFS_ISA

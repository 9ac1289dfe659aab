// The C interface: checks arguments, picks the instruction set, lends threads and scratch memory.
#include <stdlib.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernel.h"
#define HFS_ISA dispatch
#include "parallel.h"

namespace {

typedef int (*linear_fn)(const hfs_weight&, const hfs_call&);
typedef int (*encoder_fn)(const hfs_encoder&, const hfs_encoder_call&);

// build.py defines HFS_WITH_* for every instruction set that the compiler could compile. Float32 weights on a CPU that
// also multiplies bfloat16 are computed by the kernels of the set below.
const linear_fn SINGLE[HFS_ISA_COUNT] = {
    hfs_linear_portable,
#if defined(HFS_WITH_AVX2)
    hfs_linear_avx2,
#else
    nullptr,
#endif
#if defined(HFS_WITH_AVX512)
    hfs_linear_avx512,
#else
    nullptr,
#endif
#if defined(HFS_WITH_AVX512) && defined(HFS_WITH_AVX512BF16)
    hfs_linear_avx512,
#else
    nullptr,
#endif
#if defined(HFS_WITH_AVX512) && defined(HFS_WITH_AVX512BF16) && defined(HFS_WITH_AMX)
    hfs_linear_avx512,
#else
    nullptr,
#endif
};
const linear_fn PAIRS[HFS_ISA_COUNT] = {
    nullptr,
    nullptr,
    nullptr,
#if defined(HFS_WITH_AVX512) && defined(HFS_WITH_AVX512BF16)
    hfs_linear_avx512bf16,
#else
    nullptr,
#endif
#if defined(HFS_WITH_AVX512) && defined(HFS_WITH_AVX512BF16) && defined(HFS_WITH_AMX)
    hfs_linear_amx,
#else
    nullptr,
#endif
};

// The same for encoders: float32 or what has no pairs, and pairs of bfloat16.
const encoder_fn SINGLE_ENCODER[HFS_ISA_COUNT] = {
    hfs_encoder_portable,
#if defined(HFS_WITH_AVX2)
    hfs_encoder_avx2,
#else
    nullptr,
#endif
#if defined(HFS_WITH_AVX512)
    hfs_encoder_avx512,
#else
    nullptr,
#endif
#if defined(HFS_WITH_AVX512) && defined(HFS_WITH_AVX512BF16)
    hfs_encoder_avx512,
#else
    nullptr,
#endif
#if defined(HFS_WITH_AVX512) && defined(HFS_WITH_AVX512BF16) && defined(HFS_WITH_AMX)
    hfs_encoder_avx512,
#else
    nullptr,
#endif
};
const encoder_fn PAIRS_ENCODER[HFS_ISA_COUNT] = {
    nullptr,
    nullptr,
    nullptr,
#if defined(HFS_WITH_AVX512) && defined(HFS_WITH_AVX512BF16)
    hfs_encoder_avx512bf16,
#else
    nullptr,
#endif
#if defined(HFS_WITH_AVX512) && defined(HFS_WITH_AVX512BF16) && defined(HFS_WITH_AMX)
    hfs_encoder_amx,
#else
    nullptr,
#endif
};

// Weights in training are float32.
typedef int (*prune_fn)(const hfs_prune&);
#if defined(HFS_WITH_AVX512)
const prune_fn prune_avx512 = hfs_prune_avx512;
#else
const prune_fn prune_avx512 = nullptr;
#endif
#if defined(HFS_WITH_AVX2)
const prune_fn prune_avx2 = hfs_prune_avx2;
#else
const prune_fn prune_avx2 = nullptr;
#endif
const prune_fn PRUNE[HFS_ISA_COUNT] = {hfs_prune_portable, prune_avx2, prune_avx512, prune_avx512, prune_avx512};

bool of_pairs(const hfs_weight& w) { return w.kind == HFS_NEIGHBOURS || w.kind == HFS_COUPLES; }

#if defined(HFS_WITH_AMX) && !defined(HFS_EMULATED)
// Whether the CPU multiplies tiles of bfloat16, the operating system keeps them, and, on Linux, it lets this process have
// them: it has to be asked once, before the first use.
bool may_use_tiles() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;  // XGETBV
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    const unsigned kept = 3u << 17;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & kept) != kept) return false;
#if defined(__linux__)
    const long request_permission = 0x1023, tile_data = 18;
    static const bool allowed = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return allowed;
#else
    return false;
#endif
}
#endif

bool cpu_has(int isa) {
#if defined(HFS_EMULATED)
    return isa >= 0;  // every set was compiled for the machine at hand
#elif defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    switch (isa) {
        case HFS_AVX2: return avx2;
        case HFS_AVX512: return avx512;
#if defined(HFS_WITH_AVX512BF16)
        case HFS_AVX512BF16: return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#if defined(HFS_WITH_AVX512BF16) && defined(HFS_WITH_AMX)
        case HFS_AMX: return cpu_has(HFS_AVX512BF16) && may_use_tiles();
#endif
        default: break;
    }
#endif
    return isa == HFS_PORTABLE;
}

// Whether all columns are below a limit. One unsigned comparison refuses negative ones too.
bool inside(const int32_t* column, int64_t count, int64_t limit) {
    bool ok = true;
    for (int64_t j = 0; j < count; j++) ok &= (uint32_t)column[j] < (limit > 0 ? (uint32_t)limit : 0);
    return ok;
}

struct Scratch {
    float* memory[3] = {nullptr, nullptr, nullptr};
    size_t size[3] = {0, 0, 0};
    ~Scratch() {
        for (float* block : memory) free(block);
    }
};
thread_local Scratch scratch;
hfs_parallel_fn parallel = nullptr;

}  // namespace

hfs_parallel_fn hfs_parallel(void) { return parallel; }

float* hfs_scratch(int slot, size_t count) {
    if (count == 0) count = 1;  // null means that there is no memory
    if (scratch.size[slot] < count) {
        free(scratch.memory[slot]);
        scratch.size[slot] = 0;
        void* memory = nullptr;
        const size_t bytes = (count * sizeof(float) + 4095) / 4096 * 4096;
        scratch.memory[slot] = posix_memalign(&memory, 64, bytes) == 0 ? (float*)memory : nullptr;
        if (scratch.memory[slot]) scratch.size[slot] = bytes / sizeof(float);
    }
    return scratch.memory[slot];
}

extern "C" {

int hfs_abi(void) { return HFS_ABI; }

int64_t hfs_weight_size(void) { return (int64_t)sizeof(hfs_weight); }

int hfs_isa_available(int isa) { return isa >= 0 && isa < HFS_ISA_COUNT && SINGLE[isa] && cpu_has(isa); }

void hfs_set_parallel(hfs_parallel_fn gomp_parallel) { parallel = gomp_parallel; }

int hfs_check(const hfs_weight* w) {
    const int64_t most = INT32_MAX;
    const bool pairs = w->kind == HFS_NEIGHBOURS || w->kind == HFS_COUPLES, segments = w->kind == HFS_SEGMENTS;
    if (w->out_features < 0 || w->out_features > most || w->in_features < 0 || w->in_features > most ||
        w->height < 1 || w->out_features % w->height || w->steps < 0 || w->steps > most || !w->band_start ||
        (w->steps && (!w->column || !w->values))) {
        return HFS_BAD_ARGUMENT;
    }
    if (w->form < HFS_AUTO || w->form > HFS_LANES_FORM || (w->dtype != HFS_FLOAT32 && w->dtype != HFS_BFLOAT16) ||
        w->kind < HFS_SINGLE || w->kind > HFS_SEGMENTS || (pairs && w->dtype != HFS_BFLOAT16) ||
        (w->kind == HFS_NEIGHBOURS && w->in_features % 2)) {
        return HFS_BAD_ARGUMENT;
    }
    if (!hfs_isa_available(w->isa) || (pairs && !PAIRS[w->isa])) return HFS_NO_ISA;
    const int64_t lanes = w->isa == HFS_PORTABLE ? 4 : w->isa == HFS_AVX2 ? 8 : 16, width = w->width;
    if (segments ? w->height != 1 || (width != 4 && width != 8 && width != 16) || width > lanes : width != 1) {
        return HFS_BAD_ARGUMENT;
    }
    const int64_t bands = w->out_features / w->height;
    if (w->band_start[0] != 0 || w->band_start[bands] != w->steps) return HFS_BAD_INDEX;
    bool ok = true;
    for (int64_t b = 0; b < bands; b++) ok &= w->band_start[b] <= w->band_start[b + 1];
    // Columns below this are inside with all that a step reads.
    const int64_t limit = w->kind == HFS_NEIGHBOURS ? w->in_features / 2 : w->in_features - width + 1;
    const int64_t per_step = w->kind == HFS_COUPLES ? 2 : 1;
    ok &= inside(w->column, w->steps * per_step, limit);
    if (w->chunk_start) {
        if (!pairs || w->isa != HFS_AMX) return HFS_BAD_ARGUMENT;
        ok &= w->chunk_start[0] == 0;
        for (int64_t b = 0; b < bands && ok; b++) {
            const int64_t chunks = ((int64_t)w->band_start[b + 1] - w->band_start[b] + 15) / 16;
            ok = (int64_t)w->chunk_start[b + 1] - w->chunk_start[b] == chunks;
        }
        if (!ok) return HFS_BAD_INDEX;
        const int64_t chunks = w->chunk_start[bands];
        if (chunks && (!w->chunk_column || !w->chunk_values)) return HFS_BAD_ARGUMENT;
        ok = inside(w->chunk_column, chunks * 16 * per_step, limit);
    }
    return ok ? HFS_OK : HFS_BAD_INDEX;
}

int hfs_linear(const hfs_weight* weight, const void* bias, const void* x, int64_t x_stride, void* y, int64_t tokens,
               int activation, int threads) {
    if (tokens < 0 || tokens > INT32_MAX || threads < 1 || activation < HFS_NONE || activation > HFS_RELU ||
        x_stride < 0) {
        return HFS_BAD_ARGUMENT;
    }
    const hfs_call call = {bias, x, x_stride, y, tokens, activation, threads};
    return (weight->kind == HFS_SINGLE || weight->kind == HFS_SEGMENTS ? SINGLE : PAIRS)[weight->isa](*weight, call);
}

int hfs_encoder_check(const hfs_encoder* e) {
    const int64_t most = INT32_MAX, width = e->heads * e->head_size;
    if (e->layers < 1 || e->layers > 4096 || e->hidden < 2 || e->hidden > most || e->hidden % 2 || e->heads < 1 ||
        e->heads > 4096 || e->head_size < 8 || e->head_size > 4096 || e->head_size % 8 || e->intermediate < 1 ||
        e->intermediate > most || !e->layer || !(e->scale > 0) || e->activation < HFS_NONE || e->activation > HFS_RELU) {
        return HFS_BAD_ARGUMENT;
    }
    const int64_t shape[6][2] = {{width, e->hidden}, {width, e->hidden},         {width, e->hidden},
                                 {e->hidden, width}, {e->intermediate, e->hidden}, {e->hidden, e->intermediate}};
    const bool pairs = of_pairs(*e->layer[0].weight[0]);
    for (int64_t l = 0; l < e->layers; l++) {
        for (int i = 0; i < 6; i++) {
            const hfs_weight& w = *e->layer[l].weight[i];
            // Pairs are rounded two rows at a time.
            if (w.out_features != shape[i][0] || w.in_features != shape[i][1] || w.kind == HFS_SEGMENTS ||
                of_pairs(w) != pairs || w.dtype != e->dtype || w.isa != e->isa || (pairs && w.height % 2)) {
                return HFS_BAD_ARGUMENT;
            }
        }
        for (int i = 0; i < 4; i++) {
            if (!e->layer[l].norm[i]) return HFS_BAD_ARGUMENT;
        }
    }
    return hfs_isa_available(e->isa) && (pairs ? PAIRS_ENCODER : SINGLE_ENCODER)[e->isa] ? HFS_OK : HFS_NO_ISA;
}

int hfs_encoder_run(const hfs_encoder* e, const void* x, void* y, int64_t batch, int64_t length, const float* mask,
                    const float* bias, int threads) {
    if (batch < 0 || length < 0 || batch > INT32_MAX || length > INT32_MAX || batch * length > INT32_MAX || threads < 1) {
        return HFS_BAD_ARGUMENT;
    }
    if (batch == 0 || length == 0) return HFS_OK;
    const hfs_encoder_call call = {x, y, batch, length, mask, bias, threads};
    return (of_pairs(*e->layer[0].weight[0]) ? PAIRS_ENCODER : SINGLE_ENCODER)[e->isa](*e, call);
}

int64_t hfs_prune_size(void) { return (int64_t)sizeof(hfs_prune); }

int hfs_prune_blocks(const hfs_prune* p) {
    const int64_t most = INT32_MAX;
    if (p->rows < 0 || p->rows > most || p->cols < 0 || p->cols > most || p->height < 1 || p->width < 1 ||
        p->rows % p->height || p->cols % p->width || p->threads < 1 || p->mode < HFS_MASK || p->mode > HFS_SHRINK) {
        return HFS_BAD_ARGUMENT;
    }
    const int64_t grid_rows = p->rows / p->height, grid_cols = p->cols / p->width;
    const bool in_order = p->row_step == grid_cols && p->col_step == 1;
    const bool turned = p->row_step == 1 && p->col_step == grid_rows;
    const bool empty = grid_rows == 0 || grid_cols == 0;
    if (!in_order && !turned) return HFS_BAD_INDEX;
    if (!empty && (!p->target || (p->mode == HFS_GRADIENT && !p->weight))) return HFS_BAD_ARGUMENT;
    if (!hfs_isa_available(p->isa) || !PRUNE[p->isa]) return HFS_NO_ISA;
    if (empty && p->penalty) *p->penalty = 0;
    return PRUNE[p->isa](*p);
}

}  // extern "C"

// The plain C interface of the CPU kernels. Python fills these structs with ctypes (../cpu.py mirrors them).
#pragma once
#include <stdint.h>

#if defined(__GNUC__)
#define HFS_EXPORT __attribute__((visibility("default")))
#else
#define HFS_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Raised whenever a struct or a function below changes: Python refuses a library built from other sources.
#define HFS_ABI 3

enum hfs_isa {
    HFS_PORTABLE = 0,
    HFS_AVX2 = 1,
    HFS_AVX512 = 2,
    HFS_AVX512BF16 = 3,
    HFS_AMX = 4,
    HFS_ISA_COUNT = 5
};
enum hfs_activation { HFS_NONE = 0, HFS_GELU = 1, HFS_GELU_TANH = 2, HFS_SILU = 3, HFS_RELU = 4 };
enum hfs_dtype { HFS_FLOAT32 = 0, HFS_BFLOAT16 = 1 };
// ROWS: outputs in lanes, reads and writes row-major. LANES: tokens in lanes, activations are packed around it.
enum hfs_form { HFS_AUTO = 0, HFS_ROWS = 1, HFS_LANES_FORM = 2 };
enum hfs_status { HFS_OK = 0, HFS_BAD_ARGUMENT = 1, HFS_BAD_INDEX = 2, HFS_NO_ISA = 3, HFS_NO_MEMORY = 4, HFS_ALL_MASKED = 5 };

// How a weight is stored.
// SINGLE: float32; a step is one column.
// NEIGHBOURS: pairs of bfloat16; a step is the columns 2 c and 2 c + 1, stored as c. in_features must be even.
// COUPLES: pairs of bfloat16; a step is any two columns, stored as both. A column may appear with a weight of zero.
// SEGMENTS: float32; a step is `width` neighbouring columns of one row, stored as the first. height must be 1, width
// 4, 8 or 16 and at most what a register of the instruction set holds.
// Pairs need bfloat16 activations and an instruction set that multiplies them.
enum hfs_kind { HFS_SINGLE = 0, HFS_NEIGHBOURS = 1, HFS_COUPLES = 2, HFS_SEGMENTS = 3 };

// A weight [out_features, in_features] cut into bands of `height` output rows. Band b takes the steps
// band_start[b] .. band_start[b + 1]; values holds, for each step, height * width words of four bytes.
//
// Pairs for HFS_AMX may stand a second time, for matrix tiles, which take 16 steps at once: band b then has the chunks
// chunk_start[b] .. chunk_start[b + 1], as many as its steps fill; a chunk that they do not fill ends with columns of the
// band again, with weights of zero. Without them the weight is computed as for HFS_AVX512BF16.
struct hfs_weight {
    int64_t out_features;
    int64_t in_features;
    int64_t height;
    int64_t width;  // of a segment; 1 for the other kinds
    int64_t steps;
    const int32_t* band_start;  // [out_features / height + 1]
    const int32_t* column;      // [steps], or [steps, 2] for COUPLES
    const void* values;         // [steps, height], or [steps, width] for SEGMENTS
    int32_t kind;               // hfs_kind
    int32_t dtype;              // hfs_dtype of x, y and bias
    int32_t isa;                // hfs_isa
    int32_t form;               // hfs_form
    const int32_t* chunk_start;   // [out_features / height + 1], or null
    const int32_t* chunk_column;  // [chunks, 16], or [chunks, 16, 2] for COUPLES
    const void* chunk_values;     // [chunks, height, 16]
};

// An encoder of post-LayerNorm transformer layers: h = norm(h + attention(h)), h = norm(h + down(activation(up(h)))).
// Biases and the parameters of the norms are float32, whatever the type of the weights; biases may be null.
struct hfs_encoder_layer {
    const struct hfs_weight* weight[6];  // query, key, value, output, up, down; of kind SINGLE, NEIGHBOURS or COUPLES
    const float* bias[6];
    const float* norm[4];  // gain and shift after attention, gain and shift at the end
};
struct hfs_encoder {
    int64_t layers, hidden, heads, head_size, intermediate;  // head_size is a multiple of 8
    const struct hfs_encoder_layer* layer;
    float scale;           // of the scores: 1 / sqrt(head_size)
    float eps[2];          // of the norms
    int32_t activation;    // hfs_activation
    int32_t dtype;         // hfs_dtype of x and y
    int32_t isa;           // hfs_isa
};

// What a pass over a weight in training does to each block; then blocks whose bit is 0 are set to zero.
// MASK: nothing. GRADIENT: target += scale * amount * coef / norm * weight, the gradient of the group lasso.
// SHRINK: target *= max(0, 1 - amount * coef / norm), its proximal step. Norms are those of the weight before the pass.
enum hfs_mode { HFS_MASK = 0, HFS_GRADIENT = 1, HFS_SHRINK = 2 };

// Float32 [rows, cols], contiguous, in blocks of height x width. Block (r, c) has the bit and the coefficient
// r * row_step + c * col_step: (blocks per row, 1), or (1, blocks per column) where the grid lies the other way round.
struct hfs_prune {
    int64_t rows, cols, height, width, row_step, col_step;
    float* target;        // written; the weight itself for SHRINK
    const float* weight;  // of GRADIENT alone
    const uint8_t* bits;  // [ceil(blocks / 8)], least significant bit first; null keeps all
    const float* coef;    // [blocks]; null stands for ones
    const float* scale;   // one number; null stands for 1
    const uint8_t* moved; // one byte, 0 where the optimizer skipped the step and nothing is shrunk; null stands for 1
    float* penalty;       // one number: sum of coef * norm; null if not wanted
    float amount;
    int32_t mode;     // hfs_mode
    int32_t isa;      // hfs_isa
    int32_t threads;
};

HFS_EXPORT int hfs_abi(void);
// sizeof(struct hfs_weight) as the library was built, for whoever mirrors it.
HFS_EXPORT int64_t hfs_weight_size(void);
// 1 if this library holds the instruction set, and this CPU and the operating system let the process use it.
HFS_EXPORT int hfs_isa_available(int isa);
// HFS_OK, or why the weight must not be used. Every index that a kernel follows is checked here.
HFS_EXPORT int hfs_check(const struct hfs_weight* weight);
// y[tokens, out_features] = activation(x[tokens, in_features] @ weight.T + bias). y is contiguous; rows of x are, and lie
// x_stride elements apart; bias may be null. The weight must have passed hfs_check.
HFS_EXPORT int hfs_linear(const struct hfs_weight* weight, const void* bias, const void* x, int64_t x_stride, void* y,
                          int64_t tokens, int activation, int threads);
// HFS_OK, or why the encoder must not be used. Every weight must have passed hfs_check.
HFS_EXPORT int hfs_encoder_check(const struct hfs_encoder* encoder);
// y = encoder(x), both [batch, length, hidden] and contiguous. mask: [batch, length] float32 added to the scores of a key,
// or null. bias: [heads, keys, queries] float32 added to the scores and divided by scale already, with keys and queries
// padded to a multiple of 16; or null. HFS_ALL_MASKED where a sequence has no key that is not masked: y is not written.
HFS_EXPORT int hfs_encoder_run(const struct hfs_encoder* encoder, const void* x, void* y, int64_t batch, int64_t length,
                               const float* mask, const float* bias, int threads);
// One pass over the blocks of a weight, its gradient, or both.
HFS_EXPORT int hfs_prune_blocks(const struct hfs_prune* pass);
// sizeof(struct hfs_prune) as the library was built.
HFS_EXPORT int64_t hfs_prune_size(void);
// The process's own OpenMP entry point, GOMP_parallel(fn, data, num_threads, flags), so that there is one pool of
// threads: the library links no OpenMP runtime of its own. Null: every call runs on the calling thread.
HFS_EXPORT void hfs_set_parallel(void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned));

#ifdef __cplusplus
}
#endif

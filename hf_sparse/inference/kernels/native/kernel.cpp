// The kernels for one instruction set. Compiled once per set, with its flags, HFS_ISA and HFS_LANES.
#include "kernel.h"

#include "linear.h"

#define HFS_JOIN2(a, b) a##b
#define HFS_JOIN(a, b) HFS_JOIN2(a, b)

int HFS_JOIN(hfs_linear_, HFS_ISA)(const hfs_weight* weight, const void* x, int64_t x_stride, void* y,
                                   int64_t y_stride, int64_t tokens, int dtype, int form, int threads) {
    using namespace HFS_ISA;
    if (dtype == HFS_BFLOAT16) {
        return linear(*weight, (const bf16*)x, x_stride, (bf16*)y, y_stride, tokens, form, threads);
    }
    return linear(*weight, (const float*)x, x_stride, (float*)y, y_stride, tokens, form, threads);
}

// What kernel.cpp gives to dispatch.cpp, once per instruction set.
#pragma once
#include "hf_sparse_kernels.h"

struct hfs_call {
    const void* bias;
    const void* x;
    int64_t x_stride;
    void* y;
    int64_t tokens;
    int activation, threads;
};

#define HFS_DECLARE(isa) __attribute__((visibility("hidden"))) int hfs_linear_##isa(const hfs_weight&, const hfs_call&)
HFS_DECLARE(portable);
HFS_DECLARE(avx2);
HFS_DECLARE(avx512);
HFS_DECLARE(avx512bf16);
#undef HFS_DECLARE

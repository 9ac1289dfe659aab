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

struct hfs_encoder_call {
    const void* x;
    void* y;
    int64_t batch, length;
    const float* mask;
    const float* bias;
    int threads;
};

#define HFS_DECLARE(isa)                                                                               \
    __attribute__((visibility("hidden"))) int hfs_linear_##isa(const hfs_weight&, const hfs_call&);    \
    __attribute__((visibility("hidden"))) int hfs_encoder_##isa(const hfs_encoder&, const hfs_encoder_call&); \
    __attribute__((visibility("hidden"))) int hfs_prune_##isa(const hfs_prune&)
HFS_DECLARE(portable);
HFS_DECLARE(avx2);
HFS_DECLARE(avx512);
HFS_DECLARE(avx512bf16);
HFS_DECLARE(amx);
#undef HFS_DECLARE

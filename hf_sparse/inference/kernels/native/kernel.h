// What kernel.cpp gives to dispatch.cpp, once per instruction set.
#pragma once
#include "hf_sparse_kernels.h"

#define HFS_DECLARE(isa)                                                                                            \
    __attribute__((visibility("hidden"))) int hfs_linear_##isa(const hfs_weight*, const void*, int64_t, void*,      \
                                                               int64_t, int64_t, int, int, int)
extern "C" {
HFS_DECLARE(portable);
HFS_DECLARE(avx2);
HFS_DECLARE(avx512);
HFS_DECLARE(avx512bf16);
}
#undef HFS_DECLARE

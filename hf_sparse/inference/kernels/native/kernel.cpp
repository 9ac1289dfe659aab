// The kernels for one instruction set. Compiled once per set, with its flags, HFS_ISA and HFS_LANES.
#include "kernel.h"

#include "linear.h"

#define HFS_JOIN2(a, b) a##b
#define HFS_JOIN(a, b) HFS_JOIN2(a, b)

int HFS_JOIN(hfs_linear_, HFS_ISA)(const hfs_weight& weight, const hfs_call& call) {
    return weight.dtype == HFS_BFLOAT16 ? HFS_ISA::linear<HFS_ISA::bf16>(weight, call)
                                        : HFS_ISA::linear<float>(weight, call);
}

// The kernels for one instruction set. Compiled once per set, with its flags, HFS_ISA and HFS_LANES. A set that
// multiplies pairs of bfloat16 is compiled with HFS_PAIRS, and then holds the kernels for those alone; one that has matrix
// tiles with HFS_TILES, too, and leaves to the set below it what is not for them.
#include "kernel.h"

#include "encoder.h"
#if !defined(HFS_PAIRS)
#include "prune.h"
#endif
#if defined(HFS_TILES)
#include "tiles_linear.h"
#else
#include "linear.h"
#endif

#define HFS_JOIN2(a, b) a##b
#define HFS_JOIN(a, b) HFS_JOIN2(a, b)

int HFS_JOIN(hfs_linear_, HFS_ISA)(const hfs_weight& weight, const hfs_call& call) {
    using namespace HFS_ISA;
#if defined(HFS_TILES)
    if (!prefer_tiles(weight, call.tokens)) return hfs_linear_avx512bf16(weight, call);
    return weight.kind == HFS_NEIGHBOURS ? tiles_linear<Neighbours>(weight, call) : tiles_linear<Couples>(weight, call);
#elif defined(HFS_PAIRS)
    return weight.kind == HFS_NEIGHBOURS ? linear<Neighbours>(weight, call) : linear<Couples>(weight, call);
#else
    return weight.dtype == HFS_BFLOAT16 ? linear<Single<bf16>>(weight, call) : linear<Single<float>>(weight, call);
#endif
}

int HFS_JOIN(hfs_encoder_, HFS_ISA)(const hfs_encoder& encoder, const hfs_encoder_call& call) {
    using namespace HFS_ISA;
#if defined(HFS_PAIRS)
    return run_encoder<bf16>(encoder, call);
#else
    return encoder.dtype == HFS_BFLOAT16 ? run_encoder<bf16>(encoder, call) : run_encoder<float>(encoder, call);
#endif
}

#if !defined(HFS_PAIRS)
int HFS_JOIN(hfs_prune_, HFS_ISA)(const hfs_prune& pass) { return HFS_ISA::prune_pass(pass); }
#endif

"""The only door to torch.distributed: what ranks have to agree on, and weights of which each rank holds a part."""

from hf_sparse.training.distributed.engine import Engine, is_sharded_model, plain_class, uncompiled
from hf_sparse.training.distributed.ranks import broadcast_from_rank_0_, check_agreement, sum_over_ranks, world_size
from hf_sparse.training.distributed.shards import (
    add_scaled_blocks_,
    all_finite,
    is_sharded,
    norms_of_blocks,
    pruned_are_zero,
    reshard,
    scale_blocks_of_,
)

__all__ = [
    "Engine",
    "add_scaled_blocks_",
    "all_finite",
    "broadcast_from_rank_0_",
    "check_agreement",
    "is_sharded",
    "is_sharded_model",
    "norms_of_blocks",
    "plain_class",
    "pruned_are_zero",
    "reshard",
    "scale_blocks_of_",
    "sum_over_ranks",
    "uncompiled",
    "world_size",
]

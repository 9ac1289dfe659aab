"""The only door to torch.distributed: what ranks have to agree on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add up a tensor over all ranks. Returns a new tensor; the input itself with one rank."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


@torch.no_grad()
def broadcast_from_rank_0_(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor, in place, by rank 0's. Does nothing with one rank."""
    if world_size() > 1:
        for tensor in tensors:
            # Not every backend moves bool; uint8 shares its bytes.
            dist.broadcast(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, src=0)

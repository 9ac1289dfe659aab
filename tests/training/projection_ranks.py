"""One of two ranks that average the gradients of projections; imports little, because it starts from nothing."""

from __future__ import annotations

import torch

from hf_sparse.training.projections import HiddenProjections


def average(rank: int, folder: str) -> None:
    """Rank 0 has a gradient of 4 on one map, rank 1 none: both end with 2 there and 0 elsewhere."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    maps = HiddenProjections({"": (2, 2), "text": (2, 2)}, seed=0)
    if rank == 0:
        maps.get("").weight.grad = torch.full((2, 2), 4.0)
    maps.average_gradients_()
    for parameter, value in zip(maps.parameters(), (2.0, 0.0), strict=True):
        assert torch.equal(parameter.grad, torch.full((2, 2), value))
    torch.distributed.destroy_process_group()

"""What ranks add up, and what they have to agree on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

# Odd multipliers of a mixing hash over 64 bits (the finaliser of splitmix64, as signed integers).
_MIX = (-4658895280553007687, -7723592293110705685)


def world_size() -> int:
    """Number of ranks that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add up a tensor over all ranks. Returns a new tensor; the input itself with one rank."""
    if world_size() == 1:
        return tensor
    total = on_wire(tensor).clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total.to(tensor.device)


@torch.no_grad()
def broadcast_from_rank_0_(tensors: Mapping[str, Tensor]) -> None:
    """Overwrite each tensor, in place, by rank 0's, all in one message. Does nothing with one rank.

    Args:
        tensors: of one dtype and device; bool travels as one bit per element.
    """
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    message = on_wire(pack_bits(flat) if flat.dtype == torch.bool else flat)
    dist.broadcast(message, src=0)
    message = message.to(flat.device)
    received = unpack_bits(message, flat.numel()) if flat.dtype == torch.bool else message
    for tensor, part in zip(tensors.values(), received.split([t.numel() for t in tensors.values()]), strict=True):
        tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def check_agreement(masks: Mapping[str, Tensor], when: str) -> None:
    """Refuse to go on if masks are not the same on all ranks. Waits for the device; does nothing with one rank.

    Each rank hashes its masks, 8 bytes per layer, and all ranks compare the hashes in one all-reduce.

    Args:
        masks: {name: [R, C] bool}, the same names in the same order on all ranks.
        when: for the message: "after the mask update of step 3".

    Raises:
        RuntimeError: on every rank, naming the first layer that differs.
    """
    if world_size() == 1 or not masks:
        return
    hashes = torch.stack([hash_of_mask(mask) for mask in masks.values()])
    # The largest hash and the largest complement: the ranks agree where the one is the complement of the other.
    extremes = on_wire(torch.stack([hashes, ~hashes]))
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest = extremes[0], ~extremes[1]
    differing = [name for name, differs in zip(masks, largest.ne(smallest).tolist(), strict=True) if differs]
    if differing:
        raise RuntimeError(
            f"the masks of {differing[0]} are not the same on all {world_size()} ranks {when}"
            f"{f', nor are those of {len(differing) - 1} other layer(s)' if len(differing) > 1 else ''}: training on "
            f"would give every rank another model. Resume from the last checkpoint; if it comes back, look for code "
            f"that writes to masks or weights on one rank, and for a faulty device (this is rank {dist.get_rank()})."
        )


def hash_of_mask(mask: Tensor) -> Tensor:
    """Hash a mask to 64 bits on its own device: the sum of a mixed number per kept block, modulo 2^64.

    Args:
        mask: [R, C] bool.

    Returns:
        A scalar, int64.
    """
    mixed = torch.arange(1, mask.numel() + 1, device=mask.device)
    for multiplier, shift in zip(_MIX, (30, 27), strict=True):
        mixed = (mixed ^ (mixed >> shift)) * multiplier
    return ((mixed ^ (mixed >> 31)) * mask.reshape(-1)).sum()


def pack_bits(flat: Tensor) -> Tensor:
    """Pack booleans into bytes, least significant bit first.

    Example:
        >>> pack_bits(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Undo `pack_bits` for `count` booleans.

    Example:
        >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), 3)
        tensor([ True, False,  True])
    """
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> bits) & 1).bool().reshape(-1)[:count]


def on_wire(tensor: Tensor) -> Tensor:
    """Move a tensor to where the ranks communicate: weights that are offloaded to the CPU have none of their own."""
    if tensor.device.type == "cpu" and "cpu" not in str(dist.get_backend_config()):
        return tensor.to(torch.device("cuda", torch.cuda.current_device()))
    return tensor

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
        tensors: of one dtype and device.
    """
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    message = on_wire(flat)
    dist.broadcast(message, src=0)
    received = message.to(flat.device)
    for tensor, part in zip(tensors.values(), received.split([t.numel() for t in tensors.values()]), strict=True):
        tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def check_agreement(bits: Mapping[str, Tensor], when: str) -> None:
    """Refuse to go on if masks are not the same on all ranks. Waits for the device; does nothing with one rank.

    Each rank hashes its masks, 8 bytes per layer, and all ranks compare the hashes in one all-reduce.

    Args:
        bits: {name: packed mask, uint8}, the same names in the same order on all ranks.
        when: for the message: "after the mask update of step 3".

    Raises:
        RuntimeError: on every rank, naming the first layer that differs.
    """
    if world_size() == 1 or not bits:
        return
    hashes = torch.stack([hash_of_bytes(packed) for packed in bits.values()])
    # The largest hash and the largest complement: the ranks agree where the one is the complement of the other.
    extremes = on_wire(torch.stack([hashes, ~hashes]))
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest = extremes[0], ~extremes[1]
    differing = [name for name, differs in zip(bits, largest.ne(smallest).tolist(), strict=True) if differs]
    if differing:
        raise RuntimeError(
            f"the masks of {differing[0]} are not the same on all {world_size()} ranks {when}"
            f"{f', nor are those of {len(differing) - 1} other layer(s)' if len(differing) > 1 else ''}: training on "
            f"would give every rank another model. Resume from the last checkpoint; if it comes back, look for code "
            f"that writes to masks or weights on one rank, and for a faulty device (this is rank {dist.get_rank()})."
        )


def hash_of_bytes(packed: Tensor) -> Tensor:
    """Hash bytes to 64 bits on their own device: the sum of a mixed number per byte and place, modulo 2^64.

    Two that differ in a single byte never hash alike, because the mixing is one to one.

    Args:
        packed: [n] uint8.

    Returns:
        A scalar, int64.
    """
    mixed = torch.arange(1, len(packed) + 1, device=packed.device) * 256 + packed
    for multiplier, shift in zip((*_MIX, 1), (30, 27, 31), strict=True):
        # The mask turns the shift of a signed number into one that fills up with zeros.
        mixed = (mixed ^ ((mixed >> shift) & (2 ** (64 - shift) - 1))) * multiplier
    return mixed.sum()


def on_wire(tensor: Tensor) -> Tensor:
    """Move a tensor to where the ranks communicate: weights that are offloaded to the CPU have none of their own."""
    if tensor.device.type == "cpu" and "cpu" not in str(dist.get_backend_config()):
        return tensor.to(torch.device("cuda", torch.cuda.current_device()))
    return tensor

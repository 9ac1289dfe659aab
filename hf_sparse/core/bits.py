"""Block masks at one bit per block: eight to a byte, least significant bit first; spread out where they are used.

A mask in training lies on the device for the whole run, where a bool takes a byte. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

# Blocks of several layers that are worked on together: few calls for small layers, a few MB at a time for large ones.
_TOGETHER = 2**20


def pack_bits(flat: Tensor) -> Tensor:
    """Pack booleans into bytes.

    Args:
        flat: [n] bool.

    Returns:
        [ceil(n / 8)] uint8; unused bits of the last byte are 0.

    Example:
        >>> pack_bits(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """Undo `pack_bits`.

    Args:
        packed: [ceil(count / 8)] uint8.
        count: how many booleans.
        dtype: of the result: bool, or 1 and 0 in any other.

    Returns:
        [count], `dtype`.

    Example:
        >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), 3)
        tensor([ True, False,  True])
    """
    # Looked up: one write per block, in the dtype that is wanted, where shifting would take four.
    return _bits_of_bytes(packed.device, dtype).index_select(0, packed.int()).view(-1)[:count]


class Bitmap:
    """A block mask that takes one bit per block.

    Args:
        mask: [R, C] bool, True = keep.

    Attributes:
        bits: [ceil(R * C / 8)] uint8, on the mask's device; block i of the row-major grid is bit i % 8 of byte i // 8.
        grid: (R, C).

    Example:
        >>> bitmap = Bitmap(torch.tensor([[True, False, True]]))
        >>> bitmap.bits, bitmap.mask()
        (tensor([5], dtype=torch.uint8), tensor([[ True, False,  True]]))
    """

    def __init__(self, mask: Tensor) -> None:
        self.grid = (mask.shape[0], mask.shape[1])
        self.bits = pack_bits(mask.reshape(-1))

    @property
    def num_blocks(self) -> int:
        """R * C."""
        return self.grid[0] * self.grid[1]

    def mask(self) -> Tensor:
        """Spread the mask out: [R, C] bool, a new tensor."""
        return unpack_bits(self.bits, self.num_blocks).view(self.grid)

    def move(self, device: torch.device) -> Bitmap:
        """Move the bits to a device, if they are not there; gives itself."""
        if self.bits.device != device:
            self.bits = self.bits.to(device)
        return self


class Masks(Mapping[str, Tensor]):
    """Masks by name, read-only: each is spread out when it is asked for.

    Writing to what it gives changes a copy.

    Args:
        bitmaps: {name: bitmap}, kept, not copied.
    """

    def __init__(self, bitmaps: Mapping[str, Bitmap]) -> None:
        self._bitmaps = bitmaps

    def __getitem__(self, name: str) -> Tensor:
        return self._bitmaps[name].mask()

    def __iter__(self) -> Iterator[str]:
        return iter(self._bitmaps)

    def __len__(self) -> int:
        return len(self._bitmaps)


def masks_as_factors(bitmaps: Mapping[str, Bitmap], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Spread many masks out as factors, a few MB at a time and not all of them at once.

    Args:
        bitmaps: {name: bitmap}, all on one device.
        dtype: floating point.

    Yields:
        (name, [R, C] of 1 and 0), in the order of `bitmaps`.
    """
    for names in few_at_a_time({name: bitmap.num_blocks for name, bitmap in bitmaps.items()}):
        packed = torch.cat([bitmaps[name].bits for name in names])
        factors, at = unpack_bits(packed, 8 * len(packed), dtype), 0
        for name in names:
            yield name, factors[at : at + bitmaps[name].num_blocks].view(bitmaps[name].grid)
            at += 8 * len(bitmaps[name].bits)


def few_at_a_time(num_blocks: Mapping[str, int]) -> Iterator[list[str]]:
    """Divide layers into groups that are worked on together, so that what a group needs at once takes a few MB.

    Args:
        num_blocks: {name: number of blocks}.

    Yields:
        Names, in the order given: of at most 2**20 blocks, or of one layer that has more.

    Example:
        >>> list(few_at_a_time({"a": 3, "b": 2**20 - 3, "c": 1, "d": 2**22, "e": 5}))
        [['a', 'b'], ['c'], ['d'], ['e']]
    """
    names: list[str] = []
    blocks = 0
    for name, count in num_blocks.items():
        if names and blocks + count > _TOGETHER:
            yield names
            names, blocks = [], 0
        names.append(name)
        blocks += count
    if names:
        yield names


@functools.cache
def _bits_of_bytes(device: torch.device, dtype: torch.dtype) -> Tensor:
    # Made where it stays: a copy from the host would wait for the device.
    byte = torch.arange(256, dtype=torch.int32, device=device)
    return ((byte[:, None] >> torch.arange(8, dtype=torch.int32, device=device)) & 1).to(dtype)

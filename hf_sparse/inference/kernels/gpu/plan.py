"""How a call is computed: the program, the size of its tiles, and the plans that are tried for a shape.

Letters as in `programs`: M tokens, O rows, K steps of a tile.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_sparse.inference.kernels.gpu.layout import Side

# Up to so many tokens a call is bound by reading the weight, and one program sees them all.
FEW_TOKENS = 16
# Columns in a row from which x is read as it lies; below, rows of its transpose are read instead.
_MIN_RUN, _MIN_RUN_FEW = 32, 16
# Of one streaming multiprocessor of compute capability 9.0, for one program; less elsewhere.
MAX_SHARED = 227 * 1024
# Outputs up to which a call with one token is cut finer, so that every multiprocessor has work.
_SMALL_OUTPUT = 6144
# Columns that a band keeps from which large tiles pay: what they begin with is then little of what they do.
_LONG_BAND = 1280


@dataclass(frozen=True)
class Plan:
    """One way to compute a call.

    Attributes:
        program: "few", "gather" or "copy".
        m, o, k: tokens, rows and steps of a tile.
        warps: of a program.
        stages: how many steps of tiles are on their way at once.
        group: tiles of tokens that run side by side.
        features_first: whether x is transposed before.
        swapped: whether the tile of y is computed transposed.
        boxed: whether the copy engine writes y, too.
        early: what a program reads before the one before it has ended: 0 nothing, 1 the index, 2 weights as well.
    """

    program: str
    m: int
    o: int
    k: int
    warps: int = 4
    stages: int = 3
    group: int = 4
    features_first: bool = False
    swapped: bool = False
    boxed: bool = False
    early: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Give its fields, for a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Any) -> Plan:
        """Read what `to_dict` gave.

        Raises:
            ValueError: if it is something else.
        """
        fields = {name: type(value) for name, value in asdict(_ANY).items()}
        if not isinstance(found, dict) or {name: type(value) for name, value in found.items()} != fields:
            raise ValueError(f"{found!r} is no plan: expected {fields}.")
        plan = cls(**found)
        sizes = (plan.m, plan.o, plan.k, plan.warps)
        powers = all(size > 0 and size & (size - 1) == 0 and size <= 1024 for size in sizes)
        if plan.program not in ("few", "gather", "copy") or not powers or not 1 <= plan.stages <= 8 or plan.group < 1:
            raise ValueError(f"{plan} is out of range.")
        return plan


_ANY = Plan("gather", 64, 64, 64)


def power_of_two(number: int) -> int:
    """Give the least power of two that is not less.

    Example:
        >>> [power_of_two(n) for n in (1, 3, 16, 17)]
        [1, 4, 16, 32]
    """
    return 1 << (number - 1).bit_length()


def call_key(x: Tensor, bias: Tensor | None, activation: str | None) -> Any:
    """Name what calls have in common that differ in the values of x alone."""
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16, id(bias), activation


def features_first(side: Side, tokens: int, dtype: torch.dtype) -> bool:
    """Tell whether x is transposed before the product: where single columns are gathered for several tokens."""
    if tokens <= FEW_TOKENS and side.stride_inner == 1:
        return tokens > 1 and side.width % _MIN_RUN_FEW != 0
    return dtype.itemsize > 2 or side.width % _MIN_RUN != 0


def copies(side: Side, dtype: torch.dtype) -> bool:
    """Tell whether the copy engine can bring blocks of this shape."""
    powers = all(size & (size - 1) == 0 for size in (side.height, side.width))
    return dtype.itemsize == 2 and powers and side.height >= 16 and side.width >= _MIN_RUN


def default_plan(side: Side, tokens: int, dtype: torch.dtype) -> Plan:
    """Give the plan that is taken untuned: what was the fastest on an H200, or near it.

    Args:
        side: the weight, in the direction of the call.
        tokens: rows of x, at least 1.
        dtype: of x and weight.
    """
    if tokens <= FEW_TOKENS and side.stride_inner == 1:
        return _few(side, tokens, dtype)
    first = features_first(side, tokens, dtype)
    m, o = min(128, max(16, power_of_two(tokens))), min(128, max(16, power_of_two(side.height)))
    if dtype.itemsize > 2:
        warps = 4 if side.stride_inner == 1 and side.width > 1 else 8
        return Plan("gather", min(m, 64), min(o, 64), 16, warps, 3, 4, features_first=first, early=1)
    # The matrix product of a warp group is at least 64 rows high: of tokens, or of the weight where tokens are fewer.
    swapped = m < 64 <= o
    if not copies(side, dtype):
        k = 64 if tokens <= 512 else 32
        return Plan("gather", m, o, k, 8 if m * o > 8192 else 4, 3, 2, features_first=first, swapped=swapped, early=1)
    base = Plan("copy", m, o, min(side.width, 64), 8 if m * o > 8192 else 4, 3, 4, swapped=swapped, early=1)
    if o == 64 and m == 128 and tokens >= 2048 and band_length(side) >= _LONG_BAND:
        return replace(base, m=256, warps=8, stages=4, boxed=True)
    if o <= 32:
        return replace(base, m=256 if tokens >= 1024 else m, boxed=True)
    return replace(base, swapped=swapped or o * m == 64 * 128, boxed=o < 128)


def band_length(side: Side) -> float:
    """Give the number of columns that a band keeps, on average."""
    return side.column.numel() * side.width / side.bands


def _few(side: Side, tokens: int, dtype: torch.dtype) -> Plan:
    small = side.bands * side.height <= _SMALL_OUTPUT
    first = features_first(side, tokens, dtype)
    longest = max(128, power_of_two(int(band_length(side)) + 1))
    height = power_of_two(side.height)
    if tokens == 1:
        o = 8 if side.width >= 8 and small else 16
        return Plan("few", 1, min(o, max(8, height)), min(512 if small else 256, longest), 4, 1, early=2)
    o, k = (32 if first and height >= 32 else 16), (256 if first or dtype.itemsize > 2 else 512)
    return Plan("few", 16, o, min(k, longest), 4, 1, features_first=first, early=2)


def candidates(side: Side, tokens: int, dtype: torch.dtype) -> list[Plan]:
    """List the plans that are worth trying, the default first.

    Args:
        side: the weight, in the direction of the call.
        tokens: rows of x, at least 1.
        dtype: of x and weight.
    """
    start = default_plan(side, tokens, dtype)
    if start.program == "few":
        found = [replace(start, k=max(128, start.k // 2)), replace(start, k=min(512, 2 * start.k))]
        found += [replace(start, k=start.k, warps=8)]
        found += [replace(start, o=8 if start.o == 16 else 16)] if start.m == 1 else []
    elif dtype.itemsize > 2:
        found = [replace(start, m=32), replace(start, warps=12 - start.warps)]
    elif start.program == "copy":
        plain = replace(start, swapped=False, boxed=True)
        found = [replace(plain, group=1), replace(start, stages=4)]
        if tokens >= 1024:
            found += [replace(plain, m=256, warps=8, stages=4), replace(start, m=128, swapped=False)]
        elif start.m == 128:
            found += [replace(start, m=64, warps=4)]
    else:
        found = [replace(start, group=4), replace(start, k=96 - start.k), replace(start, stages=4)]
        found += [replace(start, m=64, warps=4)] if start.m == 128 else []
        found += [replace(start, m=256)] if start.o <= 32 and tokens >= 1024 else []
    return list(dict.fromkeys([start, *found]))

"""How a call is computed: the program, the size of its tiles, and the plans that are tried for a shape.

Letters as in `programs`: M tokens, O rows, K steps of a tile.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from hf_sparse.inference.kernels.gpu.layout import Side

# Up to so many tokens a call is bound by reading the weight, and one program sees them all.
FEW_TOKENS = 16
# Columns in a row from which x is read as it lies; below, rows of its transpose are read instead.
MIN_RUN = 16
# Of one streaming multiprocessor of compute capability 9.0, for one program; less elsewhere.
MAX_SHARED = 227 * 1024


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
        registers: of a thread at most; 0 leaves it to the compiler.
        early: whether a program may begin before the one before it has ended: 1 reads the index ahead.
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
    registers: int = 0
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


def features_first(side: Side, tokens: int) -> bool:
    """Tell whether x is transposed before the product: where single columns are gathered for several tokens."""
    return tokens > 1 and side.width % MIN_RUN != 0


def copies(side: Side, dtype: torch.dtype) -> bool:
    """Tell whether the copy engine can bring blocks of this shape."""
    sides = (side.height, side.width)
    return dtype.itemsize == 2 and all(size % 16 == 0 and size & (size - 1) == 0 for size in sides)


def default_plan(side: Side, tokens: int, dtype: torch.dtype) -> Plan:
    """Give the plan that is taken untuned.

    Args:
        side: the weight, in the direction of the call.
        tokens: rows of x, at least 1.
        dtype: of x and weight.
    """
    first = features_first(side, tokens)
    if tokens <= FEW_TOKENS and side.stride_inner == 1:
        many = tokens > 1
        return _few(side, 16 if many else 1, features_first=first)
    m = min(128, max(16, power_of_two(tokens)))
    if dtype.itemsize > 2:
        m, o = min(m, 64), min(32, max(16, power_of_two(side.height)))
        return Plan("gather", m, o, 16, warps=4, stages=3, features_first=first)
    o = min(128, max(16, power_of_two(side.height)))
    # The matrix product of a warp group is at least 64 rows high: of tokens, or of the weight where tokens are fewer.
    swapped = m < 64 <= o
    warps = 8 if m * o > 128 * 64 else 4
    if copies(side, dtype) and not first:
        return Plan("copy", m, o, min(side.width, 64), warps=warps, stages=3, swapped=swapped)
    k = 64 if first or side.width % 64 == 0 else max(16, min(64, side.width & -side.width))
    return Plan("gather", m, o, k, warps=warps, stages=3, features_first=first, swapped=swapped)


def _few(side: Side, m: int, *, features_first: bool, k: int | None = None, o: int | None = None) -> Plan:
    rows = max(16 if m > 1 else 8, min(16, power_of_two(side.height)))
    return Plan("few", m, o or rows, k or (256 if m == 1 else 128), stages=1, features_first=features_first)


def candidates(side: Side, tokens: int, dtype: torch.dtype) -> list[Plan]:
    """List the plans that are worth trying, the default first.

    Args:
        side: the weight, in the direction of the call.
        tokens: rows of x, at least 1.
        dtype: of x and weight.
    """
    start = default_plan(side, tokens, dtype)
    if start.program == "few":
        found = [replace(start, k=k, warps=warps) for k in (128, 256, 512) for warps in (4, 8)]
    elif dtype.itemsize > 2:
        found = [replace(start, m=m, warps=warps) for m in (32, 64) for warps in (4, 8) if m <= start.m]
    else:
        found = _many(start, side, tokens, dtype)
    return list(dict.fromkeys([start, *found]))


def _many(start: Plan, side: Side, tokens: int, dtype: torch.dtype) -> list[Plan]:
    found = []
    for m, warps, stages in ((64, 4, 4), (128, 4, 3), (128, 8, 4), (256, 8, 3)):
        if m > max(16, power_of_two(tokens)):
            continue
        found.append(replace(start, m=m, warps=warps, stages=stages))
        if copies(side, dtype) and not start.features_first:
            o = min(side.height, 128)
            found.append(Plan("copy", m, o, min(side.width, 64), warps=warps, stages=stages))
    return found

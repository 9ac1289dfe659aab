"""Blocks of weights of which each rank holds a shard (FSDP2).

A shard is a run of rows (of columns, where a linear is stored the other way round) that starts and ends anywhere:
most shards begin and end inside a block. A shard is therefore cut into parts in which all blocks, or the pieces of
blocks that this rank holds, have one size; each part is then treated as a whole weight is. Only sums of squares per
block travel between ranks, all layers in one message.

Everything here also takes whole weights, which cost no message and no cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from hf_sparse.core import blocks
from hf_sparse.core.blocks import BlockShape, block_norms, grid_shape, scale_blocks_, to_blocks
from hf_sparse.training.distributed.ranks import on_wire, sum_over_ranks


@dataclass(frozen=True, kw_only=True)
class Part:
    """A rectangle of a shard that holds pieces of blocks of one size.

    Attributes:
        rows, cols: where it lies in the shard.
        grid_rows, grid_cols: which blocks of the whole weight it belongs to.
        shape: (h, w) of the pieces, at most the block shape.
    """

    rows: slice
    cols: slice
    grid_rows: slice
    grid_cols: slice
    shape: BlockShape


@functools.cache
def parts_of_shard(offset: tuple[int, int], size: tuple[int, int], block_shape: BlockShape) -> tuple[Part, ...]:
    """Cut a shard along the edges of blocks.

    Args:
        offset: where the shard's first row and column lie in the whole weight.
        size: rows and columns of the shard; may be 0.
        block_shape: (h, w), both positive.

    Returns:
        At most 9 parts, which cover the shard without overlap.

    Example:
        >>> [(part.rows, part.grid_rows, part.shape) for part in parts_of_shard((3, 0), (6, 2), (4, 1))]
        [(slice(0, 1, None), slice(0, 1, None), (1, 1)), (slice(1, 5, None), slice(1, 2, None), (4, 1)), \
(slice(5, 6, None), slice(2, 3, None), (1, 1))]
    """
    (rows, cols) = (list(_cuts(at, count, step)) for at, count, step in zip(offset, size, block_shape, strict=True))
    return tuple(
        Part(rows=row[0], cols=col[0], grid_rows=row[1], grid_cols=col[1], shape=(row[2], col[2]))
        for row in rows
        for col in cols
    )


def _cuts(offset: int, size: int, step: int) -> Iterator[tuple[slice, slice, int]]:
    at, end = offset, offset + size
    while at < end:
        # Up to the next edge, or over all whole blocks at once where it begins on one.
        stop = (
            at + (end - at) // step * step if at % step == 0 and end - at >= step else min(end, at - at % step + step)
        )
        height = min(step, stop - at)
        yield slice(at - offset, stop - offset), slice(at // step, -(-stop // step)), height
        at = stop


def is_sharded(tensor: Tensor | None) -> bool:
    """Tell whether a tensor is one of which each rank holds a part."""
    return isinstance(tensor, DTensor)


def reshard(model: nn.Module) -> None:
    """Let go of weights that a forward without a backward has gathered: writing to those would change nothing."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def norms_of_blocks(
    weights: Mapping[str, Tensor],
    block_shapes: Mapping[str, BlockShape],
    factors: Callable[[str], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Compute the L2 norms of all blocks of all weights; the same on all ranks.

    Args:
        weights: {name: [O, I]}, whole or sharded.
        block_shapes: {name: (h, w)}, both positive.
        factors: gives for a name what its weights count times: [I] for the columns, or a scalar or [O, I], sharded as
            the weight is. Asked for one weight after the other, so that no more than one product is held. None = 1.

    Returns:
        {name: [R, C]}, as `core.blocks.block_norms` gives them.
    """
    squares: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    for name, weight in weights.items():
        factor = None if factors is None else factors(name).to(weight.device, weight.dtype)
        if factor is not None and (factor.ndim != 1 or not isinstance(weight, DTensor)):
            weight, factor = weight * factor, None
        if not isinstance(weight, DTensor):
            norms[name] = block_norms(weight, block_shapes[name])
            continue
        local, offset = _local(weight)
        grid = grid_shape((weight.shape[0], weight.shape[1]), block_shapes[name])
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        total = squares[name] = local.new_zeros(grid, dtype=wide)
        for part in parts_of_shard(offset, (local.shape[0], local.shape[1]), block_shapes[name]):
            piece = local[part.rows, part.cols]
            if factor is not None:
                start = offset[1] + part.cols.start
                piece = piece * factor[start : start + piece.shape[1]].to(piece.device)
            total[part.grid_rows, part.grid_cols] += block_norms(piece, part.shape).square()
    if squares:
        summed = _sum_over_shards({name: weights[name] for name in squares}, squares)
        norms |= {name: square.sqrt() for name, square in summed.items()}
    return {name: norms[name] for name in weights}


@torch.no_grad()
def scale_blocks_of_(weight: Tensor, factors: Tensor, block_shape: BlockShape) -> None:
    """Multiply every block of a weight by its own factor, in place.

    Args:
        weight: [O, I], whole or sharded.
        factors: [R, C], bool or floating point, of the whole weight.
        block_shape: (h, w), both positive.
    """
    if not isinstance(weight, DTensor):
        scale_blocks_(weight, factors, block_shape)
        return
    local, offset = _local(weight)
    for part in parts_of_shard(offset, (local.shape[0], local.shape[1]), block_shape):
        scale_blocks_(local[part.rows, part.cols], factors[part.grid_rows, part.grid_cols], part.shape)


@torch.no_grad()
def add_scaled_blocks_(
    target: Tensor, weight: Tensor, factors: Tensor, block_shape: BlockShape, alpha: float = 1.0
) -> None:
    """Add alpha * factor * block to every block of a gradient, in place.

    Args:
        target: [O, I], whole or sharded as `weight` is.
        weight: [O, I].
        factors: [R, C], floating point, of the whole weight.
        block_shape: (h, w), both positive.
        alpha: a number.
    """
    if not isinstance(weight, DTensor):
        blocks.add_scaled_blocks_(target, weight, factors, block_shape, alpha)
        return
    (local, offset), (onto, _) = _local(weight), _local(target)
    for part in parts_of_shard(offset, (local.shape[0], local.shape[1]), block_shape):
        piece, factor = local[part.rows, part.cols], factors[part.grid_rows, part.grid_cols]
        blocks.add_scaled_blocks_(onto[part.rows, part.cols], piece, factor, part.shape, alpha)


@torch.no_grad()
def pruned_are_zero(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], shapes: Mapping[str, BlockShape]
) -> bool:
    """Tell whether every pruned block of every weight is exactly zero, on all ranks. Waits for the device."""
    bad = 0
    for name, weight in weights.items():
        (local, offset), mask = _local(weight), masks[name]
        mask = mask.to(local.device)
        for part in parts_of_shard(offset, (local.shape[0], local.shape[1]), shapes[name]):
            pruned = ~mask[part.grid_rows, part.grid_cols]
            bad += int(to_blocks(local[part.rows, part.cols], part.shape)[pruned].ne(0).any())
    return not int(sum_over_ranks(torch.tensor(bad)))


@torch.no_grad()
def all_finite(weights: Mapping[str, Tensor]) -> dict[str, bool]:
    """Tell for every weight whether it is finite on all ranks. Waits for the device."""
    bad = torch.tensor([int(not torch.isfinite(_local(weight)[0]).all()) for weight in weights.values()])
    return {name: count == 0 for name, count in zip(weights, sum_over_ranks(bad).tolist(), strict=True)}


def _local(weight: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """This rank's part of a weight, sharing memory, and where it begins."""
    if not isinstance(weight, DTensor):
        return weight.detach(), (0, 0)
    local, offset = weight.to_local().detach(), [0, 0]
    for mesh_dim in _shard_dims(weight):
        dim: int = weight.placements[mesh_dim].dim  # type: ignore[attr-defined]
        ranks = weight.device_mesh.size(mesh_dim)
        # As torch.chunk cuts: equal chunks, rounded up, the last ones short or empty.
        chunk = -(-weight.shape[dim] // ranks)
        offset[dim] = min(weight.device_mesh.get_local_rank(mesh_dim) * chunk, weight.shape[dim])
    return local, (offset[0], offset[1])


def _shard_dims(weight: DTensor) -> list[int]:
    dims = [at for at, placement in enumerate(weight.placements) if type(placement) is Shard]
    others = [p for p in weight.placements if type(p) is not Shard and not isinstance(p, Replicate)]
    if others or len(dims) > 1:
        raise ValueError(
            f"a weight is placed as {weight.placements}: only weights that are sharded once, as FSDP2 does, can be "
            f"pruned. Use no tensor parallelism."
        )
    return dims


def _sum_over_shards(weights: Mapping[str, Any], squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # One message per group of ranks and dtype; there is one of each unless layers are sharded in several ways.
    groups: dict[Any, list[str]] = {}
    for name, weight in weights.items():
        dims = _shard_dims(weight)
        group = weight.device_mesh.get_group(dims[0]) if dims else None
        copies = [at for at in range(weight.device_mesh.ndim) if at not in dims and weight.device_mesh.size(at) > 1]
        key = group, tuple(weight.device_mesh.get_group(at) for at in copies), squares[name].dtype
        groups.setdefault(key, []).append(name)
    summed: dict[str, Tensor] = {}
    for (group, copies, _), names in groups.items():
        flat = torch.cat([squares[name].reshape(-1) for name in names])
        if group is not None:
            message = on_wire(flat)
            dist.all_reduce(message, group=group)
            for replicas in copies:
                # Copies of a shard that add up in another order would drift apart, and nothing would bring them back.
                dist.broadcast(message, src=dist.get_global_rank(replicas, 0), group=replicas)
            flat = message.to(flat.device)
        for name, part in zip(names, flat.split([squares[name].numel() for name in names]), strict=True):
            summed[name] = part.view_as(squares[name])
    return summed

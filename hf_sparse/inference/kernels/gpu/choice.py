"""Which plan a call takes: the one that was tuned for its shape, or a default while tuning is off or impossible."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_sparse.inference.kernels.gpu import launch
from hf_sparse.inference.kernels.gpu.layout import Side
from hf_sparse.inference.kernels.gpu.plan import FEW_TOKENS, Plan, candidates, default_plan, power_of_two
from hf_sparse.inference.kernels.gpu.tune import Plans, fastest, plans_file

logger = logging.getLogger(__name__)

_MANY_TOKENS = 16384


def token_bucket(tokens: int) -> int:
    """Give the number of tokens that a call is tuned for.

    Example:
        >>> [token_bucket(n) for n in (1, 2, 16, 17, 40, 10**6)]
        [1, 16, 16, 32, 64, 16384]
    """
    if tokens == 1:
        return 1
    return FEW_TOKENS if tokens <= FEW_TOKENS else min(_MANY_TOKENS, power_of_two(tokens))


def plan_for(x: Tensor, values: Tensor, side: Side, density: float, launches: dict[Any, Any]) -> Plan:
    """Choose the plan of a call, and tune it where that has not been done.

    While a CUDA graph is recorded nothing can be timed: a shape that was never called before takes its default plan
    there. Call a model once before you record it.

    Args:
        x: [M, I].
        values: [N, h, w].
        side: the bands of the weight.
        density: fraction of blocks kept.
        launches: of the weight; remembers the choice.
    """
    return _allowed(_plan_for(x, values, side, density, launches), x.device, launches)


@cache
def _overlaps(device: torch.device) -> bool:
    # Programs that begin before the one before them has ended came with compute capability 9.0.
    return (
        device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def _allowed(plan: Plan, device: torch.device, launches: dict[Any, Any]) -> Plan:
    # Weights that an optimizer writes to must not be read before it has ended.
    most = 0 if not _overlaps(device) else 1 if "written" in launches else 2
    return plan if plan.early <= most else replace(plan, early=most)


def _plan_for(x: Tensor, values: Tensor, side: Side, density: float, launches: dict[Any, Any]) -> Plan:
    bucket = token_bucket(x.shape[0])
    place = ("plan", side.stride_inner, side.block is None, bucket)
    plan = launches.get(place)
    if plan is not None:
        return plan
    if x.device.type != "cuda":
        return default_plan(side, bucket, x.dtype)
    plans = _plans(x.device)
    if plans is None:
        plan = default_plan(side, bucket, x.dtype)
        launches[place] = plan
        return plan
    key = shape_key(side, bucket, density, x.dtype)
    plan = plans.get(key)
    if plan is None:
        if torch.cuda.is_current_stream_capturing():
            return default_plan(side, bucket, x.dtype)
        plan = _tune(x, values, side, bucket)
        plans.put(key, plan)
    launches[place] = plan
    return plan


def shape_key(side: Side, bucket: int, density: float, dtype: torch.dtype) -> str:
    """Name what calls that share a plan have in common.

    Example:
        >>> from hf_sparse.inference.kernels.gpu.layout import Side
        >>> side = Side(torch.zeros(2, 3), None, torch.zeros(4), 64, 64, 64, 1, 256)
        >>> shape_key(side, 16, 0.11, torch.bfloat16)
        'forward 128x256 blocks 64x64 density 1/8 tokens 16 bfloat16'
    """
    way = "forward" if side.stride_inner == 1 and side.block is None else "backward"
    share = power_of_two(max(1, round(0.75 / density))) if density else 1
    return (
        f"{way} {side.bands * side.height}x{side.features} blocks {side.height}x{side.width} density 1/{share} "
        f"tokens {bucket} {str(dtype).removeprefix('torch.')}"
    )


def suited(x: Tensor, plan: Plan) -> Tensor:
    """Give x as a plan reads it: rows contiguous, and aligned for the copy engine."""
    if plan.features_first or (x.stride(1) == 1 and plan.program != "copy"):
        return x
    rows = x.stride(0) * x.itemsize % 16 == 0 or x.shape[0] == 1
    if x.stride(1) == 1 and rows and x.stride(0) >= x.shape[1] and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format) if x.is_contiguous() else x.contiguous()


@cache
def _plans(device: torch.device) -> Plans | None:
    path = plans_file(device)
    return None if path is None else Plans(path)


@torch.no_grad()
def _tune(x: Tensor, values: Tensor, side: Side, bucket: int) -> Plan:
    given = torch.randn(bucket, x.shape[1], dtype=x.dtype, device=x.device)
    tried = list(dict.fromkeys(_allowed(plan, x.device, {}) for plan in candidates(side, bucket, x.dtype)))
    logger.info("trying %d plans for %s, %d tokens", len(tried), list(values.shape), bucket)
    with torch.cuda.device(x.device):
        return fastest(tried, lambda plan: launch.multiply(given, values, side, None, None, plan))

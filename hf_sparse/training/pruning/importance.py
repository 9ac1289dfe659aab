"""What a block is worth: a score per block, higher = kept longer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.core.blocks import BlockShape, block_norms
from hf_sparse.core.structure.experts import ExpertsWeight, Prunable
from hf_sparse.core.structure.targets import weight_view
from hf_sparse.training.distributed import sum_over_ranks, uncompiled


def magnitude(weight: Tensor, block_shape: BlockShape) -> Tensor:
    """Score blocks by the root mean square of their weights.

    Inside one weight this ranks as the L2 norm does; dividing by the block size makes blocks of different shapes
    comparable under a global budget.

    Args:
        weight: [O, I].
        block_shape: (h, w), both positive.

    Returns:
        [R, C], >= 0, float32 (float64 for a float64 weight).

    Example:
        >>> magnitude(torch.tensor([[3., 3., 0., 0.]]), (1, 2))
        tensor([[3., 0.]])
    """
    return block_norms(weight, block_shape) / (block_shape[0] * block_shape[1]) ** 0.5


def magnitudes(norms: Mapping[str, Tensor], block_shapes: Mapping[str, BlockShape]) -> dict[str, Tensor]:
    """Score blocks as `magnitude` does, from their L2 norms.

    Args:
        norms: {name: [R, C]}, >= 0.
        block_shapes: {name: (h, w)}, both positive.

    Returns:
        {name: [R, C]}, >= 0.
    """
    return {name: norm / (block_shapes[name][0] * block_shapes[name][1]) ** 0.5 for name, norm in norms.items()}


def activation(weight: Tensor, block_shape: BlockShape, input_rms: Tensor) -> Tensor:
    """Score blocks by the root mean square of what their weights multiply out to: |weight| times its input's size.

    Args:
        weight: [O, I].
        block_shape: (h, w), both positive.
        input_rms: [I], root mean square of each input feature; `input_rms` measures it.

    Returns:
        [R, C], >= 0, float32 (float64 for a float64 weight).

    Source: Wanda (Sun et al., ICLR 2024), there for single weights and without training.

    Example:
        >>> activation(torch.tensor([[3., 3., 1., 1.]]), (1, 2), torch.tensor([1., 1., 5., 5.]))
        tensor([[3., 5.]])
    """
    return magnitude(weight * input_rms.to(weight.device, weight.dtype), block_shape)


def refuse_unmeasured(targets: Mapping[str, Prunable]) -> None:
    """Refuse targets whose inputs `input_rms` cannot see: what one of fused experts reads is no input of a module.

    Raises:
        ValueError: naming one, and the way out.
    """
    if experts := [name for name, target in targets.items() if isinstance(target, ExpertsWeight)]:
        raise ValueError(
            f'importance="activation" cannot see what each of the experts in {experts[0]} reads (one of '
            f'{len(experts)} fused weights). Use importance="fisher", the default, or "magnitude", or leave experts '
            f"out with exclude_modules."
        )


@torch.no_grad()
def input_rms(
    model: nn.Module, targets: Mapping[str, Prunable], micro_batches: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Measure how large the inputs of linears are on a batch. Padding does not count.

    The result does not depend on how samples are split into micro-batches or over ranks, up to rounding.

    Args:
        model: run in eval mode; its mode is put back.
        targets: {name: linear} of the model.
        micro_batches: what the model is called with, on its device.

    Returns:
        {name: [I], float32}; ones for a linear that no token has reached.

    Raises:
        ValueError: as `refuse_unmeasured`.
    """
    refuse_unmeasured(targets)
    squares: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}

    def add(mask: Any, name: str, inputs: Tensor) -> None:
        flat = inputs.detach().float().flatten(0, -2)
        real = torch.ones(len(flat), device=flat.device)
        if isinstance(mask, Tensor) and mask.shape == inputs.shape[:-1]:
            real = mask.flatten().ne(0).float()
        square, count = (flat.square() * real[:, None]).sum(0), real.sum()
        squares[name] = squares[name] + square if name in squares else square
        counts[name] = counts[name] + count if name in counts else count

    was_training = model.training
    model.eval()
    try:
        for batch in micro_batches:
            with _watching(targets, partial(add, batch.get("attention_mask"))), uncompiled(model):
                model(**batch)
    finally:
        model.train(was_training)
    rms = {}
    parts: list[Tensor] = []
    for name, module in targets.items():
        weight = weight_view(module)
        nothing = torch.zeros(weight.shape[1], device=weight.device)
        parts += [squares.get(name, nothing), counts.get(name, nothing[0]).reshape(1)]
    # One message for all layers.
    summed = sum_over_ranks(torch.cat(parts)).split([len(part) for part in parts]) if parts else ()
    for name, square, count in zip(targets, summed[::2], summed[1::2], strict=True):
        rms[name] = torch.where(count > 0, (square / count.clamp(min=1.0)).sqrt(), 1.0)
    return rms


@contextlib.contextmanager
def _watching(targets: Mapping[str, Any], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs[0]))
        for name, module in targets.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

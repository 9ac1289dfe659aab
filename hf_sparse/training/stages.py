"""The stages of the papers' recipes inside one run: what is trained at all, and where learning starts anew.

Both papers train in stages of their own, each with a learning rate that begins at its peak again: Sparse Progressive
Distillation (Huang et al., ACL 2022) when the masks are final, Block Structured Pruning (Li et al., Findings of EMNLP
2020) with a new optimizer as well, because there each stage is a run by itself.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from hf_sparse.core.structure.targets import find_stacks

if TYPE_CHECKING:
    from hf_sparse.training.config import SparseDistillConfig


def freeze_outside_layers(model: nn.Module) -> None:
    """Freeze everything outside the repeated layers: embeddings, pooler and head keep their values.

    Raises:
        ValueError: if the model has no stack of layers.

    Example:
        >>> block = nn.Sequential(nn.Linear(2, 2))
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([block]), "head": nn.Linear(2, 2)})
        >>> freeze_outside_layers(model)
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['layers.0.0.weight', 'layers.0.0.bias']
    """
    inside = {id(p) for stack in find_stacks(model).values() for p in stack.parameters()}
    if not inside:
        raise ValueError(f"{type(model).__name__} has no stack of repeated layers: set train_only_layers=False.")
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.requires_grad_(False)


def restart_step(lr_restart: float, total_steps: int) -> int | None:
    """Give the 0-based step that runs at the peak learning rate again; None where there is no restart.

    Like a mask update at the same fraction, it leaves at least one step after it.

    Example:
        >>> restart_step(0.5, 8), restart_step(0.0, 8)
        (4, None)
    """
    step = min(math.ceil(round(lr_restart * total_steps, 6)), total_steps - 1)
    return step if lr_restart and step > 0 else None


def restarting_scheduler(args: SparseDistillConfig, optimizer: Any, total_steps: int) -> LambdaLR | None:
    """Make a schedule that runs `lr_scheduler_type`, warm-up included, once up to `lr_restart` and once after it.

    Args:
        args: the run's settings.
        optimizer: whose learning rates are scheduled.
        total_steps: optimizer steps of the whole run.

    Returns:
        The schedule; None where there is no restart.

    Raises:
        ValueError: for a schedule that is no function of the step alone.
    """
    restart = restart_step(args.lr_restart, total_steps)
    if restart is None:
        return None
    stages: list[Any] = []
    for steps in (restart, total_steps - restart):
        # TrainingArguments has parsed the keywords, whatever its annotation says.
        keywords = cast("dict[str, Any] | None", args.lr_scheduler_kwargs)
        schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, keywords)
        if not isinstance(schedule, LambdaLR):
            raise ValueError(
                f"lr_restart={args.lr_restart} needs a learning rate that follows from the step alone, not "
                f"lr_scheduler_type={str(args.lr_scheduler_type)!r}: use another type, or lr_restart=0."
            )
        stages.append(schedule.lr_lambdas[0])
    before, after = stages
    return LambdaLR(optimizer, lambda step: before(step) if step < restart else after(step - restart))


def reset_optimizer(args: SparseDistillConfig, optimizer: Any, step: int, total_steps: int) -> None:
    """Let the optimizer go on as a new one would, if `reset_optimizer` asks for it and this is the step to do so."""
    if args.reset_optimizer and step == restart_step(args.lr_restart, total_steps):
        optimizer.state.clear()


def with_graph(loss: Tensor) -> Tensor:
    """Let a loss be differentiated that depends on nothing trained: every layer was grafted in this step."""
    return loss if loss.requires_grad else loss + torch.zeros_like(loss, requires_grad=True)

"""Models under FSDP2: the teacher sharded as the student is, and a whole copy of the student where it is saved."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hf_sparse.core.structure.experts import ExpertsWeight, Prunable
from hf_sparse.core.structure.targets import find_stacks
from hf_sparse.training.distributed.ranks import on_wire
from hf_sparse.training.distributed.shards import reshard


class Engine:
    """What is special about a run whose weights are sharded; does nothing in any other.

    Args:
        accelerator: the trainer's.
        model: the student, before training.
    """

    def __init__(self, accelerator: Any, model: nn.Module) -> None:
        self.accelerator = accelerator
        self.is_sharded = bool(accelerator.is_fsdp2)
        self._skeleton = skeleton_of(model) if self.is_sharded else None
        if self.is_sharded and not accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap:
            # What models name for the purpose may hold their embeddings, which accelerate then shards a second time.
            layers = {type(layer).__name__ for stack in find_stacks(model).values() for layer in stack}
            accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(layers) or None

    def check_targets(self, targets: Mapping[str, Prunable]) -> None:
        """Refuse fused experts that cannot be shared evenly by the ranks: a shard has to hold whole experts.

        Args:
            targets: {name: linear or fused experts} of the run.

        Raises:
            ValueError: naming one, and the way out.
        """
        ranks = self.accelerator.num_processes if self.is_sharded else 1
        for name, target in targets.items():
            if isinstance(target, ExpertsWeight) and target.experts % ranks:
                raise ValueError(
                    f"{name} holds {target.experts} experts, which {ranks} ranks cannot share evenly under FSDP2. Use "
                    f"a number of ranks that divides it, DDP, or leave experts out with exclude_modules."
                )

    def place_teacher(self, teacher: nn.Module, grafted: bool) -> None:
        """Shard a teacher that is on its device.

        Teachers whose layers are grafted stay whole on every rank: outside their own model's forward nothing would
        gather their layers.
        """
        if self.is_sharded and not grafted:
            shard_teacher(teacher, self.accelerator)

    def complete_teacher(self, teacher: nn.Module) -> None:
        """Fill a teacher on the ranks on which accelerate loads no weights."""
        if self.is_sharded and self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            take_values_of_rank_0_(teacher)

    def runnable(self, student: nn.Module, wrapped: nn.Module) -> nn.Module:
        """Give the module whose forward runs the student where the training loop does not: mostly the student itself.

        Where a compiler's module was sharded, nothing but that one gathers all weights.
        """
        return wrapped if self.is_sharded and not isinstance(student, FSDPModule) else student

    def whole(self, model: nn.Module, keep: bool) -> nn.Module | None:
        """Give the student whole: itself, or gathered on the CPU where it is sharded. Call it on all ranks.

        Args:
            model: the student.
            keep: whether this rank wants it; None is returned without.
        """
        if self._skeleton is None or not is_sharded_model(model):
            return model if keep else None
        return gather(model, self._skeleton, keep)


def shard_teacher(teacher: nn.Module, accelerator: Any) -> None:
    """Shard a frozen teacher over the ranks, layer by layer, as accelerate shards the student.

    Args:
        teacher: whole, and the same on all ranks; changed in place.
        accelerator: of a run under FSDP2.
    """
    plugin, mesh = accelerator.state.fsdp_plugin, getattr(accelerator, "torch_device_mesh", None)
    settings: dict[str, Any] = {
        "mesh": mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)] if mesh is not None else None,
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "offload_policy": plugin.cpu_offload,
        # A teacher has no backward before which its layers would be gathered again.
        "reshard_after_forward": True,
    }
    for stack in find_stacks(teacher).values():
        for layer in stack:
            fully_shard(layer, **settings)
    fully_shard(teacher, **settings)


@torch.no_grad()
def take_values_of_rank_0_(model: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0's model, in place.

    Where accelerate loads checkpoints on one rank only (`fsdp_cpu_ram_efficient_loading`), the others hold anything.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        message = on_wire(tensor.detach()).contiguous()
        dist.broadcast(message, src=0)
        tensor.copy_(message)


def skeleton_of(model: nn.Module) -> nn.Module:
    """Copy a model without its weights, before it is sharded: its modules, its buffers, parameters on "meta"."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    skeleton = copy.deepcopy(model, memo)
    for module in skeleton.modules():
        module.__dict__.pop("block_mask", None)
    return skeleton


@torch.no_grad()
def gather(model: nn.Module, skeleton: nn.Module, keep: bool) -> nn.Module | None:
    """Put a sharded model together on the CPU, one weight after the other. Call it on all ranks.

    Args:
        model: sharded; not changed.
        skeleton: `skeleton_of` the model before it was sharded.
        keep: whether this rank wants the result; the others only send.

    Returns:
        A whole model of the class that was sharded, sharing nothing with `model`; None without `keep`.
    """
    reshard(model)
    whole: dict[str, Tensor] = {}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    copies: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in copies:
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            copies[id(tensor)] = full.detach().to("cpu", copy=True) if keep else torch.empty(0)
        whole[_plain(name)] = copies[id(tensor)]
    if not keep:
        return None
    result = copy.deepcopy(skeleton)
    made: dict[int, nn.Parameter] = {}
    for prefix, module in result.named_modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    value = whole[f"{prefix}.{name}" if prefix else name]
                    if held is module._parameters:
                        value = made.setdefault(id(value), nn.Parameter(value, tensor.requires_grad))
                    held[name] = value
    if hasattr(model, "config"):
        result.config = model.config
    return result.train(model.training)


def uncompiled(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Let a compiler's module run what it was made from, for as long as the context lasts."""
    compiled = hasattr(model, "_orig_mod")
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


def is_sharded_model(model: nn.Module) -> bool:
    """Tell whether a model has been sharded by FSDP2."""
    # Where a compiler's module was sharded, the model inside is none of FSDP's, though its weights are.
    return isinstance(model, FSDPModule) or any(isinstance(weight, DTensor) for weight in model.parameters())


def plain_class(module: nn.Module) -> type:
    """Give a module's class as it was before FSDP2 put its own in front, or a wrapper for checkpointing around it.

    Example:
        >>> plain_class(nn.Linear(1, 1)).__name__
        'Linear'
    """
    module = getattr(module, "_checkpoint_wrapped_module", module)
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


def _plain(name: str) -> str:
    # Activation checkpointing of FSDP and the compiler put modules of their own in between.
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")

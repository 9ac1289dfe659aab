"""Teacher layers in the student's place, for one forward.

A site is one layer of a stack that student and teacher share. While grafted, the student's own list of layers holds
the teacher's layer there; afterwards it is put back, so that parameters, names and checkpoints never change.

Source: Sparse Progressive Distillation (Huang et al., ACL 2022); module replacement after BERT-of-Theseus.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_sparse.core.structure.targets import find_stacks
from hf_sparse.training.distributed import plain_class

# What a model computes once from its config and hands to every layer: rotary positions, windows of attention.
_HANDED_TO_LAYERS = ("rope_parameters", "head_dim", "layer_types", "sliding_window")


@dataclass(frozen=True, kw_only=True)
class GraftSite:
    """One place where a teacher layer can stand in for the student's."""

    stack: nn.ModuleList
    index: int
    teacher_layer: nn.Module


def graft_sites(student: nn.Module, teacher: nn.Module) -> list[GraftSite]:
    """Pair the layers of student and teacher.

    Returns:
        One site per layer of every stack, in the model's own order.

    Raises:
        ValueError: if the student has no stack of layers, or the teacher's stacks differ in name, number of layers,
            class or hidden size, or the two use different attention implementations, positions or windows.
    """
    mine, theirs = find_stacks(student), find_stacks(teacher)
    attention = [getattr(getattr(m, "config", None), "_attn_implementation", None) for m in (student, teacher)]
    if attention[0] != attention[1]:
        # Each implementation is handed its own kind of mask: another one's layer would look at what it must not see.
        raise ValueError(
            f"grafting needs one attention implementation: the student uses {attention[0]!r}, the teacher "
            f"{attention[1]!r}. Call teacher.set_attn_implementation({attention[0]!r})."
        )
    if not mine:
        raise ValueError(f"{type(student).__name__} has no stack of repeated layers to graft: set graft_start=1.")
    if list(mine) != list(theirs):
        raise ValueError(
            f"grafting needs the same stacks of layers: the student has {list(mine)}, the teacher {list(theirs)}. "
            f"Use a teacher of the student's architecture, or set graft_start=1."
        )
    for key in _HANDED_TO_LAYERS:
        values = [getattr(_text_config(m), key, None) for m in (student, teacher)]
        if values[0] != values[1]:
            raise ValueError(
                f"grafting needs layers that can be handed the same positions and masks: {key} is {values[0]!r} in "
                f"the student and {values[1]!r} in the teacher. Set graft_start=1 for such a teacher."
            )
    sites = []
    for name, stack in mine.items():
        if len(stack) != len(theirs[name]):
            raise ValueError(
                f"grafting needs as many layers: {name} has {len(stack)} in the student and {len(theirs[name])} in "
                f"the teacher. Use a teacher of the same depth, or set graft_start=1."
            )
        for index, (layer, teacher_layer) in enumerate(zip(stack, theirs[name], strict=True)):
            kinds = [plain_class(module) for module in (layer, teacher_layer)]
            if kinds[0] is not kinds[1] or _norm_sizes(layer) != _norm_sizes(teacher_layer):
                raise ValueError(
                    f"grafting needs layers that fit each other: {name}.{index} is a {kinds[0].__name__} with norms "
                    f"of {_norm_sizes(layer)} in the student and a {kinds[1].__name__} with norms of "
                    f"{_norm_sizes(teacher_layer)} in the teacher. Set graft_start=1 for such a teacher."
                )
            sites.append(GraftSite(stack=stack, index=index, teacher_layer=teacher_layer))
    return sites


@contextlib.contextmanager
def graft_at(sites: Sequence[GraftSite], runs_student: Sequence[bool]) -> Iterator[None]:
    """Run teacher layers at the sites where `runs_student` is False, until the block ends.

    Args:
        sites: as `graft_sites` gives them.
        runs_student: one bool per site, True = the student's own layer.

    Raises:
        ValueError: if the two differ in length.
    """
    if len(sites) != len(runs_student):
        raise ValueError(f"runs_student has {len(runs_student)} entries for {len(sites)} sites: give one per site.")
    replaced = [site for site, own in zip(sites, runs_student, strict=True) if not own]
    own_layers = [site.stack[site.index] for site in replaced]
    try:
        for site in replaced:
            # Not through setattr of the list: that would register the teacher for good if the block raised.
            site.stack._modules[str(site.index)] = site.teacher_layer
        yield
    finally:
        for site, layer in zip(replaced, own_layers, strict=True):
            site.stack._modules[str(site.index)] = layer


@contextlib.contextmanager
def graft(student: nn.Module, teacher: nn.Module, runs_student: Sequence[bool]) -> Iterator[None]:
    """Graft teacher layers into the student for one forward.

    Args:
        student: changed inside the block only.
        teacher: same architecture; freeze it and put it in eval mode first.
        runs_student: one bool per layer, True = the student's own layer; `schedules.graft_draws` draws them.

    Raises:
        ValueError: if the models do not fit each other or `runs_student` has another length.

    Example:
        >>> import torch
        >>> def make(scale):
        ...     layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2, bias=False)) for _ in range(2))
        ...     for layer in layers: torch.nn.init.eye_(layer[0].weight).mul_(scale)
        ...     return nn.ModuleDict({"layers": layers})
        >>> with torch.no_grad():
        ...     student, teacher, x = make(2.0), make(10.0), torch.ones(2)
        ...     with graft(student, teacher, [True, False]):
        ...         for layer in student["layers"]: x = layer(x)
        >>> x.tolist()
        [20.0, 20.0]
    """
    with graft_at(graft_sites(student, teacher), runs_student):
        yield


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _norm_sizes(layer: nn.Module) -> list[int]:
    # What passes between layers goes through the norms; widths inside a layer may differ.
    return sorted({p.numel() for m in layer.modules() if "norm" in type(m).__name__.lower() for p in m.parameters()})

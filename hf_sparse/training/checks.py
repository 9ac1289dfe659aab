"""What the fields of `SparseDistillConfig` may hold, and which of them go together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hf_sparse.core.structure.overrides import is_block_size
from hf_sparse.core.structure.targets import compile_pattern
from hf_sparse.training.distillation.distill import HIDDEN_FORMS
from hf_sparse.training.schedules import SCHEDULES

if TYPE_CHECKING:
    from hf_sparse.training.config import SparseDistillConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "feed_forward": ("blocks", "units"),
    "sparsity_scope": ("auto", "layer", "global"),
    "sparsity_schedule": SCHEDULES,
    "embedding_pooling": ("mean", "cls", "last"),
    "importance": ("magnitude", "activation", "fisher"),
    "hidden_form": HIDDEN_FORMS,
    "penalty_form": ("loss", "proximal"),
    "save_format": ("compressed", "dense", "cropped"),
}

LAYER_SHARE = 0.1  # the default of layer_share
HIDDEN_WEIGHT = 1.0  # what hidden_weight=None stands for


def check_settings(config: SparseDistillConfig) -> None:
    """Check every field of hf_sparse.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name}={getattr(config, name)!r} is not known: use one of {list(choices)}.")
    for name in ("block_height", "block_width"):
        if not is_block_size(value := getattr(config, name)):
            raise ValueError(
                f"{name}={value!r} is not a block size: use a positive integer, or -1 for the whole side."
            )
    _check_number(config, "sparsity", 0.0, 1.0, high_open=True)
    _check_number(config, "lr_restart", 0.0, 1.0, high_open=True)
    if config.reset_optimizer and not config.lr_restart:
        raise ValueError("reset_optimizer=True has no effect with lr_restart=0: set lr_restart, or leave it out.")
    for name in ("layer_share", "sparsity_start", "sparsity_end", "graft_start", "graft_hold", "graft_end"):
        _check_number(config, name, 0.0, 1.0)
    for name in ("penalty_weight", "task_weight", "kd_weight", "hidden_weight", "attention_weight"):
        if (name, getattr(config, name)) != ("hidden_weight", None):
            _check_number(config, name, 0.0, math.inf, high_open=True)
    for name in ("penalty_epsilon", "kd_temperature"):
        _check_number(config, name, 0.0, math.inf, low_open=True, high_open=True)
    for name, low in (("mask_updates", 1), ("penalty_reweights", 0)):
        if not _is_int(value := getattr(config, name)) or value < low:
            raise ValueError(f"{name}={value!r} must be an integer of at least {low}.")
    for first, second in (("sparsity_start", "sparsity_end"), ("graft_hold", "graft_end")):
        if getattr(config, first) > getattr(config, second):
            raise ValueError(
                f"{first}={getattr(config, first)} lies after {second}={getattr(config, second)}: "
                f"{first} must be at most {second}."
            )
    if config.layer_share != LAYER_SHARE and config.budget_scope == "layer":
        raise ValueError(
            f"layer_share={config.layer_share!r} has no effect where each layer has a budget of its own "
            f"(sparsity_scope={config.sparsity_scope!r}, importance={config.importance!r}, "
            f"feed_forward={config.feed_forward!r}): set sparsity_scope='global', or leave it out."
        )
    if config.sparsity_end == 0.0 and config.sparsity > 0.0 and config.penalty_weight > 0.0:
        raise ValueError(
            "sparsity_end=0.0 leaves no step for penalty_weight to act: raise it, or set penalty_weight=0."
        )
    if not any((config.task_weight, config.kd_weight, config.wanted_hidden_weight, config.attention_weight)):
        raise ValueError(
            "task_weight, kd_weight, hidden_weight and attention_weight are all 0: nothing to learn from."
        )
    for name in ("target_modules", "exclude_modules"):
        if getattr(config, name) is not None:
            compile_pattern(name, getattr(config, name))
    if config.teacher_layers is not None and not (config.wanted_hidden_weight or config.attention_weight):
        raise ValueError(
            f"layer_map={config.layer_map!r} has no effect with hidden_weight=0 and attention_weight=0: "
            f"set one of them, or leave it out."
        )
    config.shape_overrides  # noqa: B018 (parsed here so that a mistake is refused at construction)


def _check_number(
    config: SparseDistillConfig, name: str, low: float, high: float, low_open: bool = False, high_open: bool = False
) -> None:
    value = getattr(config, name)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (low_open and value == low) or (high_open and value == high):
        interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
        raise ValueError(f"{name}={value!r} must be a number in {interval}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

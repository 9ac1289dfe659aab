"""Every choice of a sparse distillation run, as a `TrainingArguments` with more fields."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Self

from transformers import TrainingArguments

from hf_sparse.core.blocks import BlockShape
from hf_sparse.core.structure.overrides import parse_block_overrides
from hf_sparse.core.structure.targets import compile_pattern
from hf_sparse.training.distillation.layerwise import Layers, parse_layer_map
from hf_sparse.training.presets import PRESETS
from hf_sparse.training.schedules import SCHEDULES

CHOICES: dict[str, tuple[str, ...]] = {
    "feed_forward": ("blocks", "units"),
    "sparsity_scope": ("auto", "layer", "global"),
    "sparsity_schedule": SCHEDULES,
    "embedding_pooling": ("mean", "cls", "last"),
    "importance": ("magnitude", "activation", "fisher"),
    "penalty_form": ("loss", "proximal"),
    "save_format": ("compressed", "dense", "cropped"),
}

# Fields whose effect is compared otherwise, or that have none on a step.
_NO_FACTS = {
    "block_height", "block_width", "block_overrides", "target_modules", "exclude_modules", "sparsity_scope",
    "layer_share", "preset",
    "save_format",
}  # fmt: skip


_LAYER_SHARE = 0.25


def _field(default: Any, text: str) -> Any:
    """A field that a preset may set: None means "not given", so that every given value overrides the preset.

    argparse appends "(default: None)" to every help text that does not use `%(default)`; printing it with precision 0
    uses it and shows nothing, so that the text can name the real default.
    """
    return field(default=None, metadata={"help": f"{text} Default: {default}.%(default).0s", "default": default})


@dataclass
class SparseDistillConfig(TrainingArguments):
    """Training arguments of `SparseDistillTrainer`: everything `TrainingArguments` takes, and how to prune and distil.

    All fields are flat scalars that `HfArgumentParser` takes from a command line, a JSON or a YAML file. Fractions of
    training run from 0.0 (start) to 1.0 (end) over all optimizer steps.

    Raises:
        ValueError: at construction, for a value outside what its field allows; the message names field and value.

    Example:
        >>> config = SparseDistillConfig(output_dir="out", sparsity=0.9, block_height=4)
        >>> config.block_shape, config.sparsity_schedule
        ((4, 1), 'cubic')
    """

    block_height: int = _field(8, "Output rows per block; -1 = all of them.")
    block_width: int = _field(1, "Input columns per block; -1 = all of them.")
    block_overrides: str | None = field(
        default=None,
        metadata={
            "help": "JSON object, regular expression of module names -> [height, width]: '{\".*query\": [16, 16]}'."
        },
    )
    feed_forward: str = _field(
        "blocks",
        'How feed-forward parts are pruned: "blocks" (as all else) or "units" (a unit is a row of what leads in and a '
        "column of what leads out, removed together).",
    )
    target_modules: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression that matches the whole name of each linear to prune. None = every linear "
            "inside the repeated transformer layers; never embeddings, pooler, heads or tied weights."
        },
    )
    exclude_modules: str | None = field(
        default=None, metadata={"help": "Regular expression that matches the whole name of targets to leave dense."}
    )
    sparsity: float = _field(0.8, "Final fraction of blocks removed, in [0, 1); 0 = prune nothing.")
    sparsity_scope: str = _field(
        "auto",
        'Where blocks compete: "layer" (inside each weight), "global" (over all), or "auto": global where blocks are '
        'ranked by "fisher", whose scores compare layers, and feed_forward="blocks"; else each layer.',
    )
    layer_share: float = _field(
        _LAYER_SHARE,
        "Under a global budget, the share of a budget of its own, in [0, 1], that is decided inside each weight, so "
        "that none is emptied and none spared; the rest competes. 0 = all of it does, 1 = each fills its own.",
    )
    sparsity_schedule: str = _field("cubic", 'How sparsity rises: "cubic", "linear" or "one_shot" (at sparsity_end).')
    sparsity_start: float = _field(0.0, "Fraction of training at which pruning starts.")
    sparsity_end: float = _field(0.6, "Fraction of training at which the final sparsity is reached.")
    mask_updates: int = _field(
        100, "How many times the masks are chosen anew between sparsity_start and sparsity_end."
    )
    importance: str = _field(
        "fisher",
        'How blocks are ranked: by their weights ("magnitude"), these times their inputs ("activation") or '
        'gradients ("fisher").',
    )
    penalty_weight: float = _field(0.0, "Weight lambda of the reweighted group lasso; 0 = off.")
    penalty_form: str = _field(
        "loss", '"loss" (gradient of L + lambda R, clipped with it) or "proximal" (shrinks blocks).'
    )
    penalty_reweights: int = _field(
        4, "How often, from the start to sparsity_end, coef = 1 / (norm + penalty_epsilon) is taken; 0 = coef stays 1."
    )
    penalty_epsilon: float = _field(1e-3, "Keeps coef finite at a block of zeros.")
    task_weight: float = _field(0.5, "Weight of the task loss; 1.0 where there is no teacher, unless given.")
    kd_weight: float = _field(0.5, "Weight of the distillation of the teacher's logits, or of its embedding.")
    kd_temperature: float = _field(2.0, "Temperature of the distillation of logits.")
    embedding_pooling: str = _field(
        "mean",
        'How kd_weight makes an embedding of hidden states, for models without logits: "mean" of the real tokens, '
        '"cls" (the first) or "last" (the last real one).',
    )
    hidden_weight: float = _field(0.0, "Weight of the mean squared error between hidden states, summed over layers.")
    attention_weight: float = _field(
        0.0, "Weight of the mean squared error between attention maps, summed over layers."
    )
    layer_map: str | None = field(
        default=None,
        metadata={
            "help": 'Which teacher layer each layer learns from, for hidden_weight and attention_weight: "uniform", '
            "or a JSON list with one number (from 0) or null per layer; or one of these for each side: "
            '\'{"encoder": [1, 3], "decoder": "uniform"}\'. None = one to one.'
        },
    )
    graft_start: float = _field(1.0, "Probability, at the start, that a layer runs the student; 1 = no grafting.")
    graft_hold: float = _field(0.0, "Fraction of training up to which the graft probability stays at graft_start.")
    graft_end: float = _field(0.8, "Fraction of training at which the graft probability has risen to 1.")
    lr_restart: float = _field(
        0.0, "Fraction of training at which the learning-rate schedule starts anew from its peak; 0 = never."
    )
    reset_optimizer: bool = _field(False, "Whether the optimizer starts anew at lr_restart as well.")
    train_only_layers: bool = _field(
        False, "Whether embeddings, pooler and head are frozen, so that the repeated layers alone are trained."
    )
    preset: str | None = field(
        default=None,
        metadata={"help": "Settings that belong together, for the fields that are not given: "
                  + ", ".join(f'"{name}"' for name in PRESETS) + "."},
    )  # fmt: skip
    save_format: str = _field(
        "compressed",
        'Final save: "compressed", "dense" (zeros kept; loads without hf_sparse) or "cropped" (dense, without the '
        "feed-forward units that died in every layer, which any engine gains from).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} is not known: use one of {sorted(PRESETS)}, or None.")
        preset = PRESETS[self.preset] if self.preset else {}
        task_weight_given = self.task_weight is not None or "task_weight" in preset
        for spec in dataclasses.fields(self):
            if "default" in spec.metadata and getattr(self, spec.name) is None:
                setattr(self, spec.name, preset.get(spec.name, spec.metadata["default"]))
        self.validate()
        # Alone, half a task loss would only halve the learning rate of SGD and the clipping threshold of everything.
        if not task_weight_given and not self.needs_teacher:
            self.task_weight = 1.0
        # Layers that the teacher stands in for get no gradient in that step; DDP has to be told to look for them.
        if self.graft_start < 1.0 and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True

    def validate(self) -> None:
        """Check every field of hf_sparse; called at construction and again when a search has changed some.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: use one of {list(choices)}.")
        for name in ("block_height", "block_width"):
            if not _is_block_size(value := getattr(self, name)):
                raise ValueError(
                    f"{name}={value!r} is not a block size: use a positive integer, or -1 for the whole side."
                )
        self._check_number("sparsity", 0.0, 1.0, high_open=True)
        self._check_number("lr_restart", 0.0, 1.0, high_open=True)
        if self.reset_optimizer and not self.lr_restart:
            raise ValueError("reset_optimizer=True has no effect with lr_restart=0: set lr_restart, or leave it out.")
        for name in ("layer_share", "sparsity_start", "sparsity_end", "graft_start", "graft_hold", "graft_end"):
            self._check_number(name, 0.0, 1.0)
        for name in ("penalty_weight", "task_weight", "kd_weight", "hidden_weight", "attention_weight"):
            self._check_number(name, 0.0, math.inf, high_open=True)
        for name in ("penalty_epsilon", "kd_temperature"):
            self._check_number(name, 0.0, math.inf, low_open=True, high_open=True)
        for name, low in (("mask_updates", 1), ("penalty_reweights", 0)):
            if not _is_int(value := getattr(self, name)) or value < low:
                raise ValueError(f"{name}={value!r} must be an integer of at least {low}.")
        for first, second in (("sparsity_start", "sparsity_end"), ("graft_hold", "graft_end")):
            if getattr(self, first) > getattr(self, second):
                raise ValueError(
                    f"{first}={getattr(self, first)} lies after {second}={getattr(self, second)}: "
                    f"{first} must be at most {second}."
                )
        if self.layer_share != _LAYER_SHARE and self.budget_scope == "layer":
            raise ValueError(
                f"layer_share={self.layer_share!r} has no effect where each layer has a budget of its own "
                f"(sparsity_scope={self.sparsity_scope!r}, importance={self.importance!r}, "
                f"feed_forward={self.feed_forward!r}): set sparsity_scope='global', or leave it out."
            )
        if self.sparsity_end == 0.0 and self.sparsity > 0.0 and self.penalty_weight > 0.0:
            raise ValueError(
                "sparsity_end=0.0 leaves no step for penalty_weight to act: raise it, or set penalty_weight=0."
            )
        weights = (self.task_weight, self.kd_weight, self.hidden_weight, self.attention_weight)
        if not any(weights):
            raise ValueError(
                "task_weight, kd_weight, hidden_weight and attention_weight are all 0: nothing to learn from."
            )
        for name in ("target_modules", "exclude_modules"):
            if getattr(self, name) is not None:
                compile_pattern(name, getattr(self, name))
        if self.teacher_layers is not None and not (self.hidden_weight or self.attention_weight):
            raise ValueError(
                f"layer_map={self.layer_map!r} has no effect with hidden_weight=0 and attention_weight=0: "
                f"set one of them, or leave it out."
            )
        self.shape_overrides  # noqa: B018 (parsed here so that a mistake is refused at construction)

    def _check_number(
        self, name: str, low: float, high: float, low_open: bool = False, high_open: bool = False
    ) -> None:
        value = getattr(self, name)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        if not fits or (low_open and value == low) or (high_open and value == high):
            interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
            raise ValueError(f"{name}={value!r} must be a number in {interval}.")

    @property
    def block_shape(self) -> BlockShape:
        """(block_height, block_width), -1 where the whole dimension is one block."""
        return self.block_height, self.block_width

    @property
    def budget_scope(self) -> str:
        """`sparsity_scope` with "auto" resolved: "layer" or "global"."""
        if self.sparsity_scope != "auto":
            return self.sparsity_scope
        return "global" if self.importance == "fisher" and self.feed_forward == "blocks" else "layer"

    @property
    def shape_overrides(self) -> dict[str, BlockShape]:
        """`block_overrides` parsed: {regular expression: (h, w)}."""
        return parse_block_overrides(self.block_overrides)

    @property
    def teacher_layers(self) -> Layers | None:
        """`layer_map` parsed: None, "uniform" or one entry per layer, or {side: one of these}."""
        return parse_layer_map(self.layer_map)

    @property
    def needs_teacher(self) -> bool:
        """Whether any setting uses a teacher; without one none is held in memory."""
        return bool(self.kd_weight or self.hidden_weight or self.attention_weight or self.graft_start < 1.0)

    @property
    def agreed_facts(self) -> dict[str, Any]:
        """What a resumed run has to agree with: every field here that decides what a step does, and the seed.

        Layers and block shapes are not among them: masks know them exactly, whatever pattern they came from.
        """
        plain = {spec.name for spec in dataclasses.fields(TrainingArguments)}
        own = [spec.name for spec in dataclasses.fields(SparseDistillConfig) if spec.name not in plain | _NO_FACTS]
        return {name: getattr(self, name) for name in [*own, "seed"]}

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments) -> Self:
        """Take plain training arguments over, with the sparse defaults beside them.

        Raises:
            TypeError: if `args` is of a class whose own fields would be lost.
        """
        known = {spec.name for spec in dataclasses.fields(cls)}
        given = {spec.name: getattr(args, spec.name) for spec in dataclasses.fields(args) if spec.init}
        if lost := sorted(set(given) - known):
            raise TypeError(
                f"{type(args).__name__} has fields that {cls.__name__} does not know: {', '.join(lost)}. "
                f"Use a dataclass that inherits from {cls.__name__} and {type(args).__name__}, or for sequence to "
                f"sequence SparseDistillSeq2SeqTrainer with its SparseDistillSeq2SeqConfig."
            )
        return cls(**given)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_block_size(value: Any) -> bool:
    return _is_int(value) and (value > 0 or value == -1)

"""Every choice of a sparse distillation run, as a `TrainingArguments` with more fields."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Self

from transformers import TrainingArguments

from hf_sparse.core.blocks import BlockShape
from hf_sparse.core.structure.overrides import parse_block_overrides
from hf_sparse.training.checks import HIDDEN_WEIGHT, LAYER_SHARE, check_settings
from hf_sparse.training.distillation.layerwise import Layers, parse_layer_map
from hf_sparse.training.presets import PRESETS

# Fields whose effect is compared otherwise, or that have none on a step.
_NO_FACTS = {
    "block_height", "block_width", "block_overrides", "target_modules", "exclude_modules", "sparsity_scope",
    "layer_share", "preset", "save_format",
}  # fmt: skip


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
        LAYER_SHARE,
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
    hidden_weight: float | None = _field(
        None,
        f"Weight of the error between hidden states, summed over layers. None = {HIDDEN_WEIGHT} for models that "
        f"classify text, with kd_weight above 0 and a teacher of their own class, depth and width; else 0.",
    )
    hidden_form: str = _field(
        "relative",
        'That error: "relative" (squared distance over the squared size of the teacher\'s states) or "mse" (mean '
        "squared error).",
    )
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
        check_settings(self)

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
    def hidden_is_decided(self) -> bool:
        """Whether settings alone decide about hidden states: a number, or a map of layers that pairs nothing else."""
        return self.hidden_weight is not None or (self.layer_map is not None and not self.attention_weight)

    @property
    def wanted_hidden_weight(self) -> float:
        """`hidden_weight` with None resolved as far as settings alone tell; the models decide about the rest."""
        if self.hidden_weight is not None:
            return self.hidden_weight
        return HIDDEN_WEIGHT if self.hidden_is_decided or self.kd_weight else 0.0

    @property
    def needs_teacher(self) -> bool:
        """Whether any setting uses a teacher; without one none is held in memory."""
        return bool(self.kd_weight or self.wanted_hidden_weight or self.attention_weight or self.graft_start < 1.0)

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

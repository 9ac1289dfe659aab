"""What the example scripts share once data is there: the dense model, the run, the table at its end."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ModelArguments
from transformers import Trainer

import hf_sparse
from hf_sparse import SparseDistillConfig, SparseDistillTrainer

logger = logging.getLogger("examples")

# Folder inside output_dir of the dense model; what begins with "_" stays here when output_dir is pushed.
DENSE = "_dense"


class Loader:
    """Loads models for one task, and knows which parts of the last one had not been trained for it.

    Args:
        auto_class: of transformers.
        options: for `from_pretrained`.
    """

    def __init__(self, auto_class: Any, **options: Any) -> None:
        self.auto_class, self.options, self.new = auto_class, options, []

    def __call__(self, path: str, **options: Any) -> Any:
        """Load a folder or repo id, with more options for this one."""
        model, info = self.auto_class.from_pretrained(path, output_loading_info=True, **self.options, **options)
        self.new = sorted({*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])})
        return model

    def refuse_new(self, path: str) -> None:
        """Refuse a model as teacher whose head was made a moment ago.

        Raises:
            ValueError: naming the model, what is new, and the way out.
        """
        if self.new:
            raise ValueError(
                f"{path} has no trained head for this task ({self.new[0]} is new) and would teach noise: name a "
                f"fine-tuned model or teacher, or add --finetune_epochs 3."
            )


def teacher_model(load: Loader, model_args: ModelArguments) -> Any:
    """Load the teacher that was named; None where none was."""
    path = model_args.teacher_model_name_or_path
    if path is None:
        return None
    teacher = load(path)
    load.refuse_new(path)
    return teacher


def dense_model(
    load: Loader,
    model_args: ModelArguments,
    args: SparseDistillConfig,
    checkpoint: str | None,
    teacher: Any,
    trainers: tuple[type[Trainer], type[SparseDistillTrainer]] = (Trainer, SparseDistillTrainer),
    **common: Any,
) -> Any:
    """Give the dense model: as it is, fine-tuned here, or as the run that is gone on with had fine-tuned it.

    Args:
        load: makes a model of a folder or repo id.
        model_args: say whether to fine-tune.
        args: those of pruning; most of them count for fine-tuning, too.
        checkpoint: of the interrupted run, or None.
        teacher: that was named; None = the dense model will be its own.
        trainers: of the dense model, and of the pruning.
        common: what both trainers take: data, collator, metrics.

    Raises:
        ValueError: if it is to be its own teacher, and has no trained head; or does not fit the arguments.
    """
    path, folder = str(model_args.model_name_or_path), str(Path(args.output_dir) / DENSE)
    if not model_args.finetune_epochs:
        model = load(path)
        if args.needs_teacher and teacher is None:
            load.refuse_new(path)
        return model
    if checkpoint is None:
        # Made and thrown away: what does not fit the model is refused at once, and not hours later.
        trainers[1](load(path), args, teacher_model=teacher, **common)
        changed = dataclasses.replace(
            args, output_dir=folder, num_train_epochs=model_args.finetune_epochs, max_steps=-1, save_strategy="no",
            learning_rate=model_args.finetune_learning_rate, eval_strategy="no", load_best_model_at_end=False,
            push_to_hub=False, graft_start=1.0, ddp_find_unused_parameters=False,
        )  # fmt: skip
        logger.info("Fine-tuning the dense model for %g epochs.", model_args.finetune_epochs)
        trainer = trainers[0](model=load(path), args=changed, **common)
        # Most heads ignore the count that Trainer would hand them, and accumulated gradients would come out too large.
        trainer.model_accepts_loss_kwargs = False
        trainer.log_metrics("finetune", trainer.train().metrics)
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()
    elif not Path(folder).is_dir():
        raise ValueError(
            f"{checkpoint} was to be gone on with, but {folder}, the dense model that it began with, is gone: name "
            f"that model and leave --finetune_epochs out, or begin anew with --resume_from_checkpoint false."
        )
    return load(folder)


def prune(
    trainer: SparseDistillTrainer, checkpoint: str | None, others: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Measure the dense model, prune and distil, save, and measure again.

    Args:
        trainer: before training.
        checkpoint: to go on from, or None.
        others: {prefix: more data to evaluate on}.

    Returns:
        Metrics "dense_..." and "eval_...", where the trainer has data to evaluate on.
    """
    metrics: dict[str, float] = {}
    if trainer.eval_dataset is not None:
        needs_teacher = trainer.args.needs_teacher
        dense = trainer.evaluate_teacher() if needs_teacher else trainer.evaluate(metric_key_prefix="teacher")
        metrics |= {key.replace("teacher", "dense", 1): value for key, value in dense.items()}
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    return metrics | measure(trainer, others)


def measure(trainer: Trainer, others: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Evaluate a model on the data of its trainer and on others, {prefix: data}, as far as there are any."""
    metrics: dict[str, float] = {}
    for prefix, data in (others or {}).items():
        metrics |= trainer.evaluate(data, metric_key_prefix=prefix)
    if trainer.eval_dataset is not None:
        # Last, because the card shows what was measured last.
        metrics |= trainer.evaluate()
    return metrics


def finish(trainer: Trainer, metrics: dict[str, float], names: Sequence[str], **card: Any) -> None:
    """Save the metrics, publish if asked, and print what was gained and what it cost.

    Args:
        trainer: after `prune`, or after an evaluation alone.
        metrics: "dense_..." and "eval_...", and "floor_..." of who knows nothing.
        names: the metrics to show.
        card: what only the script knows of data and task, for the model card.
    """
    if metrics:
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if isinstance(trainer, SparseDistillTrainer):
        (trainer.push_to_hub if trainer.args.push_to_hub else trainer.create_model_card)(**card)
        if trainer.is_world_process_zero():
            print(summary(str(trainer.args.output_dir), metrics, names))
    trainer.accelerator.end_training()


def summary(folder: str, metrics: Mapping[str, float], names: Sequence[str]) -> str:
    """Lay out what was gained and what it cost: the layers, then dense against pruned."""
    report = hf_sparse.report(folder)
    rows = [["", *names, "weights"]]
    if any(f"floor_{name}" in metrics for name in names):
        rows.append(["commonest answer", *_cells(metrics, "floor", names), "-"])
    rows += [
        ["dense", *_cells(metrics, "dense", names), f"{report.dense_bytes / 1e6:.2f} MB"],
        ["pruned", *_cells(metrics, "eval", names), f"{report.bytes / 1e6:.2f} MB"],
    ]
    pairs = [(metrics.get(f"dense_{name}"), metrics.get(f"eval_{name}")) for name in names]
    gaps = ["-" if None in pair else f"{pair[1] - pair[0]:+.4f}" for pair in pairs]
    rows.append(["pruned against dense", *gaps, f"x {report.bytes / report.dense_bytes:.3f}"])
    lines = (f"{row[0]:<22}" + "".join(f"{cell:>22}" for cell in row[1:]) for row in rows)
    return "\n".join(["", str(report), "", *lines, "", f"Saved in {folder}."])


def _cells(metrics: Mapping[str, float], prefix: str, names: Sequence[str]) -> list[str]:
    values = [metrics.get(f"{prefix}_{name}") for name in names]
    return ["-" if value is None else f"{value:.4f}" for value in values]

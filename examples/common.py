"""What the example scripts share: arguments, the dense model before it is pruned, the run, the table at its end."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset
from transformers import HfArgumentParser, Trainer, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_sparse
from hf_sparse import SparseDistillConfig, SparseDistillTrainer

logger = logging.getLogger("examples")

READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}


def option(default: Any, text: str) -> Any:
    """Make a field that `--help` explains."""
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which model is pruned, and which one teaches it."""

    model_name_or_path: str | None = option(None, "Folder or repo id of the model to prune.")
    teacher_model_name_or_path: str | None = option(None, "Fine-tuned teacher; None = the dense model itself.")
    finetune_epochs: float = option(0.0, "Epochs of plain fine-tuning before pruning; 0 = it is fine-tuned already.")
    finetune_learning_rate: float = option(5e-5, "Learning rate of that fine-tuning.")
    tokenizer_name: str | None = option(None, "Folder or repo id of the tokenizer, if it is not with the model.")
    cache_dir: str | None = option(None, "Where downloads are kept.")


def parse(classes: Sequence[Any], argv: list[str], smoke: Callable[[], list[str]]) -> tuple[Any, ...]:
    """Read a command line, or the one JSON or YAML file that it names.

    Args:
        classes: dataclasses of arguments, the last one a `SparseDistillConfig`.
        argv: the command line.
        smoke: writes a tiny model and tiny data, and gives the arguments for them; used for `--smoke`.

    Raises:
        ValueError: if there is no model, or nothing to do.
    """
    parser = HfArgumentParser(list(classes))
    if len(argv) == 1 and argv[0].endswith(".json"):
        parsed = parser.parse_json_file(argv[0])
    elif len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        parsed = parser.parse_yaml_file(argv[0])
    else:
        # What is given wins over what the smoke run would take.
        parsed = parser.parse_args_into_dataclasses([*smoke(), *argv] if "--smoke" in argv else argv)
    model_args, args = parsed[0], parsed[-1]
    if model_args.model_name_or_path is None and not getattr(model_args, "config_name", None):
        raise ValueError("model_name_or_path is missing: name the model to prune, or try the script with --smoke.")
    if not (args.do_train or args.do_eval):
        raise ValueError("there is nothing to do: give --do_train or --do_eval.")
    return tuple(parsed)


def start(args: SparseDistillConfig) -> str | None:
    """Set logging and seeds, and give the checkpoint to go on from: the one named, or the last one in output_dir."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    for name in ("examples", "hf_sparse"):
        logging.getLogger(name).setLevel(logging.INFO if args.process_index == 0 else logging.WARNING)
    set_seed(args.seed)
    logger.info("%d process(es), device %s.", args.world_size, args.device)
    asked = args.resume_from_checkpoint
    if not args.do_train or str(asked).lower() == "false":
        return None
    if asked is not None and str(asked).lower() != "true":
        return asked
    last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if asked is not None and last is None:
        raise ValueError(f"resume_from_checkpoint={asked}, but output_dir={args.output_dir!r} holds no checkpoint.")
    if last is not None:
        logger.info("Going on from %s; to begin anew, add --resume_from_checkpoint false.", last)
    return last


def load_splits(files: Mapping[str, str | None], name: str | None, config: str | None, cache_dir: str | None) -> Any:
    """Load data: from files where there are any, or else a dataset of the Hub.

    Args:
        files: {split: path or None}.
        name, config: of a dataset on the Hub.
        cache_dir: where downloads are kept.

    Returns:
        A `DatasetDict`.

    Raises:
        FileNotFoundError, ValueError: if there is no data, a file is missing, or is of no kind that is known.
    """
    given = {split: file for split, file in files.items() if file is not None}
    if not given:
        if name is None:
            raise ValueError("there is no data: give --dataset_name, or --train_file and --validation_file.")
        return load_dataset(name, config, cache_dir=cache_dir)
    splits = DatasetDict()
    for split, file in given.items():
        if not Path(file).is_file():
            raise FileNotFoundError(f"{split}_file={file!r} does not exist.")
        kind = Path(file.removesuffix(".gz")).suffix
        if kind not in READERS:
            raise ValueError(f"{split}_file={file!r} cannot be read: its name must end in one of {list(READERS)}.")
        splits[split] = load_dataset(READERS[kind], data_files=file, split="train", cache_dir=cache_dir)
    return splits


class Loader:
    """Loads models for one task, and knows which parts of the last one had not been trained for it.

    Args:
        auto_class: of transformers.
        options: for `from_pretrained`.
    """

    def __init__(self, auto_class: Any, **options: Any) -> None:
        self.auto_class, self.options, self.new = auto_class, options, []

    def __call__(self, path: str) -> Any:
        """Load a folder or repo id."""
        model, info = self.auto_class.from_pretrained(path, output_loading_info=True, **self.options)
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
    trainer_class: type[Trainer] = Trainer,
    **common: Any,
) -> Any:
    """Give the dense model: as it is, fine-tuned here, or as the run that is gone on with had fine-tuned it.

    Args:
        load: makes a model of a folder or repo id.
        model_args: say whether to fine-tune.
        args: those of pruning; most of them count for fine-tuning, too.
        checkpoint: of the interrupted run, or None.
        trainer_class: trains the dense model.
        common: what both trainers take: data, collator, metrics.

    Raises:
        ValueError: if it is to be its own teacher, and has no trained head.
    """
    folder = str(Path(args.output_dir) / "dense")
    if not args.do_train or not model_args.finetune_epochs:
        model = load(str(model_args.model_name_or_path))
        if args.do_train and args.needs_teacher and model_args.teacher_model_name_or_path is None:
            load.refuse_new(str(model_args.model_name_or_path))
        return model
    if checkpoint is None:
        changed = dataclasses.replace(
            args, output_dir=folder, num_train_epochs=model_args.finetune_epochs, max_steps=-1, save_strategy="no",
            learning_rate=model_args.finetune_learning_rate, eval_strategy="no", load_best_model_at_end=False,
            push_to_hub=False, graft_start=1.0, ddp_find_unused_parameters=False,
        )  # fmt: skip
        logger.info("Fine-tuning the dense model for %g epochs.", model_args.finetune_epochs)
        trainer = trainer_class(model=load(str(model_args.model_name_or_path)), args=changed, **common)
        # Most heads ignore the count that Trainer would hand them, and accumulated gradients would come out too large.
        trainer.model_accepts_loss_kwargs = False
        trainer.log_metrics("finetune", trainer.train().metrics)
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()
    return load(folder)


def prune(trainer: SparseDistillTrainer, checkpoint: str | None) -> dict[str, float]:
    """Measure the dense model, prune and distil, save, and measure again.

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
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    return metrics


def finish(trainer: Trainer, metrics: dict[str, float], names: Sequence[str], **card: Any) -> None:
    """Save the metrics, publish if asked, and print what was gained and what it cost.

    Args:
        trainer: after `prune`, or after an evaluation alone.
        metrics: "dense_..." and "eval_...".
        names: the metrics to show.
        card: what only the script knows of data and task, for the model card.
    """
    if metrics:
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if isinstance(trainer, SparseDistillTrainer):
        (trainer.push_to_hub if trainer.args.push_to_hub else trainer.create_model_card)(**card)
        if trainer.is_world_process_zero():
            print(_summary(str(trainer.args.output_dir), metrics, names))
    trainer.accelerator.end_training()


def _summary(folder: str, metrics: Mapping[str, float], names: Sequence[str]) -> str:
    report = hf_sparse.report(folder)
    weights = {"dense": report.dense_bytes, "pruned": report.bytes}
    rows = [["", *names, "weights"]]
    for label, prefix in (("dense", "dense"), ("pruned", "eval")):
        values = [metrics.get(f"{prefix}_{name}") for name in names]
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        rows.append([label, *cells, f"{weights[label] / 1e6:.2f} MB"])
    lines = (f"{row[0]:<10}" + "".join(f"{cell:>20}" for cell in row[1:]) for row in rows)
    return "\n".join(["", str(report), "", *lines, "", f"Saved in {folder}."])

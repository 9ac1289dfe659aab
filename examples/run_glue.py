"""Make a transformer small and fast on a GLUE task, or on text classification data of your own, in one run.

Fine-tune the dense model (only if asked), prune and distil it, measure both, save the small one, publish it. Arguments
are those of transformers' run_glue.py and the fields of SparseDistillConfig, on the command line or in one JSON or
YAML file. `--smoke` tries it all in seconds, offline. Runs under `accelerate launch` as it is.

    python examples/run_glue.py --model_name_or_path google-bert/bert-base-uncased --task_name sst2 \
        --finetune_epochs 3 --do_train --do_eval --learning_rate 2e-4 --num_train_epochs 5 --output_dir sst2-sparse
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from glue_data import TASKS, Metric, check_source, check_values, find_labels, find_text_columns, load_splits, tokenise
from tiny_task import smoke_arguments
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import hf_sparse
from hf_sparse import SparseDistillConfig, SparseDistillTrainer

logger = logging.getLogger("run_glue")


Arguments = tuple["ModelArguments", "DataTrainingArguments", SparseDistillConfig]


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
    model_revision: str = option("main", "Branch, tag or commit of the model.")
    ignore_mismatched_sizes: bool = option(False, "Give a model with another number of labels a new head.")


@dataclass
class DataTrainingArguments:
    """What the model is trained and measured on."""

    task_name: str | None = option(None, "GLUE task, from the Hub unless files are given: " + ", ".join(TASKS) + ".")
    train_file: str | None = option(None, "Training data: parquet, csv, tsv, json or jsonl.")
    validation_file: str | None = option(None, "Data for --do_eval.")
    test_file: str | None = option(None, "Data for --do_predict; needs no labels.")
    sentence1_key: str | None = option(None, "Column of the text; None = as in the GLUE tasks, or the only text.")
    sentence2_key: str | None = option(None, "Column of the second text, for pairs.")
    label_key: str = option("label", "Column of the labels: names or integers for classes, floats for regression.")
    max_seq_length: int = option(128, "Tokens after which a text is cut off.")
    pad_to_max_length: bool = option(False, "Pad to max_seq_length, not to the longest text of each batch.")
    overwrite_cache: bool = option(False, "Tokenise anew.")
    max_train_samples: int | None = option(None, "Take only so many rows, the first ones.")
    max_eval_samples: int | None = option(None, "Take only so many rows, the first ones.")
    max_predict_samples: int | None = option(None, "Take only so many rows, the first ones.")
    smoke: bool = option(False, "Try the script in seconds, offline, on a tiny model and a made-up task.")

    @property
    def files(self) -> dict[str, str]:
        """Data files by split; none where the data comes from the Hub."""
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: file for split, file in files.items() if file is not None}


def parse_arguments(argv: list[str], scratch: Path) -> Arguments:
    """Read the command line, or the one JSON or YAML file that it names, and refuse what cannot work."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, SparseDistillConfig))
    if len(argv) == 1 and argv[0].endswith(".json"):
        model_args, data_args, args = parser.parse_json_file(argv[0])
    elif len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        model_args, data_args, args = parser.parse_yaml_file(argv[0])
    else:
        # What is given wins over what the smoke run would take.
        argv = [*smoke_arguments(scratch), *argv] if "--smoke" in argv else argv
        model_args, data_args, args = parser.parse_args_into_dataclasses(argv)
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: name the model to prune, or try the script with --smoke.")
    asked = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    check_source(data_args.task_name, data_args.files, [split for split in asked if asked[split]])
    return model_args, data_args, args


def find_checkpoint(args: SparseDistillConfig) -> str | None:
    """Give the checkpoint to go on from: the one that was named, or the last one in output_dir."""
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


def load_model(path: str, model_args: ModelArguments, labels: dict[Any, str] | None) -> tuple[PreTrainedModel, bool]:
    """Load a model with a head for these labels; the second value tells whether that head is new."""
    where = {"cache_dir": model_args.cache_dir}
    if path == model_args.model_name_or_path:
        where["revision"] = model_args.model_revision
    config = AutoConfig.from_pretrained(path, **where)
    names, own = list((labels or {}).values()), list(config.label2id or {})
    if labels is None:
        config.num_labels, config.problem_type = 1, "regression"
    elif sorted(own) != sorted(names):
        if not all(name.startswith("LABEL_") for name in own):
            logger.warning("%s calls its labels %s, the data %s: the data's names are taken.", path, own, names)
        config.num_labels = len(names)
        config.label2id, config.id2label = {name: i for i, name in enumerate(names)}, dict(enumerate(names))
    replace = model_args.ignore_mismatched_sizes
    model, info = AutoModelForSequenceClassification.from_pretrained(
        path, config=config, output_loading_info=True, ignore_mismatched_sizes=replace, **where
    )
    return model, bool(info["missing_keys"] or info["mismatched_keys"])


def fine_tune(
    model: PreTrainedModel, model_args: ModelArguments, args: SparseDistillConfig, common: dict[str, Any]
) -> None:
    """Train the dense model with a plain Trainer, and save it in output_dir/dense."""
    args = dataclasses.replace(
        args, output_dir=str(Path(args.output_dir) / "dense"), num_train_epochs=model_args.finetune_epochs,
        learning_rate=model_args.finetune_learning_rate, max_steps=-1, save_strategy="no", eval_strategy="no",
        load_best_model_at_end=False, push_to_hub=False, graft_start=1.0, ddp_find_unused_parameters=False,
    )  # fmt: skip
    logger.info("Fine-tuning the dense model for %g epochs.", model_args.finetune_epochs)
    trainer = Trainer(model=model, args=args, **common)
    # Most heads ignore the count that Trainer would hand them, and accumulated gradients would come out too large.
    trainer.model_accepts_loss_kwargs = False
    trainer.log_metrics("finetune", trainer.train().metrics)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()


def summary(folder: str, metrics: dict[str, float]) -> str:
    """Lay out what was gained and what it cost: the layers, then dense against pruned."""
    report = hf_sparse.report(folder)
    names = [key.removeprefix("floor_") for key in metrics if key.startswith("floor_")]
    before, after = ([metrics[f"{prefix}_{name}"] for name in names] for prefix in ("dense", "eval"))
    rows = [
        ["", *names, "weights"],
        ["commonest answer", *(f"{metrics[f'floor_{name}']:.4f}" for name in names), "-"],
        ["dense", *(f"{value:.4f}" for value in before), f"{report.dense_bytes / 1e6:.2f} MB"],
        ["pruned", *(f"{value:.4f}" for value in after), f"{report.bytes / 1e6:.2f} MB"],
        ["pruned against dense", *map("{:+.4f}".format, np.subtract(after, before)),
         f"x {report.bytes / report.dense_bytes:.3f}"],
    ]  # fmt: skip
    lines = (f"{row[0]:<22}" + "".join(f"{cell:>22}" for cell in row[1:]) for row in rows)
    return "\n".join(["", str(report), "", *lines, "", f"Saved in {folder}."])


def run(arguments: Arguments) -> None:
    """Load, fine-tune, prune, measure, save, publish."""
    model_args, data_args, args = arguments
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    for name in ("run_glue", "hf_sparse"):
        logging.getLogger(name).setLevel(logging.INFO if args.process_index == 0 else logging.WARNING)
    set_seed(args.seed)
    checkpoint, task, label_key = find_checkpoint(args), data_args.task_name, data_args.label_key

    # Data
    with args.main_process_first(desc="loading data"):
        raw = load_splits(data_args.files, task, model_args.cache_dir)
    reference = raw["train"] if "train" in raw else next(iter(raw.values()))
    keys = find_text_columns(reference, task, label_key, (data_args.sentence1_key, data_args.sentence2_key))
    labels = find_labels(reference, task, label_key)

    # Model. A run that goes on from a checkpoint starts from the dense model that it had fine-tuned.
    name, dense_folder = model_args.model_name_or_path, str(Path(args.output_dir) / "dense")
    fine_tuning = args.do_train and model_args.finetune_epochs > 0
    model, head_is_new = load_model(dense_folder if fine_tuning and checkpoint else name, model_args, labels)
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, cache_dir=model_args.cache_dir)

    # Rows as token ids. MNLI has two splits to evaluate on, the second one of other genres.
    length = min(data_args.max_seq_length, tokenizer.model_max_length)
    padding = "max_length" if data_args.pad_to_max_length else False
    to_ids = partial(tokenizer, max_length=length, truncation=True, padding=padding)
    class_ids = None if labels is None else {value: model.config.label2id[label] for value, label in labels.items()}
    wanted = {
        "train": (args.do_train, data_args.max_train_samples),
        "validation": (args.do_eval, data_args.max_eval_samples),
        "test": (args.do_predict, data_args.max_predict_samples),
    }
    data: dict[str, Dataset] = {}
    for split, rows in raw.items():
        asked, limit = wanted[split.split("_")[0]]
        if asked:
            labelled = None if split.startswith("test") else (label_key, class_ids)
            check_values(split, rows, keys, labelled)
            with args.main_process_first(desc=f"tokenising {split}"):
                data[split] = tokenise(split, rows, keys, labelled, limit, not data_args.overwrite_cache, to_ids)
    evals = [rows for split, rows in data.items() if split.startswith("validation")]

    metric = Metric(task, regression=labels is None, from_hub=not data_args.files)
    logger.info("%d process(es), device %s. Metric: %s.", args.world_size, args.device, metric.source)
    common: dict[str, Any] = {
        "train_dataset": data.get("train"),
        "eval_dataset": evals[0] if evals else None,
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if args.fp16 or args.bf16 else None),
        "compute_metrics": metric,
    }

    # Training
    trainer: Trainer
    metrics: dict[str, float] = {}
    if args.do_train:
        teacher, untrained, path = None, head_is_new and not fine_tuning, model_args.teacher_model_name_or_path
        if path is not None:
            teacher, untrained = load_model(path, model_args, labels)
        if args.needs_teacher and untrained:
            raise ValueError(
                f"{path or name} has no trained head for this task and would teach noise: name a fine-tuned model or "
                f"teacher, or add --finetune_epochs 3."
            )
        # Made before fine-tuning as well: what does not fit the model is refused at once, and not hours later.
        make_trainer = partial(SparseDistillTrainer, args=args, teacher_model=teacher, **common)
        trainer = make_trainer(model)
        if fine_tuning and not checkpoint:
            fine_tune(model, model_args, args, common)
            trainer = make_trainer(load_model(dense_folder, model_args, labels)[0])
        if evals:
            dense = trainer.evaluate_teacher() if args.needs_teacher else trainer.evaluate(metric_key_prefix="teacher")
            metrics |= {key.replace("teacher", "dense", 1): value for key, value in dense.items()}
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    else:
        trainer = Trainer(model=model, args=args, **common)

    # Evaluation. The first split comes last: the card shows what was measured last.
    for rows, prefix in reversed(list(zip(evals, ("eval", "eval_mm"), strict=False))):
        metrics |= trainer.evaluate(rows, metric_key_prefix=prefix)
    if evals:
        floor = metric.of_commonest_answer(np.asarray(evals[0]["label"]))
        metrics |= {f"floor_{key}": value for key, value in floor.items()}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    # Trainer would group what it predicts by length as well, and hand the answers back in that order.
    args.train_sampling_strategy = "random"
    for split in [split for split in data if split.startswith("test")]:
        predicted = metric.answers(trainer.predict(data[split]).predictions)
        if trainer.is_world_process_zero():
            texts = predicted if labels is None else [model.config.id2label[i] for i in predicted]
            lines = ["index\tprediction", *(f"{i}\t{text}" for i, text in enumerate(texts))]
            (Path(args.output_dir) / f"predict_results_{split}.txt").write_text("\n".join(lines) + "\n")

    # Publishing
    if args.do_train:
        card: dict[str, Any] = {"tasks": "text-classification", "finetuned_from": name}
        if task:
            card |= {"language": "en", "dataset": f"GLUE {task}", "dataset_tags": "nyu-mll/glue", "dataset_args": task}
        else:
            card["dataset"] = Path(data_args.files["train"]).name
        (trainer.push_to_hub if args.push_to_hub else trainer.create_model_card)(**card)
        if trainer.is_world_process_zero():
            print(summary(args.output_dir, metrics))
    trainer.accelerator.end_training()


def main(argv: list[str] | None = None) -> None:
    """Run with these arguments; None = those of the command line."""
    with tempfile.TemporaryDirectory() as scratch:
        run(parse_arguments(sys.argv[1:] if argv is None else argv, Path(scratch)))


if __name__ == "__main__":
    main()

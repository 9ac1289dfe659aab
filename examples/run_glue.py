"""Make a transformer small and fast on a GLUE task, or on text classification data of your own, in one run.

Fine-tune the dense model (only if asked), prune and distil it, measure both, save the small one, publish it. Arguments
are those of transformers' run_glue.py and the fields of SparseDistillConfig, on the command line or in one JSON or
YAML file. `--smoke` tries it all in seconds, offline.

    python examples/run_glue.py --model_name_or_path google-bert/bert-base-uncased --task_name sst2 \
        --finetune_epochs 3 --do_train --do_eval --learning_rate 2e-4 --num_train_epochs 5 --output_dir sst2-sparse

Many GPUs:

    accelerate launch --multi_gpu --num_processes 4 examples/run_glue.py ...
"""

from __future__ import annotations

import logging
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common as shared
import numpy as np
from common import option, start
from datasets import Dataset
from glue_data import TASKS, Metric, check_source, check_values, find_labels, find_text_columns, load_splits, tokenise
from runs import Loader, dense_model, finish, measure, prune, teacher_model
from tiny_task import smoke_arguments
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
)

from hf_sparse import SparseDistillConfig, SparseDistillTrainer

logger = logging.getLogger("examples")

Arguments = tuple["ModelArguments", "DataTrainingArguments", SparseDistillConfig]


@dataclass
class ModelArguments(shared.ModelArguments):
    """Which model is pruned, and which one teaches it."""

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
    classes, actions = (ModelArguments, DataTrainingArguments, SparseDistillConfig), ("train", "eval", "predict")
    model_args, data_args, args = shared.parse(classes, argv, partial(smoke_arguments, scratch), actions)
    shared.check_limits(data_args)
    asked = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    check_source(data_args.task_name, data_args.files, [split for split in asked if asked[split]])
    return model_args, data_args, args


class ClassifierLoader(Loader):
    """Loads classifiers, or scorers, with a head for the labels of the data.

    Args:
        model_args: say where from.
        labels: {value in the data: name of the class}; None for a score.
    """

    def __init__(self, model_args: ModelArguments, labels: dict[Any, str] | None) -> None:
        replace = model_args.ignore_mismatched_sizes
        super().__init__(AutoModelForSequenceClassification, ignore_mismatched_sizes=replace)
        self.model_args, self.labels = model_args, labels

    def where(self, path: str) -> dict[str, Any]:
        """Say where a model is looked for: the revision is that of the model to prune."""
        own = path == self.model_args.model_name_or_path
        return {
            "cache_dir": self.model_args.cache_dir,
            **({"revision": self.model_args.model_revision} if own else {}),
        }

    def config(self, path: str) -> Any:
        """Give the config of a model for these labels; its own order of them is kept."""
        config = AutoConfig.from_pretrained(path, **self.where(path))
        if self.labels is None:
            config.num_labels, config.problem_type = 1, "regression"
        elif sorted(config.label2id or {}) != sorted(names := list(self.labels.values())):
            config.num_labels = len(names)
            config.label2id, config.id2label = {name: i for i, name in enumerate(names)}, dict(enumerate(names))
        return config

    def __call__(self, path: str) -> Any:
        """Load a folder or repo id."""
        own, config = list(AutoConfig.from_pretrained(path, **self.where(path)).label2id or {}), self.config(path)
        if self.labels is not None and sorted(own) != sorted(config.label2id):
            if not all(name.startswith("LABEL_") for name in own):
                names = list(config.label2id)
                logger.warning("%s calls its labels %s, the data %s: the data's names are taken.", path, own, names)
        return super().__call__(path, config=config, **self.where(path))


def run(arguments: Arguments) -> None:
    """Load, fine-tune, prune, measure, save, publish."""
    model_args, data_args, args = arguments
    checkpoint, task, label_key = start(args), data_args.task_name, data_args.label_key

    # Data
    with args.main_process_first(desc="loading data"):
        raw = load_splits(data_args.files, task, model_args.cache_dir)
    reference = raw["train"] if "train" in raw else next(iter(raw.values()))
    keys = find_text_columns(reference, task, label_key, (data_args.sentence1_key, data_args.sentence2_key))
    labels = find_labels(reference, task, label_key)
    name = str(model_args.model_name_or_path)
    load = ClassifierLoader(model_args, labels)
    tokenizer_name = model_args.tokenizer_name or name
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name, **load.where(tokenizer_name))

    # Rows as token ids. MNLI has two splits to evaluate on, the second one of other genres.
    length = min(data_args.max_seq_length, tokenizer.model_max_length)
    padding = "max_length" if data_args.pad_to_max_length else False
    to_ids = partial(tokenizer, max_length=length, truncation=True, padding=padding)
    ids = load.config(name).label2id
    class_ids = None if labels is None else {value: ids[label] for value, label in labels.items()}
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
    logger.info("Metric: %s.", metric.source)
    common: dict[str, Any] = {
        "train_dataset": data.get("train"),
        "eval_dataset": evals[0] if evals else None,
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if args.fp16 or args.bf16 else None),
        "compute_metrics": metric,
    }

    # Training, and evaluation on all splits
    trainer: Trainer
    others = dict(zip(("eval_mm",), evals[1:], strict=False))
    if args.do_train:
        teacher = teacher_model(load, model_args)
        model = dense_model(load, model_args, args, checkpoint, teacher, **common)
        trainer = SparseDistillTrainer(model, args, teacher_model=teacher, **common)
        metrics = prune(trainer, checkpoint, others)
    else:
        trainer = Trainer(load(name), args, **common)
        metrics = measure(trainer, others)
    floor = metric.of_commonest_answer(np.asarray(evals[0]["label"])) if evals else {}
    metrics |= {f"floor_{key}": value for key, value in floor.items()}

    # Answers for rows without labels. Trainer would group them by length, too, and hand them back in that order.
    args.train_sampling_strategy = "random"
    for split in [split for split in data if split.startswith("test")]:
        predicted = metric.answers(trainer.predict(data[split]).predictions)
        if trainer.is_world_process_zero():
            texts = predicted if labels is None else [trainer.model.config.id2label[i] for i in predicted]
            lines = ["index\tprediction", *(f"{i}\t{text}" for i, text in enumerate(texts))]
            (Path(args.output_dir) / f"predict_results_{split}.txt").write_text("\n".join(lines) + "\n")

    # Metrics, card, table
    card: dict[str, Any] = {"tasks": "text-classification", "finetuned_from": name}
    if task:
        card |= {"language": "en", "dataset": f"GLUE {task}", "dataset_tags": "nyu-mll/glue", "dataset_args": task}
    elif args.do_train:
        card["dataset"] = Path(data_args.files["train"]).name
    finish(trainer, metrics, list(floor), **card)


def main(argv: list[str] | None = None) -> None:
    """Run with these arguments; None = those of the command line."""
    with tempfile.TemporaryDirectory() as scratch:
        run(parse_arguments(sys.argv[1:] if argv is None else argv, Path(scratch)))


if __name__ == "__main__":
    main()

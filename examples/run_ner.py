"""Make a token classification model small and fast: fine-tune (only if asked), prune and distil, measure, publish.

Named entities, parts of speech, chunks, in the manner of transformers' run_ner.py. Data: a dataset of the Hub, or
files with a column of words and one of tags (names, or integers with names in the dataset). `--smoke` tries it all in
seconds, offline.

    python examples/run_ner.py --model_name_or_path google-bert/bert-base-cased --dataset_name tner/wnut2017 \
        --text_column tokens --label_column tags --finetune_epochs 3 --do_train --do_eval --learning_rate 2e-4 \
        --num_train_epochs 5 --output_dir wnut-sparse

Many GPUs:

    accelerate launch --multi_gpu --num_processes 4 examples/run_ner.py ...
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiny_tasks
from common import Loader, ModelArguments, dense_model, finish, load_splits, option, parse, prune, start, teacher_model
from datasets import ClassLabel, Dataset
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
)

from hf_sparse import SparseDistillConfig, SparseDistillTrainer

Span = tuple[int, int, str]


@dataclass
class DataTrainingArguments:
    """What the model is trained and measured on."""

    dataset_name: str | None = option(None, "Dataset on the Hub.")
    dataset_config_name: str | None = option(None, "Configuration of that dataset.")
    train_file: str | None = option(None, "Training data: json, jsonl or parquet.")
    validation_file: str | None = option(None, "Data for --do_eval.")
    text_column: str = option("tokens", "Column of the words.")
    label_column: str = option("ner_tags", "Column of the tags, one per word.")
    max_seq_length: int = option(128, "Tokens after which a sentence is cut off.")
    label_all_tokens: bool = option(False, "Give every token of a word its tag, not only the first one.")
    max_train_samples: int | None = option(None, "Take only so many sentences, the first ones.")
    max_eval_samples: int | None = option(None, "Take only so many sentences, the first ones.")
    smoke: bool = option(False, "Try the script in seconds, offline, on a tiny model and a made-up task.")


def tag_names(data: Dataset, column: str) -> list[str]:
    """Name the tags: as the dataset names them, or those that occur, in order."""
    if column not in data.column_names:
        raise ValueError(f"label_column={column!r} is not among the columns {data.column_names}.")
    feature = getattr(data.features[column], "feature", None)
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    found = sorted({tag for tags in data[column] for tag in tags})
    return [str(tag) for tag in found]


def encode(
    rows: dict[str, list[Any]], tokenizer: Any, text: str, label: str, ids: dict[Any, int], length: int, every: bool
) -> dict[str, list[Any]]:
    """Turn words into tokens, and tags into those of the tokens; -100 where a token has none."""
    encoded = tokenizer(rows[text], is_split_into_words=True, truncation=True, max_length=length)
    labels = []
    for i, tags in enumerate(rows[label]):
        words = encoded.word_ids(i)
        firsts = [every or w != words[t - 1] for t, w in enumerate(words)]
        pairs = zip(words, firsts, strict=True)
        labels.append([ids[tags[w]] if w is not None and first else -100 for w, first in pairs])
    return {**encoded, "labels": labels}


def spans(tags: list[str]) -> set[Span]:
    """Find the entities in tags: (first, last, kind). B-X begins one, I-X goes on; tags without a prefix stand alone.

    Example:
        >>> sorted(spans(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
        [(0, 1, 'PER'), (3, 3, 'LOC'), (4, 4, 'LOC')]
    """
    found: set[Span] = set()
    first, open_kind = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-") if tag[:2] in ("B-", "I-") else ("B" if tag != "O" else "O", "", tag)
        if open_kind and (prefix != "I" or kind != open_kind):
            found.add((first, i - 1, open_kind))
            open_kind = ""
        if prefix != "O" and not open_kind:
            first, open_kind = i, kind
    return found


class EntityMetric:
    """Precision, recall and F1 of whole entities, and the accuracy of tags."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __call__(self, output: Any) -> dict[str, float]:
        """Compute them for what `Trainer` hands to `compute_metrics`: logits [rows, tokens, tags], labels."""
        predicted, right, found, true, tokens = output.predictions.argmax(-1), 0, 0, 0, []
        for guess, label in zip(predicted, output.label_ids, strict=True):
            counts = label != -100
            tokens.append(guess[counts] == label[counts])
            mine, theirs = (spans([self.names[i] for i in row[counts]]) for row in (guess, label))
            right, found, true = right + len(mine & theirs), found + len(mine), true + len(theirs)
        precision, recall = right / max(found, 1), right / max(true, 1)
        f1 = 2 * right / max(found + true, 1)
        accuracy = float(np.concatenate(tokens).mean())
        return {"precision": precision, "recall": recall, "f1": f1, "accuracy": accuracy}


def run(model_args: ModelArguments, data_args: DataTrainingArguments, args: SparseDistillConfig) -> None:
    """Load, fine-tune, prune, measure, save, publish."""
    checkpoint = start(args)
    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    with args.main_process_first(desc="loading data"):
        raw = load_splits(files, data_args.dataset_name, data_args.dataset_config_name, model_args.cache_dir)
    text, label = data_args.text_column, data_args.label_column
    reference = raw["train"] if "train" in raw else next(iter(raw.values()))
    names = tag_names(reference, label)
    name, where = str(model_args.model_name_or_path), {"cache_dir": model_args.cache_dir}
    own = AutoConfig.from_pretrained(name, **where).label2id or {}
    if sorted(own) == sorted(names):
        names = sorted(own, key=own.__getitem__)  # the order that the head has learned
    tags = names if isinstance(getattr(reference.features[label], "feature", None), ClassLabel) else None
    ids = {tag: names.index(str(tag)) for column in reference[label] for tag in column} if tags is None else {}
    ids |= {i: names.index(tag) for i, tag in enumerate(reference.features[label].feature.names)} if tags else {}
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, **where)
    length = min(data_args.max_seq_length, tokenizer.model_max_length)
    every = data_args.label_all_tokens
    to_tokens = partial(encode, tokenizer=tokenizer, text=text, label=label, ids=ids, length=length, every=every)

    data: dict[str, Any] = {}
    limits = {"train": (args.do_train, data_args.max_train_samples)}
    limits["validation"] = (args.do_eval, data_args.max_eval_samples)
    for split, (wanted, limit) in limits.items():
        if wanted and split not in raw:
            raise ValueError(f"there is no {split} data: give --{split}_file, or a dataset that has that split.")
        if wanted:
            rows = raw[split] if limit is None else raw[split].select(range(min(limit, len(raw[split]))))
            unknown = {tag for column in rows[label] for tag in column} - set(ids)
            if unknown:
                raise ValueError(f"the {split} data holds the tag {sorted(unknown)[0]!r}, which is none of {names}.")
            with args.main_process_first(desc=f"tokenising {split}"):
                data[split] = rows.map(to_tokens, batched=True, remove_columns=rows.column_names)

    common: dict[str, Any] = {
        "train_dataset": data.get("train"),
        "eval_dataset": data.get("validation"),
        "processing_class": tokenizer,
        "data_collator": DataCollatorForTokenClassification(
            tokenizer, pad_to_multiple_of=8 if args.fp16 or args.bf16 else None
        ),
        "compute_metrics": EntityMetric(names),
    }
    labels = {"id2label": dict(enumerate(names)), "label2id": {tag: i for i, tag in enumerate(names)}}
    load = Loader(AutoModelForTokenClassification, **labels, **where)
    model = dense_model(load, model_args, args, checkpoint, **common)
    trainer: Trainer
    if args.do_train:
        teacher = teacher_model(load, model_args)
        trainer = SparseDistillTrainer(model, args, teacher_model=teacher, **common)
        metrics = prune(trainer, checkpoint)
    else:
        trainer = Trainer(model, args, **common)
        metrics = trainer.evaluate()
    dataset = data_args.dataset_name or Path(str(data_args.train_file or data_args.validation_file)).name
    finish(trainer, metrics, ["f1", "accuracy"], tasks="token-classification", finetuned_from=name, dataset=dataset)


def main(argv: list[str] | None = None) -> None:
    """Run with these arguments; None = those of the command line."""
    with tempfile.TemporaryDirectory() as scratch:
        classes = (ModelArguments, DataTrainingArguments, SparseDistillConfig)
        run(*parse(classes, sys.argv[1:] if argv is None else argv, partial(tiny_tasks.ner, Path(scratch))))


if __name__ == "__main__":
    main()

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

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tiny_tasks
from common import FileArguments, ModelArguments, data_name, launch, load_data, option, start, take, wanted_splits
from datasets import ClassLabel, Dataset
from runs import Loader, dense_model, finish, measure, prune, teacher_model
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
class DataTrainingArguments(FileArguments):
    """What the model is trained and measured on."""

    text_column: str = option("tokens", "Column of the words.")
    label_column: str = option("ner_tags", "Column of the tags, one per word.")
    max_seq_length: int = option(128, "Tokens after which a sentence is cut off.")
    label_all_tokens: bool = option(False, "Give every token of a word its tag, not only the first one.")


def tag_names(data: Dataset, column: str) -> list[str]:
    """Name the tags: as the dataset names them, or those that occur, in order."""
    if column not in data.column_names:
        raise ValueError(f"label_column={column!r} is not among the columns {data.column_names}.")
    feature = getattr(data.features[column], "feature", None)
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    found = sorted({tag for tags in data[column] for tag in tags})
    return [str(tag) for tag in found]


def check_tags(split: str, data: Dataset, text: str, label: str, ids: dict[Any, int]) -> None:
    """Refuse tags that were never learned, and rows with more words than tags or the other way round."""
    for i, (words, tags) in enumerate(zip(data[text], data[label], strict=True)):
        if len(words) != len(tags):
            raise ValueError(
                f"row {i} of the {split} data has {len(words)} words and {len(tags)} tags: give one each."
            )
        if unknown := [tag for tag in tags if tag not in ids]:
            raise ValueError(f"the {split} data holds the tag {unknown[0]!r}, which is none of {list(ids)}.")


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
    raw = load_data(args, model_args, data_args)
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
    for split, rows, limit in wanted_splits(args, data_args, raw, [text, label]):
        rows = take(rows, limit)
        check_tags(split, rows, text, label, ids)
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
    trainer: Trainer
    if args.do_train:
        teacher = teacher_model(load, model_args)
        model = dense_model(load, model_args, args, checkpoint, teacher, **common)
        trainer = SparseDistillTrainer(model, args, teacher_model=teacher, **common)
        metrics = prune(trainer, checkpoint)
    else:
        trainer = Trainer(load(name), args, **common)
        metrics = measure(trainer)
    card = {"tasks": "token-classification", "finetuned_from": name, "dataset": data_name(data_args)}
    finish(trainer, metrics, ["f1", "accuracy"], **card)


def main(argv: list[str] | None = None) -> None:
    """Run with these arguments; None = those of the command line."""
    launch(run, (ModelArguments, DataTrainingArguments, SparseDistillConfig), tiny_tasks.ner, argv)


if __name__ == "__main__":
    main()

"""Make a summariser or translator small and fast: fine-tune (only if asked), prune and distil, measure, publish.

In the manner of transformers' run_summarization.py and run_translation.py: texts are generated for evaluation and
compared by ROUGE-L and exact match. Data: a dataset of the Hub, or files with a column of sources and one of targets.
`--smoke` tries it all in seconds, offline.

    python examples/run_seq2seq.py --model_name_or_path google-t5/t5-small --dataset_name abisee/cnn_dailymail \
        --dataset_config_name 3.0.0 --source_column article --target_column highlights --source_prefix "summarize: " \
        --finetune_epochs 1 --do_train --do_eval --predict_with_generate --learning_rate 3e-4 --num_train_epochs 3 \
        --output_dir cnn-sparse

Many GPUs:

    accelerate launch --multi_gpu --num_processes 4 examples/run_seq2seq.py ...
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tiny_tasks
from common import FileArguments, ModelArguments, data_name, launch, load_data, option, start, take, wanted_splits
from runs import Loader, dense_model, finish, measure, prune, teacher_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, Seq2SeqTrainer

from hf_sparse import SparseDistillSeq2SeqConfig, SparseDistillSeq2SeqTrainer


@dataclass
class DataTrainingArguments(FileArguments):
    """What the model is trained and measured on."""

    source_column: str = option("source", "Column of what is read.")
    target_column: str = option("target", "Column of what is to be written.")
    source_prefix: str = option("", "What is put before every source, as T5 wants it.")
    max_source_length: int = option(512, "Tokens after which a source is cut off.")
    max_target_length: int = option(128, "Tokens after which a target is cut off.")


def encode(rows: dict[str, list[Any]], tokenizer: Any, data_args: DataTrainingArguments) -> dict[str, list[Any]]:
    """Turn sources and targets into tokens."""
    sources = [data_args.source_prefix + text for text in rows[data_args.source_column]]
    encoded = tokenizer(sources, max_length=data_args.max_source_length, truncation=True)
    targets = tokenizer(
        text_target=rows[data_args.target_column], max_length=data_args.max_target_length, truncation=True
    )
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "labels": targets["input_ids"],
    }


def rouge_l(found: str, truth: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), case folded, without stemming.

    Example:
        >>> rouge_l("the cat sat", "the cat lay")
        0.6666666666666666
    """
    words, true = found.lower().split(), truth.lower().split()
    if not words or not true:
        return float(words == true)
    row = [0] * (len(true) + 1)
    for word in words:
        before = row[:]
        for j, other in enumerate(true, 1):
            row[j] = before[j - 1] + 1 if word == other else max(before[j], row[j - 1])
    return 2 * row[-1] / (len(words) + len(true))


class TextMetric:
    """ROUGE-L and exact match of generated texts, in percent."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, output: Any) -> dict[str, float]:
        """Compute them for what `Trainer` hands to `compute_metrics`: ids of generated and of true texts."""
        found, true = (
            self.tokenizer.batch_decode(np.where(ids < 0, self.tokenizer.pad_token_id, ids), skip_special_tokens=True)
            for ids in (output.predictions, output.label_ids)
        )
        pairs = [(one.strip(), other.strip()) for one, other in zip(found, true, strict=True)]
        return {
            "rouge_l": 100 * float(np.mean([rouge_l(*pair) for pair in pairs])),
            "exact_match": 100 * float(np.mean([one == other for one, other in pairs])),
        }


def run(model_args: ModelArguments, data_args: DataTrainingArguments, args: SparseDistillSeq2SeqConfig) -> None:
    """Load, fine-tune, prune, measure, save, publish."""
    checkpoint = start(args)
    raw = load_data(args, model_args, data_args)
    name, where = str(model_args.model_name_or_path), {"cache_dir": model_args.cache_dir}
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, **where)
    to_ids = partial(encode, tokenizer=tokenizer, data_args=data_args)

    data: dict[str, Any] = {}
    for split, rows, limit in wanted_splits(args, data_args, raw, (data_args.source_column, data_args.target_column)):
        with args.main_process_first(desc=f"tokenising {split}"):
            data[split] = take(rows, limit).map(to_ids, batched=True, remove_columns=rows.column_names)

    load = Loader(AutoModelForSeq2SeqLM, **where)
    if args.generation_max_length is None:
        args.generation_max_length = data_args.max_target_length
    # It makes the decoder's inputs out of the labels by itself: models know how.
    collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8 if args.fp16 or args.bf16 else None)
    common: dict[str, Any] = {
        "train_dataset": data.get("train"),
        "eval_dataset": data.get("validation"),
        "processing_class": tokenizer,
        "data_collator": collator,
        # Without generation there are only the logits of the right text, which say little.
        "compute_metrics": TextMetric(tokenizer) if args.predict_with_generate else None,
    }
    trainer: Any
    if args.do_train:
        teacher, trainers = teacher_model(load, model_args), (Seq2SeqTrainer, SparseDistillSeq2SeqTrainer)
        model = dense_model(load, model_args, args, checkpoint, teacher, trainers, **common)
        trainer = SparseDistillSeq2SeqTrainer(model, args, teacher_model=teacher, **common)
        metrics = prune(trainer, checkpoint)
    else:
        trainer = Seq2SeqTrainer(load(name), args, **common)
        metrics = measure(trainer)
    names = ["rouge_l", "exact_match"] if args.predict_with_generate else ["loss"]
    card = {"tasks": "text2text-generation", "finetuned_from": name, "dataset": data_name(data_args)}
    finish(trainer, metrics, names, **card)


def main(argv: list[str] | None = None) -> None:
    """Run with these arguments; None = those of the command line."""
    launch(run, (ModelArguments, DataTrainingArguments, SparseDistillSeq2SeqConfig), tiny_tasks.seq2seq, argv)


if __name__ == "__main__":
    main()

"""Make a causal language model small and fast: train or fine-tune (only if asked), prune and distil, measure, publish.

In the manner of transformers' run_clm.py: text is joined and cut into blocks of `--block_size` tokens. Data: a dataset
of the Hub with a column of text, or text files (gzipped or not). `--smoke` tries it all in seconds, offline.

    python examples/run_clm.py --model_name_or_path openai-community/gpt2 --dataset_name Salesforce/wikitext \
        --dataset_config_name wikitext-2-raw-v1 --finetune_epochs 1 --do_train --do_eval --learning_rate 1e-4 \
        --num_train_epochs 3 --output_dir gpt2-sparse

Without a pretrained model, a small one is made from a config, with a byte-level BPE of its own, and trained first:

    python examples/run_clm.py --config_name gpt2 --config_overrides n_embd=256,n_layer=4,n_head=4 --vocab_size 8000 \
        --train_file train.txt --validation_file dev.txt --finetune_epochs 10 --finetune_learning_rate 1e-3 \
        --do_train --do_eval --num_train_epochs 5 --output_dir small-sparse

Many GPUs:

    accelerate launch --multi_gpu --num_processes 4 examples/run_clm.py ...
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tiny_tasks
from common import FileArguments, ModelArguments, data_name, launch, load_data, option, start, take, wanted_splits
from runs import Loader, dense_model, finish, measure, prune, teacher_model
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    default_data_collator,
)

from hf_sparse import SparseDistillConfig, SparseDistillTrainer


@dataclass
class LanguageModelArguments(ModelArguments):
    """Which model is pruned, and which one teaches it; or how to make one."""

    config_name: str | None = option(None, "Kind of a model to make, such as gpt2, in place of a pretrained one.")
    config_overrides: str | None = option(None, "Its sizes: n_embd=256,n_layer=4,n_head=4")
    vocab_size: int = option(8000, "Size of the vocabulary that is learned from train_file for such a model.")


@dataclass
class DataTrainingArguments(FileArguments):
    """What the model is trained and measured on."""

    text_column: str = option("text", "Column of the text.")
    block_size: int = option(512, "Tokens of a training sample.")
    max_train_samples: int | None = option(None, "Take only so many blocks, the first ones.")
    max_eval_samples: int | None = option(None, "Take only so many blocks, the first ones.")


def learn_tokenizer(texts: Iterator[str], vocab_size: int) -> Any:
    """Learn a byte-level BPE from text; "<|endoftext|>" begins, ends and pads."""
    learned, end = ByteLevelBPETokenizer(), "<|endoftext|>"
    learned.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[end], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=learned._tokenizer, bos_token=end, eos_token=end, unk_token=end, pad_token=end
    )


def make_model(model_args: LanguageModelArguments, tokenizer: Any, block_size: int) -> Any:
    """Make an untrained model of a kind and a size."""
    if model_args.config_name not in CONFIG_MAPPING:
        raise ValueError(f"config_name={model_args.config_name!r} is no kind of model that transformers knows.")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CONFIG_MAPPING[model_args.config_name](vocab_size=len(tokenizer), **ids)
    if model_args.config_overrides:
        config.update_from_string(model_args.config_overrides)
    config.max_position_embeddings = max(block_size, 8)
    return AutoModelForCausalLM.from_config(config)


def into_blocks(rows: dict[str, list[Any]], tokenizer: Any, column: str, size: int) -> dict[str, list[Any]]:
    """Join a batch of texts and cut it into blocks; what is left over at its end is dropped."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = [text for text in rows[column] if text and not text.isspace()]
    ids = list(chain.from_iterable([*tokens, *end] for tokens in tokenizer(texts)["input_ids"])) if texts else []
    blocks = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    return {"input_ids": blocks, "labels": blocks}


def next_token_accuracy(output: Any) -> dict[str, float]:
    """Share of tokens that were predicted; predictions are token ids."""
    return {"accuracy": float(np.mean(output.predictions[:, :-1] == output.label_ids[:, 1:]))}


def with_perplexity(metrics: dict[str, float]) -> dict[str, float]:
    """Add the perplexity that belongs to each loss."""
    losses = {key: value for key, value in metrics.items() if key in ("dense_loss", "eval_loss")}
    return metrics | {key.replace("loss", "perplexity"): math.exp(value) for key, value in losses.items()}


def run(model_args: LanguageModelArguments, data_args: DataTrainingArguments, args: SparseDistillConfig) -> None:
    """Load, train, prune, measure, save, publish."""
    checkpoint = start(args)
    if model_args.model_name_or_path is None and args.needs_teacher and not model_args.finetune_epochs:
        raise ValueError(
            "a model made from a config has learned nothing and would teach noise: give --finetune_epochs."
        )
    if model_args.model_name_or_path is None and not args.do_train:
        raise ValueError("a model made from a config is trained first: give --do_train, or --model_name_or_path.")
    if data_args.block_size < 2:
        raise ValueError(f"block_size={data_args.block_size} must be at least 2: a token and the next one.")
    raw = load_data(args, model_args, data_args)
    splits = wanted_splits(args, data_args, raw, [data_args.text_column])
    where = {"cache_dir": model_args.cache_dir}
    if model_args.model_name_or_path is None:
        # Made once, by one process, and a folder like any other from here on.
        folder = Path(args.output_dir) / "_untrained"
        with args.main_process_first(desc="making the model"):
            if args.should_save and not (folder / "config.json").is_file():
                tokenizer = learn_tokenizer(iter(raw["train"][data_args.text_column]), model_args.vocab_size)
                make_model(model_args, tokenizer, data_args.block_size).save_pretrained(folder)
                tokenizer.save_pretrained(folder)
        model_args.model_name_or_path = str(folder)
    name = str(model_args.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, **where)
    size = min(data_args.block_size, tokenizer.model_max_length)
    cut = partial(into_blocks, tokenizer=tokenizer, column=data_args.text_column, size=size)

    data: dict[str, Any] = {}
    for split, rows, limit in splits:
        with args.main_process_first(desc=f"tokenising {split}"):
            # Whole splits at once, so that no more than one block's worth is dropped.
            blocks = rows.map(cut, batched=True, batch_size=None, remove_columns=rows.column_names)
        if not len(blocks):
            raise ValueError(f"the {split} data is shorter than one block: lower block_size={size}.")
        data[split] = take(blocks, limit)

    common: dict[str, Any] = {
        "train_dataset": data.get("train"),
        "eval_dataset": data.get("validation"),
        "processing_class": tokenizer,
        "data_collator": default_data_collator,
        "compute_metrics": next_token_accuracy,
        # The logits of a whole data set would not fit into memory.
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    }
    load = Loader(AutoModelForCausalLM, **where)
    trainer: Trainer
    if args.do_train:
        teacher = teacher_model(load, model_args)
        model = dense_model(load, model_args, args, checkpoint, teacher, **common)
        trainer = SparseDistillTrainer(model, args, teacher_model=teacher, **common)
        metrics = prune(trainer, checkpoint)
    else:
        trainer = Trainer(load(name), args, **common)
        metrics = measure(trainer)
    metrics = with_perplexity(metrics)
    card = {"tasks": "text-generation", "finetuned_from": name, "dataset": data_name(data_args)}
    finish(trainer, metrics, ["perplexity", "accuracy"], **card)


def main(argv: list[str] | None = None) -> None:
    """Run with these arguments; None = those of the command line."""
    launch(run, (LanguageModelArguments, DataTrainingArguments, SparseDistillConfig), tiny_tasks.clm, argv)


if __name__ == "__main__":
    main()

"""Make a question answering model small and fast: fine-tune (only if asked), prune and distil, measure, publish.

Extractive QA in the manner of transformers' run_qa.py. Data: a dataset of the Hub, files of rows (id, context,
question, answers), or files as SQuAD publishes them. With one such file alone, `--eval_articles 0.3` holds out the
last 30 % of its articles. `--smoke` tries it all in seconds, offline.

    python examples/run_qa.py --model_name_or_path distilbert/distilbert-base-uncased --dataset_name rajpurkar/squad \
        --finetune_epochs 2 --do_train --do_eval --learning_rate 2e-4 --num_train_epochs 5 --output_dir squad-sparse

Many GPUs:

    accelerate launch --multi_gpu --num_processes 4 examples/run_qa.py ...
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import tiny_tasks
from common import FileArguments, ModelArguments, data_name, launch, load_splits, option, start, take, wanted_splits
from runs import Loader, dense_model, finish, measure, prune, teacher_model
from squad_answers import SquadMetric, encode, read_squad, split_articles
from torch.utils.data import SequentialSampler
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, DataCollatorWithPadding, Trainer

from hf_sparse import SparseDistillConfig, SparseDistillTrainer

COLUMNS = ("id", "context", "question", "answers")


@dataclass
class DataTrainingArguments(FileArguments):
    """What the model is trained and measured on: data with the columns of SQuAD, or json as SQuAD publishes it."""

    eval_articles: float = option(0.3, "Share of the articles of train_file to hold out, without a validation_file.")
    max_seq_length: int = option(384, "Tokens of question and context together; longer contexts are cut into several.")
    doc_stride: int = option(128, "Tokens that neighbours of one context share.")
    max_answer_length: int = option(30, "Tokens of an answer.")
    n_best_size: int = option(20, "Starts and ends that are combined to find an answer.")
    max_train_samples: int | None = option(None, "Take only so many questions, drawn at random.")
    max_eval_samples: int | None = option(None, "Take only so many questions, drawn at random.")


class InOrder:
    """Evaluates in the order of the data, which answers are found by, also where training groups samples by length."""

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        return SequentialSampler(eval_dataset)


class QuestionAnsweringTrainer(InOrder, Trainer):
    """Trains the dense model."""


class SparseQuestionAnsweringTrainer(InOrder, SparseDistillTrainer):
    """Prunes it."""


def load_data(data_args: DataTrainingArguments, cache_dir: str | None) -> Any:
    """Give {"train": rows, "validation": rows}, as far as there are any."""
    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    nested = {split: rows for split, file in files.items() if file and (rows := read_squad(file)) is not None}
    others = {split: None if split in nested else file for split, file in files.items()}
    data: dict[str, Any] = dict(nested)
    if any(others.values()) or not nested:
        data |= load_splits(others, data_args.dataset_name, data_args.dataset_config_name, cache_dir)
    if "validation" not in data and "train" in nested:
        data["train"], data["validation"] = split_articles(nested["train"], data_args.eval_articles)
    return data


def run(model_args: ModelArguments, data_args: DataTrainingArguments, args: SparseDistillConfig) -> None:
    """Load, fine-tune, prune, measure, save, publish."""
    checkpoint = start(args)
    with args.main_process_first(desc="loading data"):
        data = load_data(data_args, model_args.cache_dir)
    name, where = str(model_args.model_name_or_path), {"cache_dir": model_args.cache_dir}
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, **where)
    if not tokenizer.is_fast:
        raise ValueError(f"{name} has no fast tokenizer, which alone tells where in the text its tokens are.")
    length = min(data_args.max_seq_length, tokenizer.model_max_length)
    # Not more than a quarter of a short feature, beside a question that may be long.
    to_features = partial(encode, tokenizer=tokenizer, length=length, stride=min(data_args.doc_stride, length // 4))

    examples: dict[str, Any] = {}
    features: dict[str, Any] = {}
    for split, rows, limit in wanted_splits(args, data_args, data, COLUMNS):
        # The first ones would all be about one thing.
        examples[split] = rows = take(rows, limit, args.seed)
        with args.main_process_first(desc=f"tokenising {split}"):
            features[split] = rows.map(to_features, batched=True, remove_columns=rows.column_names)

    metric = None
    if args.do_eval:
        limits_of_answers = (data_args.n_best_size, data_args.max_answer_length)
        metric = SquadMetric(examples["validation"], features["validation"], *limits_of_answers)
    for split, rows in features.items():
        # The collator makes tensors of all that is left.
        features[split] = rows.remove_columns(["example_id", "offset_mapping"])
    common: dict[str, Any] = {
        "train_dataset": features.get("train"),
        "eval_dataset": features.get("validation"),
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if args.fp16 or args.bf16 else None),
        "compute_metrics": metric,
    }
    load = Loader(AutoModelForQuestionAnswering, **where)
    trainers = (QuestionAnsweringTrainer, SparseQuestionAnsweringTrainer)
    trainer: Trainer
    if args.do_train:
        teacher = teacher_model(load, model_args)
        model = dense_model(load, model_args, args, checkpoint, teacher, trainers, **common)
        trainer = SparseQuestionAnsweringTrainer(model, args, teacher_model=teacher, **common)
        metrics = prune(trainer, checkpoint)
    else:
        trainer = QuestionAnsweringTrainer(load(name), args, **common)
        metrics = measure(trainer)
    card = {"tasks": "question-answering", "finetuned_from": name, "dataset": data_name(data_args)}
    finish(trainer, metrics, ["exact_match", "f1"], **card)


def main(argv: list[str] | None = None) -> None:
    """Run with these arguments; None = those of the command line."""
    launch(run, (ModelArguments, DataTrainingArguments, SparseDistillConfig), tiny_tasks.qa, argv)


if __name__ == "__main__":
    main()

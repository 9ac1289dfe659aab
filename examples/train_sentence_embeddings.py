"""Make a sentence encoder small and fast: prune it so that its embeddings stay those of the dense model.

The distillation target is the embedding itself, so that plain sentences are enough to train on: no labels, no pairs.
Measured is how close the embeddings are, and, where the evaluation data holds pairs with a score (as STS-B does), the
rank correlation of their cosine similarity with it. `--smoke` tries it all in seconds, offline.

    python examples/train_sentence_embeddings.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
        --dataset_name sentence-transformers/stsb --text_columns sentence1,sentence2 --score_column score \
        --do_train --do_eval --learning_rate 3e-4 --num_train_epochs 5 --output_dir minilm-sparse

What belongs to a model of sentence-transformers (modules.json, pooling) is copied beside the result, which
`SentenceTransformer` then loads after `import hf_sparse`.

Many GPUs:

    accelerate launch --multi_gpu --num_processes 4 examples/train_sentence_embeddings.py ...
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiny_tasks
import torch
from common import FileArguments, ModelArguments, data_name, launch, load_data, option, start, take, wanted_splits
from datasets import Dataset
from glue_data import spearman
from runs import finish
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding

from hf_sparse import SparseDistillConfig, SparseDistillTrainer
from hf_sparse.training.distillation.predictions import pooled

# Of a sentence-transformers folder: what tells it to pool and to normalise.
_AROUND = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")


@dataclass
class DataTrainingArguments(FileArguments):
    """What the model is trained and measured on; txt files hold a sentence per line."""

    text_columns: str = option("text", "Columns of sentences, separated by commas; two of them are pairs.")
    score_column: str | None = option(None, "Column that says how similar the sentences of a pair are.")
    max_seq_length: int = option(128, "Tokens after which a sentence is cut off.")
    max_train_samples: int | None = option(None, "Take only so many sentences, the first ones.")


class Embedder:
    """Gives the embeddings of sentences, as training sees them.

    Args:
        tokenizer: of the model.
        pooling: as in `SparseDistillConfig.embedding_pooling`.
        length: tokens after which a sentence is cut off.
        batch_size: sentences at once.
    """

    def __init__(self, tokenizer: Any, pooling: str, length: int, batch_size: int) -> None:
        self.tokenizer, self.pooling, self.length, self.batch_size = tokenizer, pooling, length, batch_size

    def __call__(self, model: Any, sentences: list[str]) -> np.ndarray:
        """Give [sentences, hidden size], normalised."""
        rows, was_training = [], model.training
        model.eval()
        with torch.no_grad():
            for i in range(0, len(sentences), self.batch_size):
                batch = self.tokenizer(
                    sentences[i : i + self.batch_size], truncation=True, max_length=self.length, padding=True,
                    return_tensors="pt",
                ).to(model.device)  # fmt: skip
                hidden = model(**batch).last_hidden_state
                rows.append(pooled(hidden, batch["attention_mask"], self.pooling).float().cpu())
        model.train(was_training)
        return torch.nn.functional.normalize(torch.cat(rows), dim=-1).numpy()


def measure(embed: Embedder, model: Any, data: Dataset, columns: list[str], score: str | None) -> dict[str, Any]:
    """Embed the columns of the evaluation data, and correlate cosine similarity with the score where there is one."""
    sides = [embed(model, list(data[column])) for column in columns]
    found: dict[str, Any] = {"embeddings": np.concatenate(sides)}
    if score is not None:
        similarity = (sides[0] * sides[1]).sum(-1)
        found["spearman"] = spearman(similarity, np.asarray(data[score], dtype=np.float64))
    return found


def run(model_args: ModelArguments, data_args: DataTrainingArguments, args: SparseDistillConfig) -> None:
    """Load, prune, measure, save, publish."""
    checkpoint = start(args)
    if not args.do_train or model_args.finetune_epochs:
        raise ValueError("this script prunes an encoder as it is: give --do_train, and no --finetune_epochs.")
    # There are no labels: all that is learned is the teacher's embedding.
    args.task_weight, args.kd_weight = 0.0, args.kd_weight or 1.0
    raw = load_data(args, model_args, data_args)
    columns = [column.strip() for column in data_args.text_columns.split(",")]
    if data_args.score_column and len(columns) != 2:
        raise ValueError(f"score_column needs two text_columns, found {columns}.")
    splits = {split: (rows, limit) for split, rows, limit in wanted_splits(args, data_args, raw, columns)}
    evals = take(*splits["validation"]) if args.do_eval else None
    if evals is not None and data_args.score_column not in (None, *evals.column_names):
        raise ValueError(f"score_column={data_args.score_column!r} is not among the columns {evals.column_names}.")
    name, where = str(model_args.model_name_or_path), {"cache_dir": model_args.cache_dir}
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, **where)
    length = min(data_args.max_seq_length, tokenizer.model_max_length)
    model = AutoModel.from_pretrained(name, **where)

    rows, limit = splits["train"]
    sentences = [text for column in columns for text in rows[column] if text and not text.isspace()]
    sentences = list(dict.fromkeys(sentences))[:limit]
    to_ids = partial(tokenizer, truncation=True, max_length=length)
    with args.main_process_first(desc="tokenising"):
        train = Dataset.from_dict({"text": sentences}).map(
            lambda rows: to_ids(rows["text"]), batched=True, remove_columns=["text"]
        )
    teacher = model_args.teacher_model_name_or_path
    trainer = SparseDistillTrainer(
        model, args, teacher_model=teacher and AutoModel.from_pretrained(teacher, **where), train_dataset=train,
        processing_class=tokenizer, data_collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    embed = Embedder(tokenizer, args.embedding_pooling, length, args.per_device_eval_batch_size)
    if evals is not None:
        dense = measure(embed, trainer.student, evals, columns, data_args.score_column)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    metrics: dict[str, float] = {}
    if evals is not None:
        pruned = measure(embed, trainer.student, evals, columns, data_args.score_column)
        own, others = dense.pop("embeddings"), pruned.pop("embeddings")
        metrics = {f"dense_{key}": value for key, value in dense.items()}
        metrics |= {f"eval_{key}": value for key, value in pruned.items()}
        # A mean over sentences of the cosine between what the dense model said and what the pruned one says.
        metrics |= {"dense_cosine_to_dense": 1.0, "eval_cosine_to_dense": float((own * others).sum(-1).mean())}
    if trainer.is_world_process_zero():
        copy_around(Path(name), Path(args.output_dir))
    names = ["cosine_to_dense", *(["spearman"] if data_args.score_column else [])]
    card = {"tasks": "sentence-similarity", "finetuned_from": name, "dataset": data_name(data_args)}
    finish(trainer, metrics, names, **card)


def copy_around(source: Path, target: Path) -> None:
    """Copy what makes a folder of transformers one of sentence-transformers; nothing where the source is none."""
    if not (source / "modules.json").is_file():
        return
    for file in [source / name for name in _AROUND if (source / name).is_file()]:
        shutil.copy2(file, target / file.name)
    for folder in source.glob("[0-9]_*"):
        shutil.copytree(folder, target / folder.name, dirs_exist_ok=True)


def main(argv: list[str] | None = None) -> None:
    """Run with these arguments; None = those of the command line."""
    launch(run, (ModelArguments, DataTrainingArguments, SparseDistillConfig), tiny_tasks.sentences, argv)


if __name__ == "__main__":
    main()

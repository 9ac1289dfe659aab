"""A tiny model and a made-up task, written in a moment without a network: what `--smoke` of the examples runs on."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

_FILLERS = [f"filler{i}" for i in range(60)]
_WORDS = {"bad": ["awful", "boring", "clumsy", "dull"], "good": ["bright", "charming", "moving", "witty"]}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def write_model(folder: Path, with_head: bool = False) -> Path:
    """Save a tiny BERT (with a classification head, if asked) and its tokenizer.

    Args:
        folder: where to.
        with_head: whether it classifies, or is a bare encoder as a pretrained one is.

    Returns:
        The folder.
    """
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_FILLERS, *_WORDS["bad"], *_WORDS["good"]]
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(_WORDS)), "label2id": {name: i for i, name in enumerate(_WORDS)}}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=64, **_SIZES, **(names if with_head else {}))
    (BertForSequenceClassification if with_head else BertModel)(config).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=64).save_pretrained(folder)
    return folder


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Make sentences of filler words in which one word tells whether they are "good" or "bad"."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        label = chance.choice(["bad", "good"])
        words = [*chance.choices(_FILLERS, k=chance.randint(4, 12)), chance.choice(_WORDS[label])]
        chance.shuffle(words)
        rows.append({"sentence": " ".join(words), "label": label})
    return rows


def write_csv(file: Path, count: int, seed: int) -> Path:
    """Write `make_rows` to a csv file, and give the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, ["sentence", "label"])
        writer.writeheader()
        writer.writerows(make_rows(count, seed))
    return file


def smoke_arguments(folder: Path) -> list[str]:
    """Write model and data into `folder`, and give the arguments with which run_glue.py trains on them."""
    files = {split: write_csv(folder / f"{split}.csv", 128, seed) for seed, split in enumerate(("validation", "test"))}
    files["train"] = write_csv(folder / "train.csv", 384, seed=2)
    data = [text for split, file in files.items() for text in (f"--{split}_file", str(file))]
    training = "--finetune_epochs 3 --finetune_learning_rate 1e-2 --num_train_epochs 3 --learning_rate 5e-3"
    running = "--per_device_train_batch_size 32 --logging_steps 16 --save_strategy no --use_cpu"
    tasks = "--do_train --do_eval --do_predict --output_dir smoke_output"
    return [
        "--model_name_or_path",
        str(write_model(folder / "model")),
        *data,
        *f"{training} {running} {tasks}".split(),
    ]

"""Make an image classifier small and fast: fine-tune (only if asked), prune and distil, measure, publish.

In the manner of transformers' run_image_classification.py. Data: a dataset of the Hub, or folders of images with one
folder per class inside (`train_dir/cat/1.png`), read by Pillow (`pip install pillow`). `--smoke` tries it all in
seconds, offline.

    python examples/run_image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name AI-Lab-Makerere/beans --label_column labels --finetune_epochs 3 --do_train --do_eval \
        --learning_rate 2e-4 --num_train_epochs 5 --output_dir beans-sparse

Many GPUs:

    accelerate launch --multi_gpu --num_processes 4 examples/run_image_classification.py ...
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny_tasks
import torch
from common import DataArguments, ModelArguments, data_name, launch, option, start, take, wanted_splits
from datasets import ClassLabel, DatasetDict, load_dataset
from runs import Loader, dense_model, finish, measure, prune, teacher_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer

from hf_sparse import SparseDistillConfig, SparseDistillTrainer


@dataclass
class DataTrainingArguments(DataArguments):
    """What the model is trained and measured on: a dataset of the Hub, or folders."""

    train_dir: str | None = option(None, "Folder of training images, one folder per class inside.")
    validation_dir: str | None = option(None, "Such a folder for --do_eval.")
    image_column: str = option("image", "Column of the images.")
    label_column: str = option("label", "Column of the classes.")
    flip: bool = option(True, "Mirror training images at random.")
    max_train_samples: int | None = option(None, "Take only so many images, drawn at random.")
    max_eval_samples: int | None = option(None, "Take only so many images, drawn at random.")


def load_images(data_args: DataTrainingArguments, cache_dir: str | None) -> Any:
    """Give the splits there are: from folders, or else from the Hub."""
    folders = {"train": data_args.train_dir, "validation": data_args.validation_dir}
    given = {split: folder for split, folder in folders.items() if folder is not None}
    if not given:
        if data_args.dataset_name is None:
            raise ValueError("there are no images: give --dataset_name, or --train_dir and --validation_dir.")
        return load_dataset(data_args.dataset_name, data_args.dataset_config_name, cache_dir=cache_dir)
    for split, folder in given.items():
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{split}_dir={folder!r} is no folder.")
    return DatasetDict(
        {
            split: load_dataset("imagefolder", data_dir=folder, split="train", cache_dir=cache_dir)
            for split, folder in given.items()
        }
    )


class Pixels:
    """Turns images into what the model takes, as they are asked for.

    Args:
        processor: of the model; resizes and normalises.
        image, label: columns.
        ids: {class id in the data: class id of the model}.
        flip: whether half of the images are mirrored, drawn anew each time.
    """

    def __init__(self, processor: Any, image: str, label: str, ids: dict[int, int], flip: bool) -> None:
        self.processor, self.image, self.label, self.ids, self.flip = processor, image, label, ids, flip

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        """Give pixel_values [3, height, width] and label for each row."""
        images = [image.convert("RGB") for image in rows[self.image]]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        if self.flip:
            mirrored = torch.rand(len(pixels)) < 0.5
            pixels[mirrored] = pixels[mirrored].flip(-1)
        return {"pixel_values": list(pixels), "label": [self.ids[label] for label in rows[self.label]]}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack images and labels."""
    pixels = torch.stack([row["pixel_values"] for row in rows])
    return {"pixel_values": pixels, "labels": torch.tensor([row["label"] for row in rows])}


def accuracy(output: Any) -> dict[str, float]:
    """Share of right answers."""
    return {"accuracy": float(np.mean(output.predictions.argmax(-1) == output.label_ids))}


def run(model_args: ModelArguments, data_args: DataTrainingArguments, args: SparseDistillConfig) -> None:
    """Load, fine-tune, prune, measure, save, publish."""
    checkpoint = start(args)
    # Images are made into tensors from their own column, which the trainer would throw away.
    args.remove_unused_columns = False
    with args.main_process_first(desc="loading images"):
        raw = load_images(data_args, model_args.cache_dir)
    image, label = data_args.image_column, data_args.label_column
    reference = raw["train"] if "train" in raw else next(iter(raw.values()))
    for column in (image, label):
        if column not in reference.column_names:
            raise ValueError(f"there is no column {column!r}, only {reference.column_names}: name it.")
    if not isinstance(reference.features[label], ClassLabel):
        raise ValueError(f"label_column={label!r} holds no named classes, but {reference.features[label]}.")
    names = reference.features[label].names
    name, where = str(model_args.model_name_or_path), {"cache_dir": model_args.cache_dir}
    labels = {"id2label": dict(enumerate(names)), "label2id": {text: i for i, text in enumerate(names)}}
    load = Loader(AutoModelForImageClassification, **labels, **where, ignore_mismatched_sizes=True)
    processor = AutoImageProcessor.from_pretrained(name, **where)

    data: dict[str, Any] = {}
    for split, rows, limit in wanted_splits(args, data_args, raw, (image, label)):
        # Folders of another split may lack a class, and count the others differently.
        if unknown := sorted(set(rows.features[label].names) - set(names)):
            raise ValueError(f"the {split} data has the class {unknown[0]!r}, which is none of {names}.")
        ids = {i: names.index(text) for i, text in enumerate(rows.features[label].names)}
        flip = data_args.flip and split == "train"
        data[split] = take(rows, limit, args.seed).with_transform(Pixels(processor, image, label, ids, flip))

    common: dict[str, Any] = {
        "train_dataset": data.get("train"),
        "eval_dataset": data.get("validation"),
        "processing_class": processor,
        "data_collator": collate,
        "compute_metrics": accuracy,
    }
    trainer: Trainer
    if args.do_train:
        teacher = teacher_model(load, model_args)
        model = dense_model(load, model_args, args, checkpoint, teacher, **common)
        trainer = SparseDistillTrainer(model, args, teacher_model=teacher, **common)
        metrics = prune(trainer, checkpoint)
    else:
        trainer = Trainer(load(name), args, **common)
        metrics = measure(trainer)
    card = {"tasks": "image-classification", "finetuned_from": name, "dataset": data_name(data_args)}
    finish(trainer, metrics, ["accuracy"], **card)


def main(argv: list[str] | None = None) -> None:
    """Run with these arguments; None = those of the command line."""
    if importlib.util.find_spec("PIL") is None:
        raise ImportError("images are read by Pillow, which is not installed: pip install pillow")
    launch(run, (ModelArguments, DataTrainingArguments, SparseDistillConfig), tiny_tasks.images, argv)


if __name__ == "__main__":
    main()

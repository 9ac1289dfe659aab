"""What the example scripts share before a model is made: their arguments, the command line, data."""

from __future__ import annotations

import csv
import logging
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_sparse import SparseDistillConfig

logger = logging.getLogger("examples")

# Otherwise the word "NA" would be no text; and GLUE's .tsv files hold quotation marks that never close.
_CSV: dict[str, Any] = {"keep_default_na": False}
# {ending of a file's name: what reads it}
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {**_CSV, "sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".txt": ("text", {}),
}


def option(default: Any, text: str) -> Any:
    """Make a field that `--help` explains."""
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which model is pruned, and which one teaches it."""

    model_name_or_path: str | None = option(None, "Folder or repo id of the model to prune.")
    teacher_model_name_or_path: str | None = option(None, "Fine-tuned teacher; None = the dense model itself.")
    finetune_epochs: float = option(0.0, "Epochs of plain fine-tuning before pruning; 0 = it is fine-tuned already.")
    finetune_learning_rate: float = option(5e-5, "Learning rate of that fine-tuning.")
    tokenizer_name: str | None = option(None, "Folder or repo id of the tokenizer, if it is not with the model.")
    cache_dir: str | None = option(None, "Where downloads are kept.")


@dataclass
class DataArguments:
    """What the model is trained and measured on."""

    dataset_name: str | None = option(None, "Dataset on the Hub.")
    dataset_config_name: str | None = option(None, "Configuration of that dataset.")
    max_train_samples: int | None = option(None, "Take only so many rows, the first ones.")
    max_eval_samples: int | None = option(None, "Take only so many rows, the first ones.")
    smoke: bool = option(False, "Try the script in seconds, offline, on a tiny model and a made-up task.")


@dataclass
class FileArguments(DataArguments):
    """What the model is trained and measured on: a dataset of the Hub, or files."""

    train_file: str | None = option(None, f"Training data, in place of a dataset: {', '.join(READERS)}.")
    validation_file: str | None = option(None, "Data for --do_eval, likewise.")


def launch(
    run: Callable[..., None], classes: Sequence[Any], smoke: Callable[[Path], list[str]], argv: list[str] | None
) -> None:
    """Run a script with the arguments of its command line.

    Args:
        run: takes what was parsed, one of each of `classes`.
        classes: see `parse`.
        smoke: writes a tiny model and tiny data into a folder, and gives the arguments for them; used for `--smoke`.
        argv: the command line; None = that of the process.
    """
    with tempfile.TemporaryDirectory() as scratch:
        run(*parse(classes, sys.argv[1:] if argv is None else argv, partial(smoke, Path(scratch))))


def parse(
    classes: Sequence[Any], argv: list[str], smoke: Callable[[], list[str]], actions: Sequence[str] = ("train", "eval")
) -> tuple[Any, ...]:
    """Read a command line, or the one JSON or YAML file that it names.

    Args:
        classes: dataclasses of arguments, the first one `ModelArguments`, the last one a `SparseDistillConfig`.
        argv: the command line.
        smoke: see `launch`.
        actions: what the script can be asked to do.

    Raises:
        ValueError: if there is no model, or nothing to do that the script does.
    """
    parser = HfArgumentParser(list(classes))
    if len(argv) == 1 and argv[0].endswith(".json"):
        parsed = parser.parse_json_file(argv[0])
    elif len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        parsed = parser.parse_yaml_file(argv[0])
    else:
        # What is given wins over what the smoke run would take.
        parsed = parser.parse_args_into_dataclasses([*smoke(), *argv] if "--smoke" in argv else argv)
    model_args, args = parsed[0], parsed[-1]
    if model_args.model_name_or_path is None and not getattr(model_args, "config_name", None):
        raise ValueError("model_name_or_path is missing: name the model to prune, or try the script with --smoke.")
    if model_args.finetune_epochs < 0:
        raise ValueError(f"finetune_epochs={model_args.finetune_epochs} must be at least 0.")
    asked = [name for name in ("train", "eval", "predict") if getattr(args, f"do_{name}")]
    if not asked:
        raise ValueError(f"there is nothing to do: give {' or '.join(f'--do_{name}' for name in actions)}.")
    if others := [name for name in asked if name not in actions]:
        raise ValueError(
            f"this script knows no --do_{others[0]}, only {', '.join(f'--do_{name}' for name in actions)}."
        )
    return tuple(parsed)


def start(args: SparseDistillConfig) -> str | None:
    """Set logging and seeds, and give the checkpoint to go on from: the one named, or the last one in output_dir."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    for name in ("examples", "hf_sparse"):
        logging.getLogger(name).setLevel(logging.INFO if args.process_index == 0 else logging.WARNING)
    set_seed(args.seed)
    logger.info("%d process(es), device %s.", args.world_size, args.device)
    return find_checkpoint(args)


def find_checkpoint(args: SparseDistillConfig) -> str | None:
    """Give the checkpoint to go on from: the one that was named, or the last one in output_dir.

    Raises:
        ValueError: if it is asked for, and there is none.
    """
    asked = args.resume_from_checkpoint
    if not args.do_train or str(asked).lower() == "false":
        return None
    if asked is not None and str(asked).lower() != "true":
        return asked
    last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if asked is not None and last is None:
        raise ValueError(f"resume_from_checkpoint={asked}, but output_dir={args.output_dir!r} holds no checkpoint.")
    if last is not None:
        logger.info("Going on from %s; to begin anew, add --resume_from_checkpoint false.", last)
    return last


def load_data(args: SparseDistillConfig, model_args: ModelArguments, data_args: FileArguments) -> Any:
    """Load what the data arguments name, one process after the other; see `load_splits`."""
    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    with args.main_process_first(desc="loading data"):
        return load_splits(files, data_args.dataset_name, data_args.dataset_config_name, model_args.cache_dir)


def load_splits(files: Mapping[str, str | None], name: str | None, config: str | None, cache_dir: str | None) -> Any:
    """Load data: from files where there are any, or else a dataset of the Hub.

    Args:
        files: {split: path or None}.
        name, config: of a dataset on the Hub.
        cache_dir: where downloads are kept.

    Returns:
        A `DatasetDict`.

    Raises:
        FileNotFoundError, ValueError: if there is no data, a file is missing, or is of no kind that is known.
    """
    given = {split: file for split, file in files.items() if file is not None}
    if not given:
        if name is None:
            raise ValueError("there is no data: give --dataset_name, or --train_file and --validation_file.")
        return load_dataset(name, config, cache_dir=cache_dir)
    for split, file in given.items():
        check_file(split, file)
    return read_files(given, cache_dir)


def check_file(split: str, file: str, readers: Sequence[str] = tuple(READERS)) -> None:
    """Refuse a data file that is missing, or whose name ends in none of `readers` (and, for all of them, in .gz).

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    if Path(file.removesuffix(".gz")).suffix not in readers:
        raise ValueError(f"{split}_file={file!r} cannot be read: its name must end in one of {list(readers)}.")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{split}_file={file!r} does not exist.")


def read_files(files: Mapping[str, str], cache_dir: str | None) -> DatasetDict:
    """Read data files, gzipped or not.

    Args:
        files: {split: path}, of kinds that are known.
        cache_dir: where what was read is kept.

    Raises:
        ValueError: for a file whose content is not what its name says.
    """
    splits = DatasetDict()
    for split, file in files.items():
        reader, options = READERS[Path(file.removesuffix(".gz")).suffix]
        try:
            splits[split] = load_dataset(reader, data_files=file, split="train", cache_dir=cache_dir, **options)
        # What pyarrow finds wrong with a parquet file is a ValueError.
        except (DatasetGenerationError, ValueError) as error:
            raise ValueError(f"{split}_file={file!r} cannot be read: {error.__cause__ or error}") from error
    return splits


def check_limits(data_args: Any) -> None:
    """Refuse to take no row, or fewer.

    Raises:
        ValueError: naming the field.
    """
    for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
        limit = getattr(data_args, name, None)
        if limit is not None and limit < 1:
            raise ValueError(f"{name}={limit} must be at least 1; leave it out to take all rows.")


def wanted_splits(
    args: SparseDistillConfig, data_args: DataArguments, data: Mapping[str, Any], columns: Sequence[str] = ()
) -> list[tuple[str, Any, int | None]]:
    """Give the splits that are asked for.

    Args:
        args: say what is to be done.
        data_args: say how many rows to take.
        data: {split: its rows}.
        columns: that the script reads.

    Returns:
        (split, its rows, how many of them to take; None = all).

    Raises:
        ValueError: naming the split that is missing or empty, its missing column, or a limit below 1.
    """
    check_limits(data_args)
    asked = {"train": (args.do_train, data_args.max_train_samples)}
    asked["validation"] = (args.do_eval, data_args.max_eval_samples)
    found = []
    for split, (wanted, limit) in asked.items():
        if not wanted:
            continue
        if split not in data:
            source = f"{split}_file" if hasattr(data_args, f"{split}_file") else f"{split}_dir"
            raise ValueError(f"there is no {split} data: give --{source}, or a dataset that has that split.")
        for column in columns:
            if column not in data[split].column_names:
                raise ValueError(f"the {split} data has no column {column!r}, only {data[split].column_names}.")
        if not len(data[split]):
            raise ValueError(f"the {split} data is empty.")
        found.append((split, data[split], limit))
    return found


def take(rows: Any, limit: int | None, seed: int | None = None) -> Any:
    """Take so many rows: the first ones, or with a seed some drawn at random; None = all."""
    if limit is None or limit >= len(rows):
        return rows
    return (rows if seed is None else rows.shuffle(seed=seed)).select(range(limit))


def data_name(data_args: DataArguments) -> str:
    """Name the data for the card: the dataset, or the file or folder."""
    given = [
        getattr(data_args, f"{split}_{kind}", None) for split in ("train", "validation") for kind in ("file", "dir")
    ]
    return data_args.dataset_name or Path(str(next(filter(None, given)))).name

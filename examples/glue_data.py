"""What run_glue.py has to know about data: the GLUE tasks, files, columns, labels, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import common
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset

# The column of labels, and {value in it: class id of the model}; None in place of the ids for a regression.
Labels = tuple[str, Mapping[Any, int] | None]


@dataclass(frozen=True)
class Task:
    """A GLUE task: columns of text, names of the classes in the order of their ids (none = a score), metrics."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]


_PAIR, _NLI = ("sentence1", "sentence2"), ("entailment", "not_entailment")
TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "mnli": Task(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",)),
    "mrpc": Task(_PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qnli": Task(("question", "sentence"), _NLI, ("accuracy",)),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "rte": Task(_PAIR, _NLI, ("accuracy",)),
    "sst2": Task(("sentence",), ("negative", "positive"), ("accuracy",)),
    "stsb": Task(_PAIR, (), ("pearson", "spearmanr")),
    "wnli": Task(_PAIR, ("not_entailment", "entailment"), ("accuracy",)),
}

# A text alone has no label.
READERS = tuple(ending for ending in common.READERS if ending != ".txt")


def check_source(task: str | None, files: Mapping[str, str], asked: Sequence[str]) -> None:
    """Refuse a task that is none, and data files that are missing or of no known kind.

    Args:
        task: GLUE task or None.
        files: {split: path}; none where the data comes from the Hub.
        asked: the splits that will be used.

    Raises:
        FileNotFoundError: naming the missing file.
        ValueError: naming the task, file or split, and what is known.
    """
    if not asked:
        raise ValueError("there is nothing to do: give --do_train, --do_eval or --do_predict.")
    if task not in (None, *TASKS):
        raise ValueError(f"task_name={task!r} is not known: use one of {list(TASKS)}, or give --train_file.")
    if task is None and not files:
        raise ValueError("there is no data: give --task_name, or --train_file and --validation_file.")
    for split, file in files.items():
        common.check_file(split, file, READERS)
    if files and (missing := [split for split in asked if split not in files]):
        raise ValueError(f"{missing[0]}_file is missing: name the {missing[0]} data.")


def load_splits(files: Mapping[str, str], task: str | None, cache_dir: str | None) -> DatasetDict:
    """Load all splits from files, or, where there are none, the task from the Hub.

    Raises:
        ConnectionError: if the Hub cannot be reached.
        ValueError: for a file whose content is not what its name says.
    """
    if not files:
        try:
            return load_dataset("nyu-mll/glue", task, cache_dir=cache_dir)
        except ConnectionError as error:
            raise ConnectionError(f"{error}. Without the Hub, give --train_file and --validation_file.") from error
    return common.read_files(files, cache_dir)


def find_text_columns(data: Dataset, task: str | None, label_key: str, asked: tuple[str | None, ...]) -> list[str]:
    """Name the columns of text: as asked, as in the GLUE tasks, or the only one that holds text.

    Returns:
        One name, or two for pairs.

    Raises:
        ValueError: if the columns do not tell, or one that was asked for is missing or holds no text.
    """
    texts = [name for name, feature in data.features.items() if _dtype(feature) in ("string", "large_string")]
    keys = [key for key in asked if key is not None]
    if not keys:
        # Pairs first: the "sentence" of QNLI is only half of it.
        known = sorted({TASKS[name].columns for name in ([task] if task else TASKS)}, key=lambda c: (-len(c), c))
        rest = [name for name in texts if name != label_key]
        fitting = [list(columns) for columns in known if set(columns) <= set(texts)]
        if not fitting and len(rest) != 1:
            raise ValueError(
                f"the columns {data.column_names} do not tell where the text is (expected "
                f"{', or '.join(' and '.join(columns) for columns in known)}): give --sentence1_key, and "
                f"--sentence2_key for pairs."
            )
        keys = fitting[0] if fitting else rest
    if wrong := [key for key in keys if key not in texts]:
        raise ValueError(f"column {wrong[0]!r} is no text: text is in {texts}, all columns are {data.column_names}.")
    return keys


def find_labels(data: Dataset, task: str | None, label_key: str) -> dict[Any, str] | None:
    """Find out what is to be learned.

    Returns:
        {value in the data: name of the class}, in the order of the classes; None for a score (regression).

    Raises:
        ValueError: if there is no such column, or its values are not those of the task.
    """
    if label_key not in data.column_names:
        raise ValueError(f"label_key={label_key!r} is not among the columns {data.column_names}.")
    feature, names = data.features[label_key], TASKS[task].labels if task else ()
    if task == "stsb" or _dtype(feature).startswith("float"):
        return None
    if isinstance(feature, ClassLabel):
        return dict(enumerate(feature.names))
    values = sorted(value for value in data.unique(label_key) if value not in (None, ""))
    for fitting in (dict(zip(names, names, strict=True)), dict(enumerate(names))):
        if names and set(values) <= set(fitting):
            return fitting
    if names:
        raise ValueError(f"column {label_key!r} holds {values[:5]}, but the labels of {task} are {list(names)}.")
    return {value: str(value) for value in values}


def check_values(split: str, data: Dataset, keys: list[str], labels: Labels | None) -> None:
    """Refuse missing columns, rows without text, and labels that are empty or were never learned.

    Args:
        split: name of the split, for the message.
        data: its rows.
        keys: columns of text.
        labels: see `Labels`; None = none are needed.

    Raises:
        ValueError: naming split and column.
    """
    label_key, ids = labels or (None, None)
    for key in [*keys, *([] if label_key is None else [label_key])]:
        if key not in data.column_names:
            raise ValueError(f"the {split} data has no column {key!r}, only {data.column_names}.")
        values = data.unique(key) if key == label_key else []
        # A float that is not itself is NaN.
        if data.data.column(key).null_count or any(value == "" or value != value for value in values):
            raise ValueError(f"column {key!r} of the {split} data has empty cells: drop those rows or fill them in.")
        if key == label_key and ids is not None and (new := sorted(set(values) - set(ids))):
            raise ValueError(f"column {key!r} of the {split} data holds {new[0]!r}, which is none of {list(ids)}.")


def tokenise(
    split: str, data: Dataset, keys: list[str], labels: Labels | None, limit: int | None,
    cached: bool, tokenizer: Callable[..., Any],
) -> Dataset:  # fmt: skip
    """Turn the rows of a split into token ids, and their labels into those of the model.

    Args:
        split: its name, for the progress bar.
        data: its rows.
        keys: columns of text.
        labels: see `Labels`; None = none are wanted.
        limit: how many rows to take, the first ones; None = all.
        cached: whether rows that were tokenised in an earlier run may be taken.
        tokenizer: called with one list of texts per column.
    """
    rows = data if limit is None else data.select(range(min(limit, len(data))))
    rows = rows.select_columns([*keys, *([] if labels is None else [labels[0]])])
    if labels is not None:
        # A new column that bears the name of an old one would inherit its type.
        rows = rows.rename_column(labels[0], "raw label")

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = dict(tokenizer(*(batch[key] for key in keys)))
        if labels is not None:
            ids = labels[1]
            encoded["label"] = [float(value) if ids is None else ids[value] for value in batch["raw label"]]
        return encoded

    about = f"tokenising {split}"
    return rows.map(encode, batched=True, remove_columns=rows.column_names, load_from_cache_file=cached, desc=about)


def accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    """Share of right answers."""
    return float((predicted == true).mean())


def f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """F1 of class 1; 0 where neither answers nor labels hold it."""
    chosen, relevant = predicted == 1, true == 1
    total = int(chosen.sum() + relevant.sum())
    return 2.0 * int((chosen & relevant).sum()) / total if total else 0.0


def pearson(predicted: np.ndarray, true: np.ndarray) -> float:
    """Linear correlation; 0 where one side is constant. For two classes it is Matthews' coefficient."""
    a, b = (x.astype(np.float64) - x.mean(dtype=np.float64) for x in (predicted, true))
    scale = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / scale if scale else 0.0


def spearman(predicted: np.ndarray, true: np.ndarray) -> float:
    """Correlation of ranks; equal values share the mean of their ranks."""
    return pearson(_ranks(predicted), _ranks(true))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": pearson,
    "pearson": pearson,
    "spearmanr": spearman,
}


class Metric:
    """The metric of a task: that of `evaluate` where it can be loaded, otherwise the same in numpy.

    evaluate downloads its metrics, so it is asked only where the data came from the Hub as well.

    Args:
        task: GLUE task or None.
        regression: whether the model gives a score, not classes.
        from_hub: whether the data came from there.
    """

    def __init__(self, task: str | None, regression: bool, from_hub: bool) -> None:
        self.regression = regression
        names = TASKS[task].metrics if task else ("pearson", "spearmanr") if regression else ("accuracy",)
        self._compute: Callable[..., dict[str, float]] = partial(_compute, names)
        self.source = f"{', '.join(names)}, built in"
        if from_hub and task:
            try:
                import evaluate

                self._compute = evaluate.load("glue", task).compute
                self.source = f"{', '.join(names)}, by evaluate {evaluate.__version__}"
            # A download, the import of what it brought, and its own imports: whatever fails, training must not.
            except (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
                self.source += f" (evaluate cannot load its own: {type(error).__name__})"

    def __call__(self, output: Any) -> dict[str, float]:
        """Compute it for what `Trainer` hands to `compute_metrics`."""
        return self._compute(predictions=self.answers(output.predictions), references=output.label_ids)

    def answers(self, predictions: Any) -> np.ndarray:
        """Turn logits into classes or scores. [rows, classes] -> [rows]; some models give a tuple that begins so."""
        logits = predictions[0] if isinstance(predictions, tuple) else predictions
        return logits[:, 0] if self.regression else logits.argmax(axis=1)

    def of_commonest_answer(self, labels: np.ndarray) -> dict[str, float]:
        """Compute it for who always gives the commonest answer: what a model has to beat."""
        values, counts = np.unique(labels, return_counts=True)
        return self._compute(predictions=np.full_like(labels, values[counts.argmax()]), references=labels)


def _compute(names: tuple[str, ...], predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    return {name: METRICS[name](predictions, references) for name in names}


def _dtype(feature: Any) -> str:
    return str(getattr(feature, "dtype", ""))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, position, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[position]

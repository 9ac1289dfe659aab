"""The parts of a card's facts: data, metrics, latency, training cost, pictures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """The data that the model was trained and measured on.

    Attributes:
        name: for people to read, such as "GLUE SST-2".
        hub_id: dataset id on the Hub; None for data that is not there.
        config: name of the dataset configuration.
        train_split, eval_split: names of the splits.
        train_rows, eval_rows: rows used.
        note: anything a reader needs, such as where the text came from and how it was split.
    """

    name: str
    hub_id: str | None = None
    config: str | None = None
    train_split: str | None = None
    eval_split: str | None = None
    train_rows: int | None = None
    eval_rows: int | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class MetricFacts:
    """One metric of the pruned model beside the dense teacher, by the same script.

    Attributes:
        type: metric id as the Hub knows it, such as "accuracy".
        value: score of the pruned model.
        dense_value: score of the dense teacher; None if it was not measured.
        name: for people to read; None shows `type`.
    """

    type: str
    value: float
    dense_value: float | None = None
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class LatencyFacts:
    """One measured latency.

    Attributes:
        batch, length: rows and tokens of the input.
        ms: median milliseconds of the pruned model.
        dense_ms: the same for the dense model, in the same run; None if it was not measured.
        engine, dense_engine: what ran the two models.
        dtype: data type of the arithmetic.
        threads: CPU threads; None on a GPU.
        hardware: the machine.
        command: what to type to measure it again.
    """

    batch: int
    length: int
    ms: float
    dense_ms: float | None = None
    engine: str
    dense_engine: str | None = None
    dtype: str | None = None
    threads: int | None = None
    hardware: str
    command: str


@dataclass(frozen=True, kw_only=True)
class CostFacts:
    """What the training cost.

    Attributes:
        steps: optimizer steps.
        seconds: wall-clock seconds.
        hardware: the machine.
        note: what the numbers leave out, such as the fine-tuning of the teacher.
    """

    steps: int
    seconds: float
    hardware: str
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class PictureFacts:
    """One picture beside the card.

    Attributes:
        file: name of the PNG file in the model folder.
        alt: what it shows, for who cannot see it; the card's caption, too.
    """

    file: str
    alt: str

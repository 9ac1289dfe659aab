"""What is known about a pruned model: facts recorded where they were measured, kept as JSON beside the model.

A fact that was not recorded is None or empty, and the card then says so; nothing here has a made-up default.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from hf_sparse.core.report import LayerReport
from hf_sparse.core.stored.packing import FormatError
from hf_sparse.core.stored.reading import read_object
from hf_sparse.hub.checked import read_dataclass
from hf_sparse.hub.parts import CostFacts as CostFacts
from hf_sparse.hub.parts import DataFacts as DataFacts
from hf_sparse.hub.parts import LatencyFacts as LatencyFacts
from hf_sparse.hub.parts import MetricFacts as MetricFacts
from hf_sparse.hub.parts import PictureFacts as PictureFacts

FACTS_FILE = "hf_sparse_card.json"

# What decides how a run learns. It lists what may be told: training arguments hold tokens and paths as well.
_LEARNING_FIELDS = (
    "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "warmup_steps",
    "optim", "bf16", "fp16", "tf32", "label_smoothing_factor", "torch_compile",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Everything that a model card tells. Only `name` and `save_format` are required.

    Attributes:
        name: name of the model, the title of the card.
        save_format: "compressed" or "dense", how the weights are stored in the folder.
        repo_id: where the model is published, for the loading example.
        base_model: Hub id (or path) of the model that was pruned.
        license, language: as in Hub metadata; language is an ISO code.
        task: pipeline tag, such as "text-classification".
        auto_class: class that loads the model, such as "AutoModelForSequenceClassification".
        teacher: what the student learned from, in words.
        data: see `DataFacts`.
        recipe: config fields that differ from their default.
        block_shape: (h, w) as asked, may hold -1; layers with another one say so in `layers`.
        sparsity_asked, sparsity_reached: fractions of blocks removed, [0, 1).
        layers: `report(model).layers`.
        metrics: see `MetricFacts`.
        eval_command: the one script that measured student and teacher.
        file_bytes, dense_file_bytes: bytes of the weight files, pruned and dense.
        latency: see `LatencyFacts`.
        cost: see `CostFacts`.
        seed: random seed of the training.
        versions: package -> version.
        limits: what the model must not be trusted with, one sentence each.
        tags: Hub tags beside those that every card has.
        history: what training logged, one {name: number} per logged step (`hub.history.history_facts`).
        pictures: the pictures beside the card; `write_card` draws them and fills this in.
    """

    name: str
    save_format: Literal["compressed", "dense"]
    repo_id: str | None = None
    base_model: str | None = None
    license: str | None = None
    language: str | None = None
    task: str | None = None
    auto_class: str | None = None
    teacher: str | None = None
    data: DataFacts | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    block_shape: tuple[int, int] | None = None
    sparsity_asked: float | None = None
    sparsity_reached: float | None = None
    layers: tuple[LayerReport, ...] = ()
    metrics: tuple[MetricFacts, ...] = ()
    eval_command: str | None = None
    file_bytes: int | None = None
    dense_file_bytes: int | None = None
    latency: tuple[LatencyFacts, ...] = ()
    cost: CostFacts | None = None
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    history: tuple[dict[str, float], ...] = ()
    pictures: tuple[PictureFacts, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Give the JSON form; facts that were not recorded are left out."""
        return {name: value for name, value in asdict(self).items() if value not in (None, (), {})}

    def to_json(self) -> str:
        """Give the text of the facts file."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CardFacts:
        """Check and read the JSON form.

        Raises:
            FormatError: if a key is missing or unknown, or a value has the wrong type or range; names the fact.

        Example:
            >>> CardFacts.from_dict({"name": "tiny", "save_format": "dense", "seed": 3}).seed
            3
            >>> CardFacts.from_dict({"name": "tiny", "save_format": "dense", "seed": "3"})
            Traceback (most recent call last):
            ...
            hf_sparse.core.stored.formats.FormatError: seed='3' must be int.
        """
        if isinstance(data, Mapping) and isinstance(data.get("layers"), list):
            # SparsityReport.to_dict() adds a layer's sparsity for its readers; it follows from the other numbers.
            layers = [
                {k: v for k, v in x.items() if k != "sparsity"} if isinstance(x, dict) else x for x in data["layers"]
            ]
            data = {**data, "layers": layers}
        facts = read_dataclass(cls, data)
        for name in ("sparsity_asked", "sparsity_reached"):
            value = getattr(facts, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise FormatError(f"{name}={value!r} must be in [0, 1).")
        times = {f"latency[{i}].{k}": getattr(x, k) for i, x in enumerate(facts.latency) for k in ("ms", "dense_ms")}
        sizes = {"file_bytes": facts.file_bytes, "dense_file_bytes": facts.dense_file_bytes}
        for name, value in {**times, **sizes}.items():
            if value is not None and value <= 0:
                raise FormatError(f"{name}={value!r} must be above 0.")
        for i, layer in enumerate(facts.layers):
            if not 0 <= layer.kept_blocks <= layer.total_blocks or layer.total_blocks < 1:
                raise FormatError(
                    f"layers[{i}] ({layer.name}): kept_blocks={layer.kept_blocks} must be from 0 to "
                    f"total_blocks={layer.total_blocks}, and that above 0."
                )
        if unplaced := [i for i, row in enumerate(facts.history) if "step" not in row]:
            raise FormatError(f"history[{unplaced[0]}] has no step.")
        for i, picture in enumerate(facts.pictures):
            # It becomes a link in the card and a name in a folder.
            if not re.fullmatch(r"[A-Za-z0-9_-]+\.png", picture.file):
                raise FormatError(f"pictures[{i}].file={picture.file!r} must be the plain name of a PNG file.")
        if facts.auto_class is not None and not facts.auto_class.isidentifier():
            raise FormatError(f"auto_class={facts.auto_class!r} must be the name of a class.")
        return facts


def read_facts(file: str | os.PathLike[str]) -> CardFacts:
    """Read a facts file.

    Raises:
        FileNotFoundError: if it is missing.
        FormatError: if it is not JSON or holds a wrong fact; names the file.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: the card is rendered from it and from nothing else. SparseDistillTrainer writes it "
            f"beside the model; hf_sparse.hub.card.write_card does so for other training loops."
        )
    data = read_object(file)
    try:
        return CardFacts.from_dict(data)
    except FormatError as error:
        raise FormatError(f"{file}: {error}") from error


def latency_facts(rows: Iterable[Mapping[str, Any]], hardware: str, command: str) -> tuple[LatencyFacts, ...]:
    """Pair the rows that `inference.measuring.bench.compare_models` gave: the pruned model beside the dense one.

    Args:
        rows: for each input a "dense" row, then an "hf_sparse" row.
        hardware: the machine.
        command: what to type to measure them again.
    """
    rows = list(rows)
    return tuple(
        LatencyFacts(
            batch=pruned["batch"],
            length=pruned["length"],
            ms=pruned["ms"],
            dense_ms=dense["ms"],
            engine=pruned["engine"],
            dense_engine="torch",
            dtype=pruned["dtype"],
            threads=pruned["threads"] if pruned["device"] == "cpu" else None,
            hardware=hardware,
            command=command,
        )
        for dense, pruned in zip(rows[0::2], rows[1::2], strict=True)
    )


def recipe_facts(config: Any) -> dict[str, Any]:
    """Give the fields of a training config that differ from their default: those of hf_sparse, and those of learning.

    Args:
        config: a `SparseDistillConfig`.

    Returns:
        {field: plain value}, in the order of the config. Tokens, paths and logging fields are never among them.
    """
    own = {
        name for cls in type(config).__mro__ if cls.__module__.startswith("hf_sparse.") for name in cls.__annotations__
    }
    recipe = {}
    for spec in fields(config):
        value, default = getattr(config, spec.name), spec.metadata.get("default", spec.default)
        value, default = (x.value if isinstance(x, Enum) else x for x in (value, default))
        if spec.name in own | set(_LEARNING_FIELDS) and value != default:
            recipe[spec.name] = value
    return recipe

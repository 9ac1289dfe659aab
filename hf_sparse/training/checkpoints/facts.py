"""What a finished run knows of itself, recorded for its model card."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.modelcard import TASK_MAPPING

from hf_sparse.core.report import report
from hf_sparse.hub.facts import CardFacts, CostFacts, DataFacts, MetricFacts, recipe_facts
from hf_sparse.hub.history import history_facts
from hf_sparse.inference.measuring.environment import environment
from hf_sparse.training.distributed import plain_class

if TYPE_CHECKING:
    from hf_sparse.training.trainer import SparseDistillTrainer

_SPEED_SUFFIXES = ("runtime", "per_second", "preparation_time", "loss")
_PACKAGES = ("hf-sparse", "torch", "transformers", "accelerate", "datasets", "safetensors")

_GIVEN = {
    "language", "license", "tags", "model_name", "finetuned_from", "tasks", "dataset_tags", "dataset", "dataset_args",
}  # fmt: skip


def run_facts(trainer: SparseDistillTrainer, folder: Path, teacher_metrics: Mapping[str, float]) -> CardFacts:
    """Collect what can be known for sure; what the trainer cannot know (data, licence, latency) stays out.

    Args:
        trainer: after training.
        folder: where the model has just been saved.
        teacher_metrics: {metric: score} of the dense teacher on the same data; may be empty.
    """
    model, config = trainer.student, trainer.args
    weights = report(folder)
    task, auto_class = _task(model)
    # Told from the file and not from the settings: a run may be saved before it has pruned anything.
    dense = all(layer.bytes == layer.dense_bytes for layer in weights.layers)
    # The settings may leave it to the models.
    distiller = trainer.distiller
    decided = {"hidden_weight": distiller.hidden_weight} if distiller.has_compared_hidden else {}
    return CardFacts(
        name=(config.hub_model_id or Path(config.output_dir or ".").resolve().name).split("/")[-1],
        save_format="dense" if dense else "compressed",
        repo_id=config.hub_model_id,
        base_model=getattr(model, "name_or_path", "") or None,
        task=task,
        auto_class=auto_class,
        teacher=_teacher(trainer),
        recipe={**recipe_facts(config), **decided},
        block_shape=config.block_shape if config.sparsity else None,
        sparsity_asked=config.sparsity,
        sparsity_reached=round(trainer.pruner.masks.sparsity, 6),
        layers=() if dense else tuple(weights.layers),
        metrics=tuple(_metrics(trainer.state.log_history, teacher_metrics)),
        file_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        dense_file_bytes=None if dense else weights.dense_bytes,
        cost=_cost(trainer),
        seed=config.seed,
        history=history_facts(trainer.state.log_history),
        versions={name: version(name) for name in _PACKAGES},
    )


def with_given(facts: CardFacts, given: Mapping[str, Any]) -> CardFacts:
    """Add what the caller of `create_model_card` knows, under the names that `Trainer.create_model_card` uses.

    Raises:
        TypeError: for a name that it does not take.
    """
    if unknown := sorted(set(given) - _GIVEN):
        raise TypeError(f"create_model_card takes no {unknown[0]!r}: use {', '.join(sorted(_GIVEN))}.")
    changes: dict[str, Any] = {}
    for key, fact in (("language", "language"), ("license", "license"), ("model_name", "name"),
                      ("finetuned_from", "base_model"), ("tasks", "task")):  # fmt: skip
        if given.get(key) is not None:
            changes[fact] = _first(given[key])
    if given.get("tags"):
        tags = given["tags"]
        changes["tags"] = (tags,) if isinstance(tags, str) else tuple(tags)
    if given.get("dataset") is not None:
        changes["data"] = DataFacts(
            name=_first(given["dataset"]),
            hub_id=_first(given.get("dataset_tags")),
            config=_first(given.get("dataset_args")),
        )
    return dataclasses.replace(facts, **changes)


def hardware() -> str:
    """Name the machine in a few words."""
    found = environment()["hardware"]
    if found["gpus"]:
        return f"{len(found['gpus'])} x {found['gpus'][0]}"
    threads = found["threads"]
    return f"{found['cpu']}, {threads} thread{'' if threads == 1 else 's'}"


def _task(model: Any) -> tuple[str | None, str | None]:
    name = plain_class(model).__name__
    for task, mapping in TASK_MAPPING.items():
        listed: Any = mapping
        if any(name in (names if isinstance(names, tuple | list) else (names,)) for names in listed.values()):
            head = name[name.index("For") :] if "For" in name else ""
            return task, f"AutoModel{head}" if head else None
    return None, None


def _teacher(trainer: SparseDistillTrainer) -> str | None:
    if trainer.teacher_model is None:
        return None
    if not trainer.distiller.was_given:
        return "a frozen copy of the dense model, taken when training started"
    path = trainer.teacher_model.name_or_path if isinstance(trainer.teacher_model, PreTrainedModel) else None
    return path or type(trainer.teacher_model).__name__


def _metrics(history: Iterable[Mapping[str, float]], teacher_metrics: Mapping[str, float]) -> list[MetricFacts]:
    evaluations = [logs for logs in history if any(key.startswith("eval_") for key in logs)]
    # Several data sets are logged one by one at the same step.
    last: dict[str, float] = {}
    for logs in evaluations:
        last |= logs if logs.get("step") == evaluations[-1].get("step") else {}
    return [
        MetricFacts(type=key.removeprefix("eval_"), value=float(value),
                    dense_value=teacher_metrics.get(key.removeprefix("eval_")))
        for key, value in last.items()
        if key.startswith("eval_") and not key.endswith(_SPEED_SUFFIXES) and isinstance(value, int | float)
    ]  # fmt: skip


def _cost(trainer: SparseDistillTrainer) -> CostFacts | None:
    runtimes = [logs["train_runtime"] for logs in trainer.state.log_history if "train_runtime" in logs]
    if not runtimes:
        return None
    note = "Without the fine-tuning of the dense model."
    if len(runtimes) > 1:
        note += " The run was stopped and resumed."
    return CostFacts(steps=trainer.state.global_step, seconds=round(sum(runtimes), 1), hardware=hardware(), note=note)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) and value else value

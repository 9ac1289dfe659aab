"""One cell of the accuracy grid: one model trained with `SparseDistillTrainer` on one task, measured as it goes.

Imported by accuracy.py, which runs every cell in a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.grid.movement import MovementTrainer
from benchmarks.grid.regrouping import draw_batches, measure_scores, regroup
from hf_sparse import SparseDistillConfig, SparseDistillTrainer

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where model and data are: `model` a folder or repo id, `data` a folder of <task>/*.parquet, None = the Hub."""

    model: str
    data: Path | None
    work: Path

    def dense(self, task: str) -> Path:
        """Folder of the dense model of a task, from which pruning starts and which teaches."""
        return self.work / "dense" / task


def load_rows(task: str, settings: Mapping[str, Any], sources: Sources, tokenizer: Any) -> dict[str, Any]:
    """Load and tokenise a task.

    Args:
        task: GLUE task, or what the YAML calls one with other settings.
        settings: the task's entry in the YAML: max_length, train_rows (None = all, else the first ones), and where it
            is not the name of the task, data: the GLUE task.
        sources: where it is.
        tokenizer: that of the model.

    Returns:
        {"train", "dev": rows of token ids; "labels": names in the order of their ids; "truncated": share of dev rows
        that max_length cuts; "texts": {"train", "dev": (columns of text, labels)}}.
    """
    with _examples():
        from glue_data import find_labels, find_text_columns, load_splits, tokenise
    task = settings.get("data", task)
    files = {split: str(_file(sources.data, task, split)) for split in ("train", "validation")} if sources.data else {}
    raw = load_splits(files, task, None)
    dev_split = "validation" if "validation" in raw else "validation_matched"
    keys = find_text_columns(raw["train"], task, "label", (None, None))
    names = find_labels(raw["train"], task, "label") or {}
    ids = {value: i for i, value in enumerate(names)}
    found: dict[str, Any] = {"labels": list(names.values()), "texts": {}}
    length = settings["max_length"]

    def to_ids(*texts: list[str]) -> Any:
        return tokenizer(*texts, truncation=True, max_length=length)

    for name, split, limit in (("train", "train", settings.get("train_rows")), ("dev", dev_split, None)):
        rows = raw[split] if limit is None else raw[split].select(range(min(limit, len(raw[split]))))
        found[name] = tokenise(split, rows, keys, ("label", ids), None, True, to_ids)
        found["texts"][name] = [list(rows[key]) for key in keys], [ids[value] for value in rows["label"]]
    found["truncated"] = sum(len(row) == length for row in found["dev"]["input_ids"]) / len(found["dev"])
    return found


def train_cell(cell: Mapping[str, Any], grid: Mapping[str, Any], sources: Sources) -> dict[str, Any]:
    """Train one cell.

    Args:
        cell: task, method, block, sparsity, seed.
        grid: the YAML.
        sources: where model and data are.

    Returns:
        What was measured; see the keys.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

    task, method = grid["tasks"][cell["task"]], dict(grid["methods"][cell["method"]])
    start, epochs = method.pop("start", "dense"), method.pop("epochs", task["epochs"])
    own, regrouped = method.pop("model_config", {}), method.pop("regroup", False)
    trainer_class = MovementTrainer if method.pop("movement", False) else SparseDistillTrainer
    if regrouped and cell["block"][1] != 1:
        raise ValueError(
            f"regroup makes bands of rows for blocks of h x 1, not for {' x '.join(map(str, cell['block']))}."
        )
    set_seed(cell["seed"])
    tokenizer = AutoTokenizer.from_pretrained(sources.model)
    rows = load_rows(cell["task"], task, sources, tokenizer)
    folder = sources.model if start == "pretrained" else str(sources.dense(cell["task"]))
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(rows["labels"]), **{**grid["model_config"], **own}
    )
    collate = DataCollatorWithPadding(tokenizer)
    if regrouped:  # before the trainer copies the teacher from it: both are one function, in the same order
        batches = draw_batches(rows["train"], collate)
        weights = measure_scores(model, batches, grid["training"]["bf16"])
        regroup(model, weights, cell["block"][0], cell["sparsity"])
    # The word embeddings are never pruned; trained, they would cost a third of the time.
    model.base_model.embeddings.requires_grad_(False)
    steps = -(-len(rows["train"]) // grid["training"]["per_device_train_batch_size"]) * epochs
    settings: dict[str, Any] = {
        **grid["training"], "num_train_epochs": epochs, "seed": cell["seed"], "sparsity": cell["sparsity"],
        "block_height": cell["block"][0], "block_width": cell["block"][1], "use_cpu": not torch.cuda.is_available(),
        **method, "eval_steps": -(-steps // task.get("evaluations", grid["evaluations"])),
        "output_dir": str(sources.work / "running" / cell["name"]),
    }  # fmt: skip
    args = SparseDistillConfig(**settings)
    known = rows["train"].select(range(min(grid["train_probe_rows"], len(rows["train"]))))
    trainer = trainer_class(
        model=model, args=args, train_dataset=rows["train"], eval_dataset={"dev": rows["dev"], "train": known},
        processing_class=tokenizer, data_collator=collate, compute_metrics=_accuracy,
    )  # fmt: skip
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    used = time.perf_counter() - wall, time.process_time() - cpu
    if cell["method"] == "dense" and not sources.dense(cell["task"]).exists():
        model.save_pretrained(sources.dense(cell["task"]))
    history = trainer.state.log_history
    return {
        "steps": trainer.state.global_step,
        "epochs": epochs,
        "train_rows": len(rows["train"]),
        "dev_rows": len(rows["dev"]),
        "dev_truncated": rows["truncated"],
        "sparsity_reached": trainer.pruner.masks.sparsity,
        "settings": {**{key: value for key, value in settings.items() if key != "output_dir"},
                     **({"model_config": own} if own else {}), **({"regroup": True} if regrouped else {})},
        "wall_seconds": round(used[0], 1),
        "cpu_seconds": round(used[1], 1),
        "train": [_pick(logs, ("step", "loss", "learning_rate", "sparsity", "graft_prob", "penalty", "grad_norm",
                               "loss_task", "loss_kd", "loss_hidden", "loss_attention"))
                  for logs in history if "loss" in logs],
        "dev": _evaluations(history),
    }  # fmt: skip


def scores(result: Mapping[str, Any]) -> dict[str, float]:
    """Sum a cell up: the score at its last step, the best one at full sparsity, and the gap to the training rows.

    Args:
        result: what `train_cell` gave.

    Returns:
        {"last", "best", "train_last", "gap": accuracies; "dev_loss", "train_loss": at the last step}. `best` chooses
        on the rows that it is measured on and is therefore too good; it is here because the papers report it.
    """
    done = [at for at in result["dev"] if at["final_sparsity"]]
    last = done[-1]
    return {
        "last": last["dev_accuracy"],
        "best": max(at["dev_accuracy"] for at in done),
        "train_last": last["train_accuracy"],
        "gap": last["train_accuracy"] - last["dev_accuracy"],
        "dev_loss": last["dev_loss"],
        "train_loss": last["train_loss"],
    }


def floor_score(task: str, settings: Mapping[str, Any], sources: Sources) -> dict[str, float]:
    """Measure what a task gives away without an encoder: a linear classifier on mean word embeddings.

    For pairs the features are both means, their absolute difference and their product. The strength of the L2 penalty
    is the one that does best on a tenth of the training rows, held out; then all rows are used.

    Returns:
        {"accuracy": on the dev rows, "commonest": that of the commonest answer, "l2": the strength}.
    """
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sources.model)
    embeddings = AutoModel.from_pretrained(sources.model).get_input_embeddings()
    rows = load_rows(task, settings, sources, tokenizer)
    sides = {}
    for split, (columns, labels) in rows["texts"].items():
        means = [_mean_embeddings(texts, tokenizer, embeddings, settings["max_length"]) for texts in columns]
        pairs = [] if len(means) == 1 else [(means[0] - means[1]).abs(), means[0] * means[1]]
        sides[split] = torch.cat([*means, *pairs], dim=1), torch.tensor(labels)
    (x, y), (dev_x, dev_y) = sides["train"], sides["dev"]
    shift, scale = x.mean(0), x.std(0) + 1e-6
    x, dev_x, cut = (x - shift) / scale, (dev_x - shift) / scale, len(x) * 9 // 10
    held_out = {l2: _right(_fit(x[:cut], y[:cut], l2), x[cut:], y[cut:]) for l2 in (1e-4, 1e-3, 1e-2, 1e-1)}
    l2 = max(held_out, key=lambda key: held_out[key])
    commonest = float((dev_y == y.bincount().argmax()).float().mean())
    return {"accuracy": _right(_fit(x, y, l2), dev_x, dev_y), "commonest": commonest, "l2": l2}


def _fit(x: Tensor, y: Tensor, l2: float) -> nn.Linear:
    linear = nn.Linear(x.shape[1], int(y.max()) + 1)
    nn.init.zeros_(linear.weight)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(linear(x), y) + l2 * linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return linear


@torch.no_grad()
def _right(linear: nn.Linear, x: Tensor, y: Tensor) -> float:
    return float((linear(x).argmax(1) == y).float().mean())


@torch.no_grad()
def _mean_embeddings(texts: list[str], tokenizer: Any, embeddings: nn.Module, length: int) -> Tensor:
    parts = []
    for begin in range(0, len(texts), 512):
        some = texts[begin : begin + 512]
        batch = tokenizer(
            some, add_special_tokens=False, truncation=True, max_length=length, padding=True, return_tensors="pt"
        )
        weight = batch["attention_mask"].unsqueeze(-1)
        parts.append((embeddings(batch["input_ids"]) * weight).sum(1) / weight.sum(1).clamp(min=1))
    return torch.cat(parts)


def _evaluations(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # Trainer logs the two sets one after the other; the masks are final where the logged sparsity no longer rises.
    by_step: dict[int, dict[str, Any]] = {}
    for logs in history:
        at = by_step.setdefault(logs["step"], {"step": logs["step"]})
        for key, value in logs.items():
            if key in ("eval_dev_loss", "eval_dev_accuracy", "eval_train_loss", "eval_train_accuracy"):
                at[key.removeprefix("eval_")] = value
    reached = [(logs["step"], logs["sparsity"]) for logs in history if "sparsity" in logs]
    for step, at in by_step.items():
        before = [sparsity for logged, sparsity in reached if logged <= step]
        at["sparsity"] = before[-1] if before else 0.0
        at["final_sparsity"] = at["sparsity"] == reached[-1][1]
    return [at for at in by_step.values() if "dev_accuracy" in at]


def _accuracy(output: Any) -> dict[str, float]:
    return {"accuracy": float((output.predictions.argmax(-1) == output.label_ids).mean())}


def _pick(logs: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: float(f"{logs[key]:.5g}") if key != "step" else logs[key] for key in keys if key in logs}


def _file(data: Path, task: str, split: str) -> Path:
    files = sorted((data / task).glob(f"{split}*.parquet"))
    if not files:
        raise FileNotFoundError(f"{data / task} holds no {split}*.parquet.")
    return files[0]


@contextlib.contextmanager
def _examples() -> Iterator[None]:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT / "examples"))


def write_json(file: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f".{file.name}.new")
    staged.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    staged.replace(file)

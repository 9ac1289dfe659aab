"""The accuracy grid on one GPU: stacks of cells, several processes, a deadline.

Every process loads libraries and data once and takes one stack after the other, the most important first. A stack
that fails leaves its cells as failed and the grid goes on; at the deadline running stacks are ended, and their cells
are not run.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.grid.cell import ROOT, Sources, load_rows, scores, write_json

REPAIRED_SETS = 4
GRACE = 5.0  # seconds after the deadline in which running stacks may write down what they have


def make_stacks(cells: Iterable[Mapping[str, Any]], grid: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Sort cells into stacks: one task, start and number of epochs each, in the order of the cells.

    Args:
        cells: as `accuracy.expand` gives them.
        grid: the YAML; `stack_size` is the largest stack.

    Returns:
        Stacks, the one that holds the first cell first.
    """
    stacks: list[list[dict[str, Any]]] = []
    filling: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        method = grid["methods"][cell["method"]]
        batch = method.get("per_device_train_batch_size")
        key = (cell["task"], method.get("start", "dense"), method.get("epochs"), batch, cell["stack"])
        if key not in filling or len(filling[key]) >= grid["stack_size"]:
            filling[key] = []
            stacks.append(filling[key])
        filling[key].append(dict(cell))
    return stacks


def tokens(task: str, grid: Mapping[str, Any], sources: Sources) -> dict[str, Any]:
    """Give a task's tokenised rows as arrays, from the work folder or, the first time, into it.

    Returns:
        {"train", "dev": {"ids", "types" [rows, L], "lengths", "labels" [rows]}; "labels": names}.
    """
    import numpy as np

    file = sources.work / "tokens" / f"{task}.npz"
    if not file.is_file():
        from transformers import AutoTokenizer

        rows = load_rows(task, grid["tasks"][task], sources, AutoTokenizer.from_pretrained(sources.model))
        arrays = {}
        for split in ("train", "dev"):
            ids, types = list(rows[split]["input_ids"]), list(rows[split]["token_type_ids"])
            lengths = np.asarray([len(row) for row in ids], np.int16)
            width = -(-int(lengths.max()) // 8) * 8
            for kind, values in (("ids", ids), ("types", types)):
                dtype = np.int32 if kind == "ids" else np.int8
                arrays[f"{split}.{kind}"] = np.asarray([row + [0] * (width - len(row)) for row in values], dtype)
            arrays[f"{split}.lengths"] = lengths
            arrays[f"{split}.labels"] = np.asarray(rows[split]["label"], np.int16)
        file.parent.mkdir(parents=True, exist_ok=True)
        staged = file.with_name(f".{os.getpid()}.npz")
        np.savez_compressed(staged, allow_pickle=False, names=np.asarray(rows["labels"]), **arrays)
        staged.replace(file)
    with np.load(file) as saved:
        found: dict[str, Any] = {"labels": saved["names"].tolist()}
        for split in ("train", "dev"):
            found[split] = {kind: saved[f"{split}.{kind}"] for kind in ("ids", "types", "lengths", "labels")}
    return found


def run_stack(
    cells: Sequence[Mapping[str, Any]], grid: Mapping[str, Any], sources: Sources, deadline: float, tell: Any
) -> list[dict[str, Any]]:
    """Train one stack, and save the dense model of its task if it holds the first dense cell.

    Returns:
        What was measured, per cell, in the order of the cells.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, set_seed

    from benchmarks.grid.stack import Stack, on, repaired, train
    from hf_sparse import SparseDistillConfig

    task = grid["tasks"][cells[0]["task"]]
    data = tokens(cells[0]["task"], grid, sources)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    limit = grid.get("max_train_rows")
    rows = {kind: values[:limit] for kind, values in data["train"].items()}
    settings, extras, starts = [], [], []
    for cell in cells:
        method = dict(grid["methods"][cell["method"]])
        starts.append(method.pop("start", "dense"))
        extras.append(method.pop("extra", {}))
        epochs = method.pop("epochs", task["epochs"])
        settings.append({
            **grid["training"], "num_train_epochs": epochs, "seed": cell["seed"], "sparsity": cell["sparsity"],
            "block_height": cell["block"][0], "block_width": cell["block"][1],
            "use_cpu": device.type == "cpu", **method,
        })  # fmt: skip
    configs = [SparseDistillConfig(output_dir=str(sources.work / "running"), **chosen) for chosen in settings]
    order = sorted(range(len(cells)), key=lambda n: (configs[n].graft_start < 1.0, configs[n].learning_rate))
    models: dict[Any, Any] = {}
    for n in order:
        key = (cells[n]["seed"] if starts[n] == "pretrained" else None, starts[n])
        if key not in models:
            set_seed(cells[n]["seed"])
            folder = sources.model if starts[n] == "pretrained" else str(sources.dense(cells[n]["task"]))
            models[key] = AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=len(data["labels"]), dtype=torch.float32, **grid["model_config"]
            )
        models[n] = models[key]
    own = len(rows["labels"])
    if any(extra.get("repair") for extra in extras):
        import numpy as np

        more = repaired(rows, REPAIRED_SETS)
        rows = {kind: np.concatenate([rows[kind], more[kind]]) for kind in rows}
    teacher = next((model for key, model in models.items() if key == (None, "dense")), None)
    stack = Stack([models[n] for n in order], teacher, [configs[n] for n in order], [extras[n] for n in order],
                  [cells[n]["seed"] for n in order], on(rows, device), device, own)  # fmt: skip
    known = {kind: values[: min(own, grid["train_probe_rows"])] for kind, values in rows.items()}
    dev = {kind: values[: grid.get("max_dev_rows")] for kind, values in data["dev"].items()}
    evaluations = task.get("evaluations", grid["evaluations"])
    probe = {kind: values[: grid.get("dev_probe_rows")] for kind, values in dev.items()}
    logging_steps, sets = grid["training"]["logging_steps"], [on(some, device) for some in (dev, probe, known)]
    found = train(stack, evaluations, sets[0], sets[1], sets[2], deadline, logging_steps, tell)
    results: list[dict[str, Any]] = [{}] * len(cells)
    for slot, n in enumerate(order):
        about = {"epochs": int(configs[n].num_train_epochs), "train_rows": own, "dev_rows": len(dev["labels"])}
        chosen = {**settings[n], **({"extra": extras[n]} if extras[n] else {})}
        results[n] = {**about, **found[slot], "settings": chosen}
        if cells[n]["method"] == "dense" and not sources.dense(cells[n]["task"]).exists():
            staged = sources.work / "dense" / f".{cells[n]['task']}.{os.getpid()}"
            stack.stack.load_into(models[n], slot).save_pretrained(staged)
            staged.rename(sources.dense(cells[n]["task"]))
    return results


def work(
    *arguments: Any,
) -> None:
    """Take stacks and run them until none is left or time is up; the body of a process."""
    try:
        _take_stacks(*arguments)
    finally:
        # What is to be kept is on disk, and taking a GPU's libraries down can take longer than is left.
        sys.stdout.flush()
        os._exit(0)


def _take_stacks(
    stacks: Sequence[Sequence[Mapping[str, Any]]], taken: Any, lock: Any, grid: Mapping[str, Any], sources: Sources,
    deadline: float, command: str,
) -> None:  # fmt: skip
    import torch

    from benchmarks.grid.stack import OutOfTimeError
    from hf_sparse.inference.measuring.environment import environment

    torch.set_num_threads(1)
    about = environment(ROOT)
    start = time.monotonic()
    while time.monotonic() < deadline:
        with lock:
            index = _next_stack(stacks, taken, sources)
            if index is not None and index >= 0:
                taken[index] = 1
        if index is None:
            return
        if index < 0:
            time.sleep(0.2)
            continue
        cells = stacks[index]
        title = f"[{index}] {cells[0]['task']} x {len(cells)}"

        def tell(text: str, title: str = title) -> None:
            print(f"{time.monotonic() - start:6.1f} {title}: {text}", flush=True)

        try:
            results = run_stack(cells, grid, sources, deadline, tell)
        except Exception as error:  # noqa: BLE001 (one stack that fails must not stop the grid)
            if isinstance(error, OutOfTimeError):
                for cell, unfinished in zip(cells, error.unfinished, strict=True):
                    write_json(sources.work / "unfinished" / f"{cell['name']}.json", {**cell, **unfinished})
                tell("ended at the deadline")
                return
            tell(f"failed: {error!r}\n{traceback.format_exc()}")
            for cell in cells:
                write_json(cell_file(sources.work, cell["name"]), {**cell, "failed": repr(error)[:300]})
            continue
        for cell, result in zip(cells, results, strict=True):
            found = {**cell, "command": command, **about, **scores(result), **result}
            write_json(cell_file(sources.work, cell["name"]), found)
            tell(f"{cell['name']} {100 * found['last']:.1f} (train {100 * found['train_last']:.1f})")


def _next_stack(stacks: Sequence[Sequence[Mapping[str, Any]]], taken: Any, sources: Sources) -> int | None:
    # -1: those that are left wait for the dense model of their task.
    left = [i for i in range(len(stacks)) if not taken[i]]
    for i in left:
        if stacks[i][0]["starts_anew"] or sources.dense(stacks[i][0]["task"]).is_dir():
            return i
    return -1 if left else None


def run_jobs(
    cells: Sequence[Mapping[str, Any]],
    grid: Mapping[str, Any],
    sources: Sources,
    jobs: int,
    seconds: float,
    command: str,
) -> None:
    """Run cells in stacks on `jobs` processes, for at most `seconds`."""
    begin = time.monotonic()
    stacks = make_stacks(cells, grid)
    for stack in stacks:
        for cell in stack:
            cell["starts_anew"] = grid["methods"][cell["method"]].get("start") == "pretrained"
    context = multiprocessing.get_context("spawn")
    taken, lock = context.Array("i", len(stacks)), context.Lock()
    deadline = begin + seconds
    arguments = (stacks, taken, lock, grid, sources, deadline, command)
    workers = [context.Process(target=work, args=arguments, daemon=True) for _ in range(min(jobs, len(stacks)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, deadline + GRACE - time.monotonic()))
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def cell_file(work_folder: Path, name: str) -> Path:
    """Where a cell's result is kept."""
    return work_folder / "cells" / f"{name}.json"

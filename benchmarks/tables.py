"""Write the tables of README.md from the JSON files under benchmarks/results/, so that no number is typed by hand.

A table NAME stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->` and comes from results/NAME.json.

Usage: python benchmarks/tables.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
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


LAYOUTS: dict[str, Callable[[dict[str, Any]], str]] = {"demo": demo_table}


def fill(text: str, results: Path) -> str:
    """Put every table that a text has markers for between them.

    Args:
        text: of README.md.
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
    file = results / f"{name}.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: run the benchmark of table {name!r} and keep its JSON there.")
    return LAYOUTS[name](json.loads(file.read_text(encoding="utf-8")))


def main(arguments: list[str]) -> int:
    """Renew README.md, or with --check only tell (exit status 1) that it is out of date."""
    old = README.read_text(encoding="utf-8")
    new = fill(old, RESULTS)
    if "--check" not in arguments:
        README.write_text(new, encoding="utf-8")
    elif new != old:
        print("README.md differs from benchmarks/results/: run make tables.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

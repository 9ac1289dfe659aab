"""Write docs/api.md: every public name, from its signature and its docstring. `make api` runs it; a test compares.

Usage: python tools/api_reference.py
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import hf_sparse

FILE = Path(__file__).parents[1] / "docs" / "api.md"

# What is public beside `hf_sparse.__all__`, and named by the other pages.
MORE = {
    "Publishing": {
        "hf_sparse.hub.push": ("push_folder", "PushError"),
        "hf_sparse.hub.card": ("write_card", "render_card", "card_metadata", "facts_from_folder", "is_rendered"),
        "hf_sparse.hub.facts": ("CardFacts", "DataFacts", "MetricFacts", "LatencyFacts", "CostFacts", "latency_facts"),
        "hf_sparse.hub.html": ("render_report",),
        "hf_sparse.hub.fetch": ("fetch_model", "FetchError"),
        "hf_sparse.hub.headers": ("fetch_headers",),
    },
    "Folders": {
        "hf_sparse.inference.stored.streaming": ("compress_folder", "decompress_folder"),
        "hf_sparse.core.stored.files": ("finish_interrupted_save",),
        "hf_sparse.core.report": ("SparsityReport", "LayerReport"),
    },
    "Exits and neighbours": {
        "hf_sparse.inference.exits.export": ("export_program",),
        "hf_sparse.inference.exits.samples": ("sample_inputs", "ExportError"),
        "hf_sparse.inference.exits.structure": ("CropError",),
        "hf_sparse.inference.layers.adapters": ("support_compressed",),
    },
    "Measuring": {
        "hf_sparse.inference.measuring.bench": ("compare_models", "token_inputs"),
        "hf_sparse.inference.encoders.fused": ("fused_encoders",),
        "hf_sparse.inference.measuring.environment": ("environment",),
    },
}
TRAINING = ("SparseDistill", "BlockMasks", "distillation_loss", "graft", "group_lasso", "plan_step")
_SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Attributes|Example|Examples|Source):$")


class _Written:
    """An annotation that is shown as it is written, without quotes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def describe(name: str, thing: Any) -> str:
    """Give the entry of a class or function."""
    lines = [f"### {name}", ""]
    if not (inspect.isclass(thing) and issubclass(thing, BaseException)):
        lines += ["```text", f"{name}{signature(thing)}", "```", ""]
    lines.append(docstring(inspect.getdoc(thing) or ""))
    if dataclasses.is_dataclass(thing) and name.startswith("SparseDistill"):
        lines += ["", *fields(thing)]
    if inspect.isclass(thing):
        lines += [line for part in methods(thing) for line in ("", part)]
    return "\n".join(lines).rstrip() + "\n"


def signature(thing: Any) -> str:
    """Give the arguments, as they are written; those of a config are its fields."""
    if dataclasses.is_dataclass(thing) and inspect.isclass(thing) and thing.__name__.startswith("SparseDistill"):
        return "(output_dir, ...)"
    found = inspect.signature(thing)
    written = [
        one.replace(annotation=_Written(one.annotation)) if isinstance(one.annotation, str) else one
        for one in found.parameters.values()
    ]
    returned = found.return_annotation
    returned = _Written(returned) if isinstance(returned, str) else returned
    # A function among the defaults would be told with its address.
    return re.sub(
        r"<function [^<>]*(<[^<>]*>)?[^<>]*>", "...", str(inspect.Signature(written, return_annotation=returned))
    )


def docstring(text: str) -> str:
    """Lay a docstring out as markdown: sections as bold words, entries as lists, examples as they are."""
    out: list[str] = []
    section, example = "", False
    for line in text.splitlines():
        bare = line.strip()
        if found := _SECTION.match(bare):
            if example:
                out += ["```", ""]
            section, example = found[1], False
            out += ["" if out and out[-1] else "", f"**{section}**", ""]
        elif section in ("Example", "Examples") and bare:
            if not example:
                out.append("```pycon")
                example = True
            out.append(line[4:] if line.startswith("    ") else line)
        elif section in ("Args", "Attributes", "Raises") and re.match(r"^ {4}\S[^:]*: ", line):
            term, _, rest = bare.partition(": ")
            out.append(f"- `{term}`: {rest}")
        elif section and bare and out and out[-1].startswith("- "):
            out[-1] += " " + bare
        else:
            out.append(bare if section else line)
    if example:
        out.append("```")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def fields(config: Any) -> list[str]:
    """Tabulate the fields that a config adds to `TrainingArguments`."""
    own = {name for cls in config.__mro__ if cls.__module__.startswith("hf_sparse.") for name in cls.__annotations__}
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for spec in dataclasses.fields(config):
        if spec.name in own and spec.init:
            told = spec.metadata.get("default", spec.default)
            # What --help makes of the default is in a column of its own here.
            text = re.sub(r"( Default: [^%]*)?%\(default\)\.0s", "", str(spec.metadata.get("help", "")))
            text = text.replace("|", "\\|").replace("\n", " ")
            rows.append(f"| `{spec.name}` | {told!r} | {text} |")
    return rows


def methods(cls: Any) -> list[str]:
    """Describe the public methods that a class defines itself."""
    found = []
    for name, member in vars(cls).items():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if name.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        first = docstring(inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
        arguments = ", ".join(p for p in inspect.signature(function).parameters if p not in ("self", "cls"))
        found.append(f"- `.{name}({arguments})`: {first}")
    return found


def write() -> str:
    """Give the text of docs/api.md."""
    parts = [
        "# API reference",
        "",
        "Written by `tools/api_reference.py` from the docstrings; edit those. Examples run as doctests.",
    ]
    groups: dict[str, list[tuple[str, Any]]] = {"Training": [], "Models": []}
    for name in sorted([*hf_sparse.__all__, "FormatError"], key=str.lower):
        group = "Training" if name.startswith(TRAINING) else "Models"
        groups[group].append((name, getattr(hf_sparse, name)))
    for group, modules in MORE.items():
        for module, names in modules.items():
            found = importlib.import_module(module)
            groups.setdefault(group, []).extend((name, getattr(found, name)) for name in names)
    for group, things in groups.items():
        parts += ["", f"## {group}", ""]
        for name, thing in things:
            parts.append(describe(name, thing))
            if thing.__module__ and name not in hf_sparse.__all__:
                parts.append(f"Import it from `{thing.__module__}`.\n")
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    FILE.write_text(write(), encoding="utf-8")

"""A model's report as one HTML page that needs nothing beside it: tables, mask maps and curves, in light and dark."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Template
from markupsafe import Markup

from hf_sparse.core.report import report
from hf_sparse.hub.facts import FACTS_FILE, CardFacts, DataFacts, read_facts
from hf_sparse.hub.filters import (
    GAP,
    count,
    json_value,
    milliseconds,
    percent,
    ratio,
    score,
    shape,
    template_environment,
)
from hf_sparse.hub.history import curves
from hf_sparse.hub.masks import lay_out, read_mask_maps
from hf_sparse.hub.plots import compared
from hf_sparse.hub.svg import HUES, line_chart, mask_image, move_chart


def render_report(folder: str | os.PathLike[str], name: str | None = None) -> str:
    """Render the report of a model folder.

    Args:
        folder: saved by `save_pretrained` or by the trainer, compressed or dense; the facts of its card are told
            where it holds some.
        name: title of the page; None takes the card's, or that of the folder.

    Returns:
        HTML, self-contained: it fetches nothing and runs no script.

    Raises:
        FileNotFoundError: if the folder, its config.json or its weights are missing.
        FormatError: if the folder or its facts are damaged.
    """
    folder = Path(folder)
    found = report(folder)
    facts = read_facts(folder / FACTS_FILE) if (folder / FACTS_FILE).is_file() else None
    grid = lay_out(read_mask_maps(folder))
    return _template().render(
        name=name or (facts.name if facts else folder.resolve().name),
        report=found,
        facts=facts,
        grid=grid,
        images={place: mask_image(one.cells, grid.highest) for place, one in grid.maps.items()},
        charts=_charts(facts) if facts else [],
        made=_made(facts) if facts else [],
    )


def breakable(name: str) -> Markup:
    """Let a dotted name break after its dots, where a phone is too narrow for it.

    Example:
        >>> breakable("a.b<i>")
        Markup('a.<wbr>b&lt;i&gt;')
    """
    return Markup(".<wbr>").join(name.split("."))


def _charts(facts: CardFacts) -> list[dict[str, Any]]:
    """Title, picture and legend of every chart that the facts have numbers for."""
    charts = []
    for title, lines in curves(facts.history).items():
        charts.append({"title": title, "svg": line_chart(lines, f"{title} over training steps"),
                       "legend": [(name, i % HUES) for i, name in enumerate(lines)]})  # fmt: skip
    for axis, pairs in compared(facts).items():
        metric = facts.metrics[0]
        label, unit = axis.rstrip(")").split(" (")
        title = f"{metric.name or metric.type} against {label}"
        moves = [(note.strip(", ") or label, (dense, metric.dense_value or 0.0), (pruned, metric.value))
                 for note, dense, pruned in pairs]  # fmt: skip
        names = [(f"dense to this model{note}", i % HUES) for i, (note, _, _) in enumerate(pairs)]
        charts.append({"title": title, "svg": move_chart(moves, unit.split(",")[0], title), "legend": names})
    return charts


def _made(facts: CardFacts) -> list[tuple[str, str]]:
    """What is known of the making of a model, fact by fact, in the words of its card."""
    data, cost = facts.data, facts.cost
    rows = [
        ("base model", facts.base_model),
        ("teacher", facts.teacher),
        ("task", facts.task),
        ("data", data and _data(data)),
        ("about the data", data and data.note),
        ("block shape (rows x columns)", facts.block_shape and shape(facts.block_shape)),
        ("sparsity asked", facts.sparsity_asked is not None and percent(facts.sparsity_asked)),
        ("training", cost and f"{count(cost.steps)} steps, {cost.seconds:,.0f} seconds on {cost.hardware}"),
        ("seed", facts.seed is not None and str(facts.seed)),
        ("license", facts.license),
        ("evaluated with", facts.eval_command),
        *((name, json_value(value)) for name, value in facts.recipe.items()),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(facts.versions.items()))),
    ]
    return [(name, str(value)) for name, value in rows if value]


def _data(data: DataFacts) -> str:
    rows = ((data.train_rows, "to train"), (data.eval_rows, "to evaluate"))
    told = [f"{count(number)} rows {what}" for number, what in rows if number is not None]
    return ", ".join([data.name, *told])


@cache
def _template() -> Template:
    environment = template_environment(autoescape=True)
    filters = {f.__name__: f for f in (breakable, count, milliseconds, percent, ratio, score, shape)}
    environment.filters.update(filters)
    environment.globals["GAP"] = Markup('<span class="gap">{}</span>').format(GAP)
    return environment.get_template("report.html")

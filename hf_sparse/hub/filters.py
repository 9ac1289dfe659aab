"""How facts are written in a card: numbers, bytes, links. One rule per kind of fact, used by the templates."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_sparse.hub.facts import CostFacts, DataFacts, LatencyFacts, MetricFacts

GAP = "not measured"

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def template_environment(autoescape: bool) -> Environment:
    """Make what renders the templates of this package; a name that it does not know is an error, and not empty."""
    return Environment(
        loader=PackageLoader("hf_sparse.hub", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=autoescape,
    )


def is_hub_id(name: str) -> bool:
    """Tell whether a name is that of a repository on the Hub: namespace/name, not a path and not a bare word.

    Example:
        >>> is_hub_id("google-bert/bert-base-uncased"), is_hub_id("/home/me/model"), is_hub_id("my-teacher")
        (True, False, False)
    """
    return bool(_HUB_ID.fullmatch(name)) and ".." not in name


def text(value: str) -> str:
    """Make recorded text safe in a sentence: one line, no HTML and no code span of its own.

    Example:
        >>> text("a  <i>\\n b")
        'a &lt;i&gt; b'
    """
    line = " ".join(value.split())
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("`", "&#96;")


def caption(value: str) -> str:
    """Make recorded text safe inside the brackets of an image, too.

    Example:
        >>> caption("a [b]")
        'a &#91;b&#93;'
    """
    return text(value).replace("[", "&#91;").replace("]", "&#93;")


def code(value: str) -> str:
    """Make recorded text safe between backticks: one line, no backtick."""
    return " ".join(value.split()).replace("`", "'")


def cell(value: str) -> str:
    """Make what is written already safe inside a table: a bar would end the cell.

    Example:
        >>> cell("a | b")
        'a \\\\| b'
    """
    return value.replace("|", "\\|")


def percent(value: float) -> str:
    """Write a fraction.

    Example:
        >>> percent(0.8), percent(0.79167)
        ('80 %', '79.17 %')
    """
    return f"{100 * value:.2f}".rstrip("0").rstrip(".") + " %"


def count(value: int) -> str:
    """Write a whole number with separators."""
    return f"{value:,}"


def score(value: float) -> str:
    """Write a metric with four decimals."""
    return f"{value:.4f}"


def milliseconds(value: float) -> str:
    """Write a time with three significant digits, never in powers of ten.

    Example:
        >>> milliseconds(0.01234), milliseconds(12.345), milliseconds(1234.5)
        ('0.0123', '12.3', '1234')
    """
    return f"{value:.0f}" if value >= 1000 else format(float(f"{value:.3g}"), "f").rstrip("0").rstrip(".")


def ratio(larger: float, smaller: float) -> str:
    """Write how many times one number is the other; below 1 where the pruned model lost.

    Example:
        >>> ratio(10.0, 4.0), ratio(4.0, 5.0)
        ('2.50x', '0.80x')
    """
    return f"{larger / smaller:.2f}x"


def shape(pair: Sequence[int]) -> str:
    """Write a shape; -1 is the whole dimension.

    Example:
        >>> shape((8, 1)), shape((1, -1))
        ('8 x 1', '1 x all')
    """
    return " x ".join("all" if size == -1 else str(size) for size in pair)


def change(metric: MetricFacts) -> str:
    """Write what pruning did to a metric."""
    return GAP if metric.dense_value is None else f"{metric.value - metric.dense_value:+.4f}"


def model_link(name: str) -> str:
    """Link a model of the Hub; the name of a local one stays a name."""
    if is_hub_id(name):
        return f"[{name}](https://huggingface.co/{name})"
    return f"`{code(name)}`"


def data_line(data: DataFacts) -> str:
    """Write the data in one line."""
    name = text(data.name)
    if data.hub_id and is_hub_id(data.hub_id):
        name = f"[{name}](https://huggingface.co/datasets/{data.hub_id})"
    parts = [name + (f" ({text(data.config)})" if data.config else "")]
    for kind, split, rows in (("train", data.train_split, data.train_rows), ("eval", data.eval_split, data.eval_rows)):
        if split or rows is not None:
            numbers = f" {count(rows)} rows" if rows is not None else ""
            parts.append(f"{kind}:{numbers}{f' of split {text(split)}' if split else ''}")
    return "; ".join(parts)


def cost_line(cost: CostFacts) -> str:
    """Write the training cost in one line."""
    return f"{count(cost.steps)} steps, {cost.seconds:,.0f} seconds on {text(cost.hardware)}"


def versions_line(versions: dict[str, str]) -> str:
    """Write package versions in one line."""
    return ", ".join(f"{text(name)} {text(version)}" for name, version in sorted(versions.items()))


def by_run(rows: Sequence[LatencyFacts]) -> list[dict[str, Any]]:
    """Group latencies by the run (machine and command) that measured them, in their own order."""
    runs = groupby(rows, key=lambda row: (row.hardware, row.command))
    return [{"hardware": key[0], "command": key[1], "rows": list(group)} for key, group in runs]


def json_value(value: Any) -> str:
    """Write a setting as JSON."""
    return json.dumps(value, ensure_ascii=False)


def _or_gap(write: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: GAP if value is None else write(value)


FILTERS: dict[str, Callable[..., Any]] = {
    **{f.__name__: f for f in (by_run, caption, cell, change, code, cost_line, count, data_line, json_value,
                               milliseconds, model_link, percent, ratio, score, shape, text, versions_line)},
    **{f"{f.__name__}_or_gap": _or_gap(f) for f in (count, milliseconds, score)},
}  # fmt: skip

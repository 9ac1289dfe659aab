"""The model card: README.md rendered from recorded facts and from nothing else.

The facts lie beside it as `hf_sparse_card.json`, so that a card can be rendered again. The last line of a rendered
card is a digest of the text above it: it tells a card that somebody edited by hand from one that nobody did.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Template

from hf_sparse.core.stored.files import atomic_folder
from hf_sparse.hub.facts import FACTS_FILE, CardFacts, read_facts
from hf_sparse.hub.filters import FILTERS, is_hub_id, template_environment
from hf_sparse.hub.plots import draw_pictures

CARD_FILE = "README.md"
TAGS = ("hf_sparse", "block-sparse", "pruned")

# Absolute, or relative to here, to home, or to a drive.
_LOCAL_PATH = re.compile(r"\.{0,2}[/\\]|~|[A-Za-z]:[/\\]")

_DIGEST_LINE = "<!-- rendered by hf_sparse from hf_sparse_card.json, sha256 of the text above: {} -->\n"
_DIGEST_PATTERN = re.compile(re.escape(_DIGEST_LINE).replace(r"\{\}", "([0-9a-f]{64})"))


def render_card(facts: CardFacts) -> str:
    """Render a model card.

    Args:
        facts: what was recorded; a fact that was not is left out of the card or called "not measured".

    Returns:
        Markdown under a YAML header that the Hub accepts; the same text for the same facts.

    Raises:
        FormatError: if a fact has the wrong type or range.

    Example:
        >>> render_card(CardFacts(name="tiny", save_format="dense")).splitlines()[1]
        'library_name: transformers'
    """
    facts = CardFacts.from_dict(facts.to_dict())
    body = re.sub(r"\n{3,}", "\n\n", _template().render(facts=facts))
    text = f"---\n{card_metadata(facts).to_yaml()}\n---\n\n{body.strip()}\n\n"
    return text + _DIGEST_LINE.format(_digest(text))


def card_metadata(facts: CardFacts) -> ModelCardData:
    """Give the YAML header: the part of the facts that the Hub searches, filters and plots.

    A base model that is a local folder and a result without task or data set have no place in it and are left out.
    """
    results = _eval_results(facts)
    base_model = facts.base_model if facts.base_model and is_hub_id(facts.base_model) else None
    data = ModelCardData(
        base_model=base_model,
        library_name="hf_sparse" if facts.save_format == "compressed" else "transformers",
        license=facts.license,
        language=facts.language,
        pipeline_tag=facts.task,
        tags=list(dict.fromkeys([*TAGS, *facts.tags])),
        datasets=[facts.data.hub_id] if facts.data and facts.data.hub_id else None,
        metrics=list(dict.fromkeys(metric.type for metric in facts.metrics)) or None,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )
    if base_model:
        data["base_model_relation"] = "finetune"
    return data


def write_card(folder: str | os.PathLike[str], facts: CardFacts, keep_edited: bool = False) -> Path:
    """Write README.md and, beside it, the facts that it was rendered from and the pictures that it shows.

    The pictures (`hub.plots`) are drawn anew from the model in the folder and from the facts. Where matplotlib is
    missing the log says so, and the card keeps those that are there and cannot have changed.

    Base model and teacher given as local folders are recorded by the last part of their path: what is published must
    not tell how somebody's disk is laid out, nor pass for a name on the Hub.

    Args:
        folder: the model folder; made if missing.
        facts: what was recorded.
        keep_edited: refuse to overwrite a README.md that somebody wrote or edited by hand.

    Returns:
        Path of the card.

    Raises:
        FormatError: if a fact has the wrong type or range, or the model in the folder is damaged.
        FileExistsError: with `keep_edited`, if README.md is not as it was rendered.
        OSError: if the folder cannot be written.
    """
    facts = replace(facts, base_model=_without_path(facts.base_model), teacher=_without_path(facts.teacher))
    facts = CardFacts.from_dict(facts.to_dict())
    card, before = Path(folder) / CARD_FILE, {picture.file for picture in facts.pictures}
    if keep_edited and card.exists() and not is_rendered_file(card):
        raise FileExistsError(f"{card} was written or edited by hand and would be lost.")
    now: set[str] = set()
    with atomic_folder(folder, stale=lambda name: name in before - now) as staging:
        facts = replace(facts, pictures=draw_pictures(folder, facts, staging))
        now.update(picture.file for picture in facts.pictures)
        (staging / CARD_FILE).write_text(render_card(facts), encoding="utf-8")
        (staging / FACTS_FILE).write_text(facts.to_json(), encoding="utf-8")
    return card


def facts_from_folder(folder: str | os.PathLike[str]) -> CardFacts:
    """Read the facts recorded in a model folder.

    Raises:
        FileNotFoundError: if the folder holds none.
        FormatError: if they are damaged; names the file and the fact.
    """
    return read_facts(Path(folder) / FACTS_FILE)


def is_rendered(text: str) -> bool:
    """Tell whether a card is, to the letter, as `render_card` (of any version) left it.

    Example:
        >>> card = render_card(CardFacts(name="tiny", save_format="dense"))
        >>> is_rendered(card), is_rendered(card.replace("tiny", "huge"))
        (True, False)
    """
    found = list(_DIGEST_PATTERN.finditer(text))
    return bool(found) and found[-1].end() == len(text) and found[-1][1] == _digest(text[: found[-1].start()])


def is_rendered_file(card: str | os.PathLike[str]) -> bool:
    """Tell the same of a file, which may hold anything."""
    try:
        return is_rendered(Path(card).read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        return False


def _without_path(name: str | None) -> str | None:
    """Keep the last part alone of the name of a folder on somebody's disk."""
    local = name and (_LOCAL_PATH.match(name) or os.path.isdir(name))
    return re.split(r"[/\\]+", name.rstrip("/\\"))[-1] if name and local else name


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    if not (facts.task and facts.data):
        return []
    data = facts.data
    return [
        EvalResult(
            task_type=facts.task,
            dataset_type=data.hub_id or re.sub(r"[^a-z0-9]+", "-", data.name.lower()).strip("-"),
            dataset_name=data.name,
            dataset_config=data.config,
            dataset_split=data.eval_split,
            metric_type=metric.type,
            metric_name=metric.name,
            metric_value=metric.value,
        )
        for metric in facts.metrics
    ]


@cache
def _template() -> Template:
    environment = template_environment(autoescape=False)
    environment.filters.update(FILTERS)
    return environment.get_template("model_card.md")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()

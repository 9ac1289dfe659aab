"""Real text that is already on every machine: which package does this sentence of a docstring come from?

Sources are parsed, never imported. A file belongs wholly to the training or wholly to the test split. A sentence is
kept once, and not at all where two packages share it. The names of all packages are masked.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tqdm.auto import tqdm

# All of them come with hf_sparse: some it requires itself, the others its requirements do.
PACKAGES = ("huggingface_hub", "networkx", "numpy", "pandas", "sympy", "torch", "transformers")
MASKED = "this package"
TEST_SHARE = 0.25
WORDS = (6, 40)

_NAMES = re.compile(
    r"\b(?:(?:the )?(?:hugging ?face(?:[ _-]hub)?|networkx|nx|numpy|np|pandas|pd|sympy|pytorch|torch|transformers))\b",
    re.IGNORECASE,
)
_LISTS = re.compile(
    r"(?:other |keyword )?(?:arg(?:ument)?s?|param(?:eter)?s?|returns?|yields?|raises?|examples?|see also|references?|"
    r"attributes?|methods|warns?|usage|shapes?|inputs?|outputs?|citations?|bibliography)\b[^.]{0,20}:{0,2}",
    re.IGNORECASE,
)
_TALK = re.compile(r"(?:notes?|warnings?|tips?|description|explanation|background)\s*:{0,2}", re.IGNORECASE)
_UNDERLINE = re.compile(r"\s*[-=~^*#]{3,}\s*")
_NOT_PROSE = re.compile(r"\s*(?:>>>|\.\.|[-*+•] |\(?\d+[.)] |:\w+|[@|#$<\\]|```|~~~)")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)|`([^`<]*)<[^`]*>`_+")
_CODE = re.compile(r":\w+(?::\w+)*:`[^`]*`|\[?``?[^`]*``?\]?_*")
_PLAIN = re.compile(r"[A-Za-z][A-Za-z -]*")
_NOT_ENGLISH = re.compile(r"https?:|www\.|arxiv|\w_|_\w|\w\.\w|\w\(|\)\w|[][{}<>=|\\/@#$^*~`]|--|\.\.\.|\d\s*[+*-]\s*\d", re.I)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


@dataclass(frozen=True)
class Sentence:
    """One sentence, the package it comes from and the file it stands in, relative to the package."""

    text: str
    package: str
    file: str

    @property
    def key(self) -> str:
        """What makes two sentences the same: their letters, without case, digits and punctuation."""
        return re.sub(r"[^a-z]+", " ", self.text.lower()).strip()


def sentences(docstring: str) -> list[str]:
    """Take the plain English sentences out of a docstring: no code, lists, markup or links, names masked.

    Example:
        >>> sentences("Draw the nodes of a graph with NetworkX.\\n\\nParameters\\n----------\\nG : a graph to be drawn.")
        ['Draw the nodes of a graph with this package.']
    """
    found = []
    for paragraph in _paragraphs(inspect.cleandoc(docstring)):
        text = _LINK.sub(lambda m: m[1] or m[2], paragraph)
        # A quoted English word stays; anything else in quotes is code and its sentence goes.
        text = _CODE.sub(lambda m: m[0].strip("`") if _PLAIN.fullmatch(m[0].strip("`")) else "{}", text)
        for sentence in _SENTENCE_END.split(" ".join(text.split())):
            sentence = _NAMES.sub(MASKED, sentence)
            words = sentence.split()
            whole = sentence[:1].isupper() and sentence.endswith((".", "!", "?")) and sentence.isascii()
            if whole and WORDS[0] <= len(words) <= WORDS[1] and not _NOT_ENGLISH.search(sentence):
                found.append(sentence)
    return found


def _paragraphs(text: str) -> Iterator[str]:
    talking = True
    for block in re.split(r"\n\s*\n", text):
        lines = block.split("\n")
        title = lines[0].strip()
        if len(lines) > 1 and _UNDERLINE.fullmatch(lines[1]):
            talking, lines = _LISTS.fullmatch(title) is None, lines[2:]
        elif _LISTS.fullmatch(title):
            talking = False
        elif _TALK.fullmatch(title):
            talking, lines = True, lines[1:]
        if talking and lines and not any(_NOT_PROSE.match(line) for line in lines):
            yield "\n".join(lines)

"""Plain English out of a docstring: whole sentences, without code, lists, markup, links and package names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

WORDS = (8, 30)
MASKED = "this package"

_NAMES = re.compile(
    r"\b(?:(?:the )?(?i:hugging ?face|networkx|numpy|pandas|sympy|pytorch|torch|transformers)|np|nx|pd)\b"
)
_LISTS = re.compile(
    r"(?:other |keyword )?(?:arg(?:ument)?s?|param(?:eter)?s?|returns?|yields?|raises?|examples?|see also|references?|"
    r"attributes?|methods|warns?|usage|shapes?|inputs?|outputs?|citations?|bibliography)\b[^.]{0,20}",
    re.IGNORECASE,
)
_TALK = re.compile(r"(?:notes?|warnings?|tips?|description|explanation|background)\s*:{0,2}", re.IGNORECASE)
_UNDERLINE = re.compile(r"\s*[-=~^*#]{3,}\s*")
_NOT_PROSE = re.compile(r"\s*(?:>>>|\.\.|[-*+•] |\(?\d+[.)] |:\w+|[@|#$<\\]|```|~~~)")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)|`([^`<]*)<[^`]*>`_+")
_CODE = re.compile(r":\w+(?::\w+)*:`[^`]*`|\[?``?[^`]*``?\]?_*")
_PLAIN = re.compile(r"[A-Za-z][A-Za-z -]*")
_NOT_ENGLISH = re.compile(
    r"https?:|www\.|arxiv|\w_|_\w|\w\.\w|\w\(|\)\w|[][{}<>=|\\/@#$^*~`]|--|\.\.\.|\d\s*[+*-]\s*\d", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def sentences(docstring: str) -> list[str]:
    """Take the sentences out of a docstring.

    Args:
        docstring: in any of the usual styles (reStructuredText, numpydoc, Google, Markdown).

    Returns:
        Sentences of 8 to 30 words, in order, package names masked.

    Example:
        >>> sentences("Draw the nodes of a graph with NetworkX.\\n\\nParameters\\n----------\\nG : a graph.")
        ['Draw the nodes of a graph with this package.']
    """
    found = []
    for paragraph in _paragraphs(inspect.cleandoc(docstring)):
        text = _LINK.sub(lambda m: m[1] or m[2], paragraph)
        # A quoted English word stays; anything else in backticks is code, and its sentence goes.
        text = _CODE.sub(lambda m: m[0].strip("`") if _PLAIN.fullmatch(m[0].strip("`")) else "{}", text)
        for raw in _SENTENCE_END.split(" ".join(text.split())):
            sentence = _NAMES.sub(MASKED, raw)
            sentence = sentence[:1].upper() + sentence[1:] if raw[:1].isupper() else sentence
            whole = sentence[:1].isupper() and sentence.endswith((".", "!", "?")) and sentence.isascii()
            if whole and WORDS[0] <= len(sentence.split()) <= WORDS[1] and not _NOT_ENGLISH.search(sentence):
                found.append(sentence)
    return found


def letters(sentence: str) -> str:
    """Reduce a sentence to what makes two the same: its letters, without case, digits and punctuation.

    Example:
        >>> letters("Returns a 2-D array.") == letters("returns a 3-D  array")
        True
    """
    return re.sub(r"[^a-z]+", " ", sentence.lower()).strip()


def _paragraphs(text: str) -> Iterator[str]:
    # A section of prose (Notes, or any title that is not a list of things) is read, the others are skipped to its end.
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

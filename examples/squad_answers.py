"""What run_qa.py has to know about SQuAD: its files, answers out of start and end logits, exact match and F1."""

from __future__ import annotations

import collections
import gzip
import json
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset


def read_squad(file: str) -> Dataset | None:
    """Read a file in the nested form in which SQuAD is published, gzipped or not; None for any other form.

    Returns:
        Rows of id, title, context, question, answers {text, answer_start}; questions without an answer have none.
    """
    opened = gzip.open(file, "rt", encoding="utf-8") if file.endswith(".gz") else Path(file).open(encoding="utf-8")
    with opened as handle:
        if handle.read(1) != "{":
            return None
        handle.seek(0)
        try:
            content = json.load(handle)
        except ValueError:  # one object per line
            return None
    articles = content.get("data")
    if not isinstance(articles, list) or not articles or "paragraphs" not in articles[0]:
        return None
    rows = [
        {
            "id": question["id"], "title": article.get("title", ""), "context": paragraph["context"],
            "question": question["question"],
            "answers": {
                "text": [answer["text"] for answer in question["answers"]],
                "answer_start": [answer["answer_start"] for answer in question["answers"]],
            },
        }
        for article in articles for paragraph in article["paragraphs"] for question in paragraph["qas"]
    ]  # fmt: skip
    return Dataset.from_list(rows)


def split_articles(data: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Hold out the last articles: no paragraph of theirs is trained on.

    Args:
        data: with a column "title"; rows of one article follow each other.
        share: of the articles, in (0, 1).

    Raises:
        ValueError: if one side would be empty.
    """
    titles = list(dict.fromkeys(data["title"]))
    held = set(titles[len(titles) - round(share * len(titles)) :])
    if not 0 < len(held) < len(titles):
        raise ValueError(f"eval_articles={share} of {len(titles)} articles leaves no article on one side.")
    keep = [i for i, title in enumerate(data["title"]) if title not in held]
    return data.select(keep), data.select(sorted(set(range(len(data))) - set(keep)))


def encode(rows: Mapping[str, Sequence[Any]], tokenizer: Any, length: int, stride: int) -> dict[str, list[Any]]:
    """Turn questions and contexts into features; a long context becomes several that overlap.

    Args:
        rows: a batch of id, question, context, answers.
        tokenizer: a fast one.
        length: tokens of a feature.
        stride: tokens that neighbours share.

    Returns:
        What the model takes, the answer's first and last token (0, the first token, where the feature does not hold
        it), and "example_id" and "offset_mapping" (None outside the context), to find the text again.
    """
    encoded = tokenizer(
        [question.lstrip() for question in rows["question"]], rows["context"], truncation="only_second",
        max_length=length, stride=stride, return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    features: dict[str, list[Any]] = {
        key: value for key, value in encoded.items() if key not in ("overflow_to_sample_mapping", "offset_mapping")
    }
    for name in ("example_id", "offset_mapping", "start_positions", "end_positions"):
        features[name] = []
    for i, source in enumerate(encoded["overflow_to_sample_mapping"]):
        in_context = [part == 1 for part in encoded.sequence_ids(i)]
        pairs = zip(encoded["offset_mapping"][i], in_context, strict=True)
        offsets = [tuple(pair) if inside else None for pair, inside in pairs]
        answers = rows["answers"][source]
        first = last = 0
        if answers["answer_start"]:
            begin = answers["answer_start"][0]
            end = begin + len(answers["text"][0])
            starts = [t for t, pair in enumerate(offsets) if pair is not None and pair[0] <= begin < pair[1]]
            ends = [t for t, pair in enumerate(offsets) if pair is not None and pair[0] < end <= pair[1]]
            if starts and ends:
                first, last = starts[0], ends[0]
        features["start_positions"].append(first)
        features["end_positions"].append(last)
        features["example_id"].append(rows["id"][source])
        features["offset_mapping"].append(offsets)
    return features


class SquadMetric:
    """Exact match and F1 of SQuAD, in percent, from the start and end logits of features.

    Args:
        examples: rows of id, context, answers.
        features: of these examples, as `encode` made them, in the order in which they are predicted.
        n_best: starts and ends that are combined.
        max_answer: tokens of an answer.
    """

    def __init__(self, examples: Dataset, features: Dataset, n_best: int = 20, max_answer: int = 30) -> None:
        self.examples, self.n_best, self.max_answer = examples, n_best, max_answer
        self.offsets = list(features["offset_mapping"])
        self.of_example: dict[str, list[int]] = collections.defaultdict(list)
        for i, name in enumerate(features["example_id"]):
            self.of_example[name].append(i)
        self.positions = [np.asarray(features[name]) for name in ("start_positions", "end_positions")]
        self.answers: dict[str, str] = {}

    def __call__(self, output: Any) -> dict[str, float]:
        """Compute both for what `Trainer` hands to `compute_metrics`; the answers stay in `answers`.

        Raises:
            ValueError: if the predictions are not in the order of the features.
        """
        if not all(map(np.array_equal, output.label_ids, self.positions)):
            raise ValueError("predictions come in another order than the features, so that answers would be mixed up.")
        start, end = output.predictions[:2]
        exact, f1 = [], []
        for row in self.examples:
            found = self._answer(row, start, end)
            self.answers[row["id"]] = found
            truths = row["answers"]["text"] or [""]
            exact.append(max(float(normalise(found) == normalise(truth)) for truth in truths))
            f1.append(max(word_f1(found, truth) for truth in truths))
        return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(f1))}

    def _answer(self, row: dict[str, Any], start: np.ndarray, end: np.ndarray) -> str:
        best, text = -np.inf, ""
        for i in self.of_example[row["id"]]:
            offsets = self.offsets[i]
            begins, ends = (np.argsort(logits[i][: len(offsets)])[::-1][: self.n_best] for logits in (start, end))
            for b in begins:
                for e in ends:
                    if offsets[b] is None or offsets[e] is None or not b <= e < b + self.max_answer:
                        continue
                    score = start[i][b] + end[i][e]
                    if score > best:
                        best, text = score, row["context"][offsets[b][0] : offsets[e][1]]
        return text


def normalise(text: str) -> str:
    """Lower the case, and drop punctuation, articles and spaces that do not count.

    Example:
        >>> normalise("The  Broncos!")
        'broncos'
    """
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def word_f1(found: str, truth: str) -> float:
    """F1 of the words that two normalised answers share.

    Example:
        >>> word_f1("the Denver Broncos", "Broncos")
        0.6666666666666666
    """
    words, true = normalise(found).split(), normalise(truth).split()
    if not words or not true:
        return float(words == true)
    shared = sum((collections.Counter(words) & collections.Counter(true)).values())
    return 2 * shared / (len(words) + len(true))

"""Logits of a model for a list of sentences, the same way in every process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from examples.demo.settings import Settings

BATCH = 64


def pad_and_tokenize(tokenizer: Any, texts: Sequence[str], settings: Settings) -> Any:
    """Turn sentences into one batch, padded to the longest."""
    return tokenizer(list(texts), truncation=True, max_length=settings.max_tokens, padding=True, return_tensors="pt")


def predict_logits(model: Any, tokenizer: Any, texts: Sequence[str], settings: Settings) -> Tensor:
    """Compute the logits of a model in evaluation mode, fp32.

    Args:
        model: on the CPU.
        tokenizer: its tokenizer.
        texts: sentences.
        settings: of the run.

    Returns:
        [len(texts), labels], in the order of `texts`.
    """
    # Sentences of like length share a batch; the logits go back to their own rows.
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    parts, training = [], model.training
    model.eval()
    with torch.inference_mode():
        for start in tqdm(range(0, len(order), BATCH), desc="predicting", unit=" batches", leave=False):
            rows = order[start : start + BATCH]
            parts.append(model(**pad_and_tokenize(tokenizer, [texts[row] for row in rows], settings)).logits)
    model.train(training)
    return torch.cat(parts)[torch.tensor(order).argsort()]

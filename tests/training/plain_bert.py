"""BERT written out in plain torch: layers as dictionaries of tensors, for re-implementations that use no library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
# The linears of a layer, by their names in the model.
LINEARS = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
)  # fmt: skip


def layers_of(weights: Mapping[str, Tensor], count: int) -> list[Weights]:
    """Sort the weights of a BertForSequenceClassification by layer, keeping the tensors themselves."""
    prefixes = [f"bert.encoder.layer.{i}." for i in range(count)]
    return [{k.removeprefix(p): v for k, v in weights.items() if k.startswith(p)} for p in prefixes]


def run_bert(
    weights: Mapping[str, Tensor],
    layers: list[Weights],
    batch: Mapping[str, Tensor],
    heads: int,
    dropout: float = 0.0,
    in_train_mode: Sequence[bool] | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run embeddings, these layers, pooler and classifier.

    Args:
        weights: all weights by name; those of the layers are not read.
        layers: the layers to run, in their order.
        batch: "input_ids" and "attention_mask", [B, T].
        heads: heads of attention.
        dropout: chance that a value is dropped, everywhere where BERT drops some.
        in_train_mode: one bool per layer, False = nothing is dropped in it; None = all True.

    Returns:
        Logits [B, classes]; hidden states, embeddings first, [B, T, D]; attention maps after dropout,
        [B, heads, T, T].
    """
    rates = [dropout if own else 0.0 for own in in_train_mode or [True] * len(layers)]
    ids = batch["input_ids"]
    x = weights["bert.embeddings.word_embeddings.weight"][ids]
    x = x + weights["bert.embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = x + weights["bert.embeddings.token_type_embeddings.weight"][0]
    x = norm(x, weights["bert.embeddings.LayerNorm.weight"], weights["bert.embeddings.LayerNorm.bias"])
    x = drop(x, dropout)
    hidden, maps = [x], []
    for layer, rate in zip(layers, rates, strict=True):
        x, attention = run_layer(layer, x, batch["attention_mask"], heads, rate)
        hidden.append(x)
        maps.append(attention)
    pooled = torch.tanh(F.linear(x[:, 0], weights["bert.pooler.dense.weight"], weights["bert.pooler.dense.bias"]))
    return F.linear(drop(pooled, dropout), weights["classifier.weight"], weights["classifier.bias"]), hidden, maps


def run_layer(
    layer: Weights, x: Tensor, attention_mask: Tensor, heads: int, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Run one layer; gives its output and its attention map, after dropout."""
    samples, tokens, size = x.shape

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, layer[f"{name}.weight"], layer[f"{name}.bias"])

    def split(name: str) -> Tensor:
        return linear(f"attention.self.{name}", x).view(samples, tokens, heads, size // heads).transpose(1, 2)

    scores = split("query") @ split("key").transpose(2, 3) / (size // heads) ** 0.5
    scores = scores.masked_fill(attention_mask[:, None, None, :] == 0, torch.finfo(x.dtype).min)
    attention = drop(scores.softmax(-1), dropout)
    mixed = (attention @ split("value")).transpose(1, 2).reshape(samples, tokens, size)
    x = norm(
        x + drop(linear("attention.output.dense", mixed), dropout), layer["attention.output.LayerNorm.weight"],
        layer["attention.output.LayerNorm.bias"],
    )  # fmt: skip
    wide = F.gelu(linear("intermediate.dense", x))
    wide = drop(linear("output.dense", wide), dropout)
    return norm(x + wide, layer["output.LayerNorm.weight"], layer["output.LayerNorm.bias"]), attention


def drop(x: Tensor, chance: float) -> Tensor:
    """Drop values by the global generator, which is not asked where the chance is 0."""
    return F.dropout(x, chance) if chance else x


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer normalisation with BERT's epsilon."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-12)

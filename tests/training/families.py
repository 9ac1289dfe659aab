"""One tiny model per family: how to make it, a batch for it, and what its layers hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

from tests.training.tiny import SMALL, VOCAB, rows, stirred

TEXT = {"vocab_size": VOCAB, "pad_token_id": 0}
POSITIONS = {"max_position_embeddings": 40}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family.

    Attributes:
        make: builds the model, from a seed set before.
        stacks: name of each list of layers -> linears that one layer holds, by name inside the layer.
        task: kind of `rows` that it takes; "images" for vision.
        outside: linears that are never targets.
    """

    make: Callable[[], Any]
    stacks: dict[str, tuple[str, ...]]
    task: str
    outside: tuple[str, ...]
    layers: int = 2


def _bert_like(attention: str = "attention.self") -> tuple[str, ...]:
    names = [f"{attention}.{name}" for name in ("query", "key", "value")]
    return (*names, "attention.output.dense", "intermediate.dense", "output.dense")


_T5_SELF = tuple(f"layer.0.SelfAttention.{name}" for name in "qkvo")
_T5_CROSS = tuple(f"layer.1.EncDecAttention.{name}" for name in "qkvo")

FAMILIES = {
    "bert": Family(
        make=lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT, **SMALL, **POSITIONS, num_labels=3)),
        stacks={"bert.encoder.layer": _bert_like()}, task="classes", outside=("bert.pooler.dense", "classifier"),
    ),
    "roberta": Family(
        make=lambda: tf.RobertaForSequenceClassification(
            tf.RobertaConfig(**TEXT, **SMALL, **POSITIONS, num_labels=3)
        ),
        stacks={"roberta.encoder.layer": _bert_like()}, task="classes",
        outside=("classifier.dense", "classifier.out_proj"),
    ),
    "distilbert": Family(
        make=lambda: tf.DistilBertForSequenceClassification(
            tf.DistilBertConfig(**TEXT, **POSITIONS, dim=16, n_layers=2, n_heads=2, hidden_dim=32, num_labels=3)
        ),
        stacks={"distilbert.transformer.layer": (
            "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2")},
        task="classes", outside=("pre_classifier", "classifier"),
    ),
    "electra": Family(
        make=lambda: tf.ElectraForSequenceClassification(
            # An embedding size of its own brings a linear that projects embeddings.
            tf.ElectraConfig(**TEXT, **SMALL, **POSITIONS, embedding_size=8, num_labels=3)
        ),
        stacks={"electra.encoder.layer": _bert_like()}, task="classes",
        outside=("electra.embeddings_project", "classifier.dense", "classifier.out_proj"),
    ),
    "mpnet": Family(
        make=lambda: tf.MPNetForSequenceClassification(tf.MPNetConfig(**TEXT, **SMALL, **POSITIONS, num_labels=3)),
        stacks={"mpnet.encoder.layer": (
            *(f"attention.attn.{n}" for n in "qkvo"), "intermediate.dense", "output.dense")},
        task="classes", outside=("classifier.dense", "classifier.out_proj"),
    ),
    "modernbert": Family(
        make=lambda: tf.ModernBertForSequenceClassification(
            tf.ModernBertConfig(**TEXT, **SMALL, **POSITIONS, num_labels=3, bos_token_id=1, eos_token_id=2,
                                cls_token_id=1, sep_token_id=2)
        ),
        stacks={"model.layers": ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")}, task="classes",
        outside=("head.dense", "classifier"),
    ),
    "vit": Family(
        make=lambda: tf.ViTForImageClassification(
            tf.ViTConfig(**SMALL, image_size=8, patch_size=4, num_channels=1, num_labels=3)
        ),
        stacks={}, task="images", outside=("classifier",),
    ),
    "gpt2": Family(
        make=lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=VOCAB, n_positions=40, n_embd=16, n_layer=2, n_head=2, pad_token_id=0)
        ),
        stacks={"transformer.h": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}, task="lm",
        outside=("lm_head",),
    ),
    "llama": Family(
        make=lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, **SMALL, **POSITIONS, num_key_value_heads=1)),
        stacks={"model.layers": (
            *(f"self_attn.{n}_proj" for n in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")},
        task="lm", outside=("lm_head",),
    ),
    "t5": Family(
        make=lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0,
                        decoder_start_token_id=0)
        ),
        stacks={
            "encoder.block": (*_T5_SELF, "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"),
            "decoder.block": (*_T5_SELF, *_T5_CROSS, "layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"),
        },
        task="seq2seq", outside=("lm_head",),
    ),
}  # fmt: skip


def family_model(name: str, seed: int = 0) -> Any:
    """The tiny model of a family, from a seed."""
    torch.manual_seed(seed)
    return stirred(FAMILIES[name].make())


def family_rows(name: str, count: int = 8) -> list[dict[str, Any]]:
    """Samples for a family."""
    if FAMILIES[name].task != "images":
        return rows(FAMILIES[name].task, count)
    generator = torch.Generator().manual_seed(3)
    return [{"pixel_values": torch.randn(1, 8, 8, generator=generator), "labels": i % 3} for i in range(count)]


def family_batch(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate samples of any family."""
    from tests.training.tiny import pad

    if "pixel_values" not in samples[0]:
        return pad(samples)
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }

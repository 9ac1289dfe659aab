"""Tiny models of every family, made in memory, and masks for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from hf_sparse.core.blocks import BlockShape, grid_shape, scale_blocks_
from hf_sparse.core.structure.targets import find_targets, weight_view

VOCAB = 50
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {"vocab_size": VOCAB, "max_position_embeddings": 24, **SMALL}


def _ids(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(7))


def _text() -> dict[str, Tensor]:
    return {"input_ids": _ids()}


def _seq2seq() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids()}


def _image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7))}


# {family: (Auto class, model, inputs)}
FAMILIES: dict[str, tuple[Any, Callable[[], Any], Callable[[], dict[str, Tensor]]]] = {
    "bert": (
        tf.AutoModelForSequenceClassification,
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT, num_labels=3)),
        _text,
    ),
    "roberta": (
        tf.AutoModelForTokenClassification,
        lambda: tf.RobertaForTokenClassification(tf.RobertaConfig(**TEXT, pad_token_id=1, num_labels=3)),
        _text,
    ),
    "distilbert": (
        tf.AutoModelForSequenceClassification,
        lambda: tf.DistilBertForSequenceClassification(
            tf.DistilBertConfig(
                vocab_size=VOCAB, max_position_embeddings=24, dim=16, n_layers=2, n_heads=2, hidden_dim=32
            )
        ),
        _text,
    ),
    "electra": (
        tf.AutoModelForSequenceClassification,
        lambda: tf.ElectraForSequenceClassification(tf.ElectraConfig(**TEXT, embedding_size=8)),
        _text,
    ),
    "mpnet": (
        tf.AutoModelForSequenceClassification,
        lambda: tf.MPNetForSequenceClassification(tf.MPNetConfig(**TEXT)),
        _text,
    ),
    "modernbert": (
        tf.AutoModelForSequenceClassification,
        lambda: tf.ModernBertForSequenceClassification(
            tf.ModernBertConfig(**TEXT, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
        ),
        _text,
    ),
    "vit": (
        tf.AutoModelForImageClassification,
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**SMALL, image_size=8, patch_size=4)),
        _image,
    ),
    "gpt2": (
        tf.AutoModelForCausalLM,
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=VOCAB, n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
            )
        ),
        _text,
    ),
    "llama": (
        tf.AutoModelForCausalLM,
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, num_key_value_heads=1, tie_word_embeddings=True)),
        _text,
    ),
    "t5": (
        tf.AutoModelForSeq2SeqLM,
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(
                vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
            )
        ),
        _seq2seq,
    ),
}


def make(family: str, seed: int = 0) -> Any:
    """A tiny model in eval mode with random weights, biases and norms."""
    torch.manual_seed(seed)
    model = FAMILIES[family][1]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def auto_class(family: str) -> Any:
    """The Auto class that loads a family."""
    return FAMILIES[family][0]


def inputs(family: str) -> dict[str, Tensor]:
    """Two samples for a family."""
    return FAMILIES[family][2]()


def outputs(model: Any, family: str) -> Tensor:
    """Logits of the two samples, in eval mode, without gradients."""
    with torch.no_grad():
        return model.eval()(**inputs(family)).logits


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Check that two runs agree up to the order of sums, which changes with the address of a weight in memory."""
    scale = 1e-5 if expected.dtype in (torch.float32, torch.float64) else 2e-2
    torch.testing.assert_close(found, expected, rtol=scale, atol=scale)


def prune(model: Any, block_shape: BlockShape = (4, 1), density: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
    """Set random blocks of the default targets to zero and give the masks."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, module in find_targets(model).items():
        weight = weight_view(module).detach()
        masks[name] = torch.rand(grid_shape(tuple(weight.shape), block_shape), generator=generator) < density
        scale_blocks_(weight, masks[name], block_shape)
    return masks


def pruned(family: str, block_shape: BlockShape = (4, 1), density: float = 0.3) -> tuple[Any, dict[str, Tensor]]:
    """A tiny model with zero blocks, and its masks."""
    model = make(family)
    return model, prune(model, block_shape, density)


def file_bytes(folder: Path) -> int:
    """Size of the weights of a saved model."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

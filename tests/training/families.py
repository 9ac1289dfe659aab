"""One tiny model per family: how to make it, a batch for it, and what its layers hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

from tests.training.tiny import SMALL, VOCAB, pad, rows, stirred

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
        experts: fused experts of each layer, by the name of their parameter inside it.
    """

    make: Callable[[], Any]
    stacks: dict[str, tuple[str, ...]]
    task: str
    outside: tuple[str, ...]
    layers: int = 2
    experts: tuple[str, ...] = ()


def _bert_like(attention: str = "attention.self") -> tuple[str, ...]:
    names = [f"{attention}.{name}" for name in ("query", "key", "value")]
    return (*names, "attention.output.dense", "intermediate.dense", "output.dense")


def _layer(*names: str, attention: str = "self_attn", attentions: int = 1) -> tuple[str, ...]:
    # As BART, Llama and their many relatives name them.
    found = [f"{a}.{n}" for a in (attention, "encoder_attn")[:attentions] for n in ("k_proj", "v_proj", "q_proj")]
    found += [f"{a}.out_proj" for a in (attention, "encoder_attn")[:attentions]]
    return (*found, *names)


_LLAMA = (*(f"self_attn.{n}_proj" for n in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_BART_LIKE = {
    "model.encoder.layers": _layer("fc1", "fc2"), "model.decoder.layers": _layer("fc1", "fc2", attentions=2)
}  # fmt: skip
_BART_SIZES = {"vocab_size": VOCAB, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
               "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
               "decoder_ffn_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
               "decoder_start_token_id": 2}  # fmt: skip
_T5_SELF = tuple(f"layer.0.SelfAttention.{name}" for name in "qkvo")
_T5_CROSS = tuple(f"layer.1.EncDecAttention.{name}" for name in "qkvo")

FAMILIES = {
    "bert": Family(
        make=lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT, **SMALL, **POSITIONS, num_labels=3)),
        stacks={"bert.encoder.layer": _bert_like()}, task="classes", outside=("bert.pooler.dense", "classifier"),
    ),
    "xlm-roberta": Family(
        make=lambda: tf.XLMRobertaForTokenClassification(
            tf.XLMRobertaConfig(**TEXT, **SMALL, **POSITIONS, num_labels=3)
        ),
        stacks={"roberta.encoder.layer": _bert_like()}, task="tagging", outside=("classifier",),
    ),
    "deberta-v3": Family(
        make=lambda: tf.DebertaV2ForSequenceClassification(
            tf.DebertaV2Config(**TEXT, **SMALL, **POSITIONS, num_labels=3, relative_attention=True, position_buckets=4,
                               pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", share_att_key=True,
                               position_biased_input=False, type_vocab_size=0)
        ),
        stacks={"deberta.encoder.layer": (
            *(f"attention.self.{n}_proj" for n in ("query", "key", "value")), "attention.output.dense",
            "intermediate.dense", "output.dense")},
        task="classes", outside=("pooler.dense", "classifier"),
    ),
    "albert": Family(
        # One layer that runs twice: pruned once, and one place to graft.
        make=lambda: tf.AlbertForSequenceClassification(
            tf.AlbertConfig(**TEXT, **SMALL, **POSITIONS, embedding_size=8, num_labels=3)
        ),
        stacks={"albert.encoder.albert_layer_groups": tuple(
            f"albert_layers.0.{n}" for n in (
                "attention.query", "attention.key", "attention.value", "attention.dense", "ffn", "ffn_output"))},
        task="classes", layers=1,
        outside=("albert.encoder.embedding_hidden_mapping_in", "albert.pooler", "classifier"),
    ),
    "bart": Family(
        make=lambda: tf.BartForConditionalGeneration(
            tf.BartConfig(**_BART_SIZES, **POSITIONS, forced_eos_token_id=2)
        ),
        stacks=_BART_LIKE, task="seq2seq", outside=("lm_head",),
    ),
    "whisper": Family(
        make=lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(**_BART_SIZES, num_mel_bins=8, max_source_positions=10, max_target_positions=20,
                             suppress_tokens=None, begin_suppress_tokens=None)
        ),
        stacks=_BART_LIKE, task="mel", outside=("proj_out",),
    ),
    "wav2vec2": Family(
        make=lambda: tf.Wav2Vec2ForCTC(
            tf.Wav2Vec2Config(**TEXT, **SMALL, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3),
                              num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,
                              mask_time_prob=0.0, layerdrop=0.0, ctc_loss_reduction="mean")
        ),
        stacks={"wav2vec2.encoder.layers": _layer(
            "feed_forward.intermediate_dense", "feed_forward.output_dense", attention="attention")},
        task="audio", outside=("wav2vec2.feature_projection.projection", "lm_head"),
    ),
    "clip": Family(
        make=lambda: tf.CLIPModel(tf.CLIPConfig(
            text_config={"vocab_size": VOCAB, **SMALL, "max_position_embeddings": 16, "projection_dim": 8,
                         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
            vision_config={**SMALL, "image_size": 8, "patch_size": 4, "num_channels": 1, "projection_dim": 8},
            projection_dim=8)),
        stacks={f"{side}_model.encoder.layers": _layer("mlp.fc1", "mlp.fc2") for side in ("text", "vision")},
        task="image and text", outside=("visual_projection", "text_projection"),
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
        stacks={"model.layers": _LLAMA}, task="lm", outside=("lm_head",),
    ),
    "qwen3": Family(
        # Heads that are wider together than the hidden size, as the released ones are.
        make=lambda: tf.Qwen3ForCausalLM(
            tf.Qwen3Config(**TEXT, **SMALL, **POSITIONS, num_key_value_heads=1, head_dim=16)
        ),
        stacks={"model.layers": _LLAMA}, task="lm", outside=("lm_head",),
    ),
    "gemma3": Family(
        # A window that the samples outgrow: one layer of each kind, handed a mask of its own.
        make=lambda: tf.Gemma3ForCausalLM(
            tf.Gemma3TextConfig(**TEXT, **SMALL, **POSITIONS, num_key_value_heads=1, head_dim=8, sliding_window=4,
                                layer_types=["sliding_attention", "full_attention"])
        ),
        stacks={"model.layers": _LLAMA}, task="lm", outside=("lm_head",),
    ),
    "mixtral": Family(
        make=lambda: tf.MixtralForCausalLM(
            tf.MixtralConfig(**TEXT, **SMALL, **POSITIONS, num_key_value_heads=1, num_local_experts=4,
                             num_experts_per_tok=2)
        ),
        # The experts are parameters [experts, rows, columns] without linears.
        stacks={"model.layers": _LLAMA[:4]}, task="lm", outside=("lm_head",),
        experts=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
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
    task = FAMILIES[name].task
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if task == "images":
        return [{"pixel_values": noise(1, 8, 8), "labels": i % 3} for i in range(count)]
    if task == "mel":
        text = rows("seq2seq", count)
        return [{"input_features": noise(8, 20), "labels": row["labels"]} for row in text]
    if task == "audio":
        return [{"input_values": noise(120), "labels": [1 + i % 3, 2, 5 + i]} for i in range(count)]
    if task == "image and text":
        # The model reads its text embedding where it finds the token that ends the text.
        text = rows("mlm", count)
        return [
            {"input_ids": [*row["input_ids"], 2], "attention_mask": [*row["attention_mask"], 1],
             "pixel_values": noise(1, 8, 8)}
            for row in text
        ]  # fmt: skip
    return rows(task, count)


def family_batch(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate samples of any family."""
    dense = {
        key: torch.stack([sample[key] for sample in samples])
        for key, value in samples[0].items()
        if isinstance(value, torch.Tensor)
    }
    others = [{key: value for key, value in sample.items() if key not in dense} for sample in samples]
    if "input_ids" in others[0]:
        found: dict[str, Any] = {**pad(others), **dense}
        return {**found, "return_loss": True} if dense else found
    labels = [sample["labels"] for sample in others]
    if isinstance(labels[0], list):
        longest = max(map(len, labels))
        labels = [row + [-100] * (longest - len(row)) for row in labels]
    return {**dense, "labels": torch.tensor(labels)}

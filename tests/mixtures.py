"""Tiny mixtures of experts, made in memory: one per way in which transformers lays out their layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

from tests.training.tiny import SMALL, VOCAB, stirred

_SIZES = {"vocab_size": VOCAB, **SMALL, "max_position_embeddings": 40, "pad_token_id": 0}
_DEEPSEEK = {"moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
             "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
             "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 2}  # fmt: skip

MIXTURES: dict[str, Callable[..., Any]] = {
    "mixtral": lambda **changes: tf.MixtralForCausalLM(
        tf.MixtralConfig(**{**_SIZES, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2,
                            **changes})
    ),
    # More experts than are chosen, narrow ones, beside a norm of queries and keys.
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**_SIZES, num_key_value_heads=1, head_dim=8, num_experts=6, num_experts_per_tok=2,
                          moe_intermediate_size=8)
    ),
    # A first layer without experts, and one expert that all tokens share, which is made of linears.
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**_SIZES, **_DEEPSEEK)),
}  # fmt: skip

# {model: {parameter of one layer: (E, O, I)}}, and in which layers.
EXPERTS = {
    "mixtral": ({"gate_up_proj": (4, 64, 16), "down_proj": (4, 16, 32)}, (0, 1)),
    "qwen3_moe": ({"gate_up_proj": (6, 16, 16), "down_proj": (6, 16, 8)}, (0, 1)),
    "deepseek_v3": ({"gate_up_proj": (4, 16, 16), "down_proj": (4, 16, 8)}, (1,)),
}


def mixture(name: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny mixture in eval mode; `changes` go to the config of Mixtral."""
    torch.manual_seed(seed)
    return stirred(MIXTURES[name](**changes)).eval()


def expert_shapes(name: str) -> dict[str, tuple[int, int, int]]:
    """{qualified name of each fused parameter: (E, O, I)}, in the model's own order."""
    parts, layers = EXPERTS[name]
    return {f"model.layers.{i}.mlp.experts.{part}": shape for i in layers for part, shape in parts.items()}


def gpt_oss() -> Any:
    """A mixture whose experts are laid out [E, I, O]."""
    torch.manual_seed(0)
    return stirred(
        tf.GptOssForCausalLM(
            tf.GptOssConfig(**_SIZES, num_key_value_heads=1, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
        )
    )


def batch() -> dict[str, torch.Tensor]:
    """Two rows of tokens."""
    ids = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: Any) -> torch.Tensor:
    """What a model makes of `batch`, in eval mode."""
    with torch.no_grad():
        return model.eval()(**batch()).logits

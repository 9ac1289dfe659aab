"""Where a layer keeps what can be cut off it for good: the units of its feed-forward part and its attention heads.

Layers are known by the class that transformers gives them and never by structure alone: one that looks alike and
computes something else between its linears (a norm, say) must not be cut.

Shape letters: O, I out and in features of a linear; U units; H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn


class CropError(ValueError):
    """A model cannot be cropped; the message says what was found and what is known."""


@dataclass(frozen=True)
class FeedForward:
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)).

    Attributes:
        size: field of the config that holds the number of units.
        up, down: the linears, by name inside the layer.
        activation: what is between them.
        gate: the linear that goes through the activation in place of `up`; None where there is none.
    """

    size: str
    up: str
    down: str
    activation: str
    gate: str | None = None


@dataclass(frozen=True)
class Heads:
    """Attention whose code tells the number of heads from the sizes of its linears.

    Heads that share keys and values stay together: what can go is a group of them, one head of keys and values.

    Attributes:
        query, key, value, output: the linears, by name inside the layer.
        attention: the module that knows the size of a head.
        size: its attribute that does.
        counts: its attributes that hold the number of heads, and that times their size, for whoever reads them.
        fields: fields of the config for the number of query heads and of groups, where it also has one for the size of
            a head; empty where the config cannot say that there are fewer heads.
    """

    query: str
    key: str
    value: str
    output: str
    attention: str
    size: str = "attention_head_size"
    counts: tuple[str | None, str | None] = (None, None)
    fields: tuple[str, ...] = ()


_BERT = FeedForward("intermediate_size", "intermediate.dense", "output.dense", "intermediate.intermediate_act_fn")
_GATED = FeedForward("intermediate_size", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn", "mlp.gate_proj")
_BERT_HEADS = Heads(
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "attention.self", counts=("num_attention_heads", "all_head_size"),
)  # fmt: skip
_DISTILBERT_HEADS = Heads(
    "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "attention", counts=("n_heads", None)
)
_GROUPED_HEADS = Heads(
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn", "head_dim",
    fields=("num_attention_heads", "num_key_value_heads"),
)  # fmt: skip
_GATED_LAYERS = (
    "LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "Gemma2DecoderLayer",
    "Gemma3DecoderLayer",
)  # fmt: skip


def _t5(block: int) -> tuple[FeedForward, ...]:
    inside = f"layer.{block}.DenseReluDense"
    return (
        FeedForward("d_ff", f"{inside}.wi", f"{inside}.wo", f"{inside}.act"),
        FeedForward("d_ff", f"{inside}.wi_1", f"{inside}.wo", f"{inside}.act", f"{inside}.wi_0"),
    )


# {class of the layer: the forms that its feed-forward part has or had in versions of transformers}
FEED_FORWARD: dict[str, tuple[FeedForward, ...]] = {
    **dict.fromkeys(
        ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer", "ElectraLayer", "MPNetLayer",
         "DebertaV2Layer"),
        (_BERT,),
    ),
    "ViTLayer": (FeedForward("intermediate_size", "mlp.fc1", "mlp.fc2", "mlp.activation_fn"), _BERT),
    "TransformerBlock": (FeedForward("hidden_dim", "ffn.lin1", "ffn.lin2", "ffn.activation"),),
    "GPT2Block": (FeedForward("n_inner", "mlp.c_fc", "mlp.c_proj", "mlp.act"),),
    **dict.fromkeys(_GATED_LAYERS, (_GATED,)),
    "T5Block": (*_t5(1), *_t5(2)),
    **dict.fromkeys(
        ("BartEncoderLayer", "WhisperEncoderLayer"), (FeedForward("encoder_ffn_dim", "fc1", "fc2", "activation_fn"),)
    ),
    **dict.fromkeys(
        ("BartDecoderLayer", "WhisperDecoderLayer"), (FeedForward("decoder_ffn_dim", "fc1", "fc2", "activation_fn"),)
    ),
}  # fmt: skip

HEADS: dict[str, Heads] = {
    **dict.fromkeys(("BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer", "ElectraLayer"), _BERT_HEADS),
    "TransformerBlock": _DISTILBERT_HEADS,
    **dict.fromkeys(_GATED_LAYERS, _GROUPED_HEADS),
}


@dataclass(frozen=True, eq=False)
class CroppableLayer:
    """A layer of a model, and what is known of its inside.

    Attributes:
        name: of the layer in the model.
        module: the layer.
        feed_forward: where its units are.
        heads: where its heads are; None where the number of heads cannot change.
    """

    name: str
    module: nn.Module
    feed_forward: FeedForward
    heads: Heads | None

    def get(self, name: str) -> Any:
        """Give a part of the layer by its name inside it."""
        return attrgetter(name)(self.module)


def croppable_layers(model: nn.Module) -> list[CroppableLayer]:
    """Find the layers that can be cropped, in the model's own order.

    Raises:
        CropError: if the model has none, or one that is not put together as its class always was.
    """
    layers = [_known(name, module) for name, module in model.named_modules() if _family(module)]
    if not layers:
        raise CropError(
            f"{type(model).__name__} has no layer of a class that can be cropped. Known are "
            f"{', '.join(sorted(FEED_FORWARD))}, all of transformers."
        )
    return layers


def _family(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ in FEED_FORWARD and kind.__module__.startswith("transformers.models.")


def _known(name: str, module: nn.Module) -> CroppableLayer:
    kind = type(module).__name__
    for form in FEED_FORWARD[kind]:
        if all(_has(module, part) for part in _parts(form)):
            return CroppableLayer(name, module, form, HEADS.get(kind))
    raise CropError(
        f"{name} is a {kind} without {FEED_FORWARD[kind][0].up}: this version of transformers builds it in a way that "
        f"is not known here."
    )


def _parts(form: FeedForward) -> Iterator[str]:
    yield from (form.up, form.down, form.activation)
    if form.gate:
        yield form.gate


def _has(module: nn.Module, name: str) -> bool:
    try:
        attrgetter(name)(module)
    except AttributeError:
        return False
    return True

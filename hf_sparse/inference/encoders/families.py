"""Encoders that the fused kernels know: where their layers keep queries, keys, norms, and what else they compute.

A family is named by the classes of transformers, not by structure: a layer that looks alike and computes something
else (norms first, relative positions) must not be taken for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from hf_sparse.core.structure.targets import is_linear
from hf_sparse.inference.kernels.encoder import HEAD_FEATURES, EncoderShape, LayerParts, LinearParts
from hf_sparse.inference.layers.linear import BlockSparseLinear

# Classes of activation modules in transformers and torch, as the kernels call what they compute.
_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "ReLU": "relu",
}
_ACTIVATION_MODULES = ("transformers.activations", "torch.nn.modules.activation")
_SIMPLE = (BlockSparseLinear, nn.Linear, nn.LayerNorm, nn.Dropout, nn.ModuleList)


class UnsupportedError(ValueError):
    """The fused kernels do not compute this encoder; the message says why."""


@dataclass(frozen=True)
class Family:
    """How the layers of one kind of encoder are put together.

    Attributes:
        models: folders of `transformers.models` whose encoders are of this kind.
        encoders: endings of the class names of those encoders; all their layers are in `encoder.layer`.
        linears: where a layer has query, key, value, output, up, down.
        norms: where it has the norm after attention and the one at the end.
        activation: where it has what is between up and down.
        heads: where it has the number of heads.
        output: name of the class in `transformers.modeling_outputs` that the encoder gives.
        tuples: whether it gives a tuple instead unless `return_dict` is set.
        attends: whether the attention is chosen by the config; otherwise it is always the eager one.
        position_bias: whether scores get a bias from relative positions, the same in all layers.
    """

    models: tuple[str, ...]
    encoders: tuple[str, ...]
    linears: tuple[str, ...]
    norms: tuple[str, str]
    activation: str
    heads: str
    output: str
    tuples: bool = False
    attends: bool = True
    position_bias: bool = False


FAMILIES = (
    Family(
        models=("bert", "roberta", "xlm_roberta", "camembert", "electra"),
        encoders=("BertEncoder", "RobertaEncoder", "CamembertEncoder", "ElectraEncoder"),
        linears=(
            *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
            *("intermediate.dense", "output.dense"),
        ),
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        activation="intermediate.intermediate_act_fn",
        heads="attention.self.num_attention_heads",
        output="BaseModelOutputWithPastAndCrossAttentions",
    ),
    Family(
        models=("distilbert",),
        encoders=("Transformer",),
        linears=(
            *("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
            *("ffn.lin1", "ffn.lin2"),
        ),
        norms=("sa_layer_norm", "output_layer_norm"),
        activation="ffn.activation",
        heads="attention.n_heads",
        output="BaseModelOutput",
    ),
    Family(
        models=("mpnet",),
        encoders=("MPNetEncoder",),
        linears=(
            *("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"),
            *("intermediate.dense", "output.dense"),
        ),
        norms=("attention.LayerNorm", "output.LayerNorm"),
        activation="intermediate.intermediate_act_fn",
        heads="attention.attn.num_attention_heads",
        output="BaseModelOutput",
        tuples=True,
        attends=False,
        position_bias=True,
    ),
)


def find_family(encoder_class: type) -> Family | None:
    """Give the family of an encoder class, None for any other class, however much it looks like one."""
    module, name = encoder_class.__module__, encoder_class.__name__
    for family in FAMILIES:
        if name.endswith(family.encoders) and any(
            module == f"transformers.models.{model}.modeling_{model}" for model in family.models
        ):
            return family
    return None


def read_encoder(encoder: Any, family: Family) -> tuple[list[LayerParts], EncoderShape]:
    """Take an encoder apart for the kernels.

    Args:
        encoder: an encoder of that family, with plain and compressed linears.
        family: what `find_family` gave for its class.

    Returns:
        Its layers, and what they share.

    Raises:
        UnsupportedError: if anything in it is not what the kernels compute.
    """
    layers = list(encoder.layer)
    if not layers:
        raise UnsupportedError("it has no layers")
    config = _config(encoder)
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedError("it is a decoder")
    position = getattr(config, "position_embedding_type", "absolute")
    if position != "absolute":
        raise UnsupportedError(f"its position embeddings are of type {position!r}")
    layer_class = type(layers[0])
    for layer in layers:
        if type(layer) is not layer_class:
            raise UnsupportedError("its layers are of several classes")
        _check_classes(layer)
    shapes = {_shape(layer, family) for layer in layers}
    if len(shapes) > 1:
        raise UnsupportedError("its layers have different heads, activations or norms")
    return [_read_layer(layer, family) for layer in layers], shapes.pop()


def attention_of(encoder: Any, family: Family) -> str | None:
    """Name the attention function that the config of an encoder asks for."""
    return getattr(_config(encoder), "_attn_implementation", None) if family.attends else "eager"


def _config(encoder: Any) -> Any:
    return encoder.config if hasattr(encoder, "config") else getattr(encoder.layer[0].attention, "config", None)


def _activation(module: Any) -> str | None:
    kind = type(module)
    return _ACTIVATIONS.get(kind.__name__) if kind.__module__ in _ACTIVATION_MODULES else None


def _check_classes(layer: nn.Module) -> None:
    for name, module in layer.named_modules():
        own = type(module).__module__ == type(layer).__module__
        if not (own or type(module) in _SIMPLE or _activation(module)):
            raise UnsupportedError(f"{name} is a {type(module).__name__}")


def _shape(layer: nn.Module, family: Family) -> EncoderShape:
    module = attrgetter(family.activation)(layer)
    activation = _activation(module)
    if activation is None:
        raise UnsupportedError(f"its activation is {module!r}")
    heads = int(attrgetter(family.heads)(layer))
    attention: Any = attrgetter(family.heads.rpartition(".")[0])(layer)
    query: Any = attrgetter(family.linears[0])(layer)
    size, left = divmod(query.out_features, heads)
    if left or size % HEAD_FEATURES:
        raise UnsupportedError(f"{heads} heads share {query.out_features} features: not a multiple of {HEAD_FEATURES}")
    scaling = getattr(attention, "scaling", size**-0.5)
    if attention.attention_head_size != size or scaling != size**-0.5 or getattr(attention, "is_causal", False):
        raise UnsupportedError("its attention was changed: heads of another size, another scaling, or causal")
    first, last = (attrgetter(name)(layer) for name in family.norms)
    return EncoderShape(heads=heads, head_size=size, eps=(float(first.eps), float(last.eps)), activation=activation)


def _read_layer(layer: nn.Module, family: Family) -> LayerParts:
    linears = tuple(_read_linear(attrgetter(name)(layer), name) for name in family.linears)
    return LayerParts(linears, tuple(_read_norms(attrgetter(n)(layer) for n in family.norms)))


def _read_linear(module: Any, name: str) -> LinearParts:
    bias: Any = getattr(module, "bias", None)
    if isinstance(module, BlockSparseLinear):
        return LinearParts(module.weight.detach(), module.index(), bias)
    if not is_linear(module) or not isinstance(module, nn.Linear):
        raise UnsupportedError(f"{name} is a {type(module).__name__}")
    return LinearParts.from_dense(module.weight, bias)


def _read_norms(norms: Iterable[Any]) -> Iterable[Tensor]:
    for norm in norms:
        if len(norm.normalized_shape) != 1 or norm.weight is None or norm.bias is None:
            raise UnsupportedError("a LayerNorm has no gain or no shift")
        yield norm.weight
        yield norm.bias

"""Fused encoders inside whole models: the same numbers, used where they may be, out of the way where they must."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sparse.inference.compress import compress, decompress
from hf_sparse.inference.encoders import fused as encoders
from hf_sparse.inference.encoders.fused import FusedEncoder, fuse, fused_encoders, unfuse
from hf_sparse.inference.kernels import library
from hf_sparse.inference.kernels.encoder import NativeEncoder
from tests.inference.models import prune

pytestmark = pytest.mark.skipif(library.load_library().handle is None, reason="no native kernels")

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
TEXT = {"vocab_size": 60, "max_position_embeddings": 260}
# Values are a few units large; two layers of float32 sums in another order.
CLOSE = 1e-4


def _bert(**changes: Any) -> tf.BertConfig:
    return tf.BertConfig(**{**TEXT, **SIZES, **changes})


FAMILIES: dict[str, Callable[[], Any]] = {
    "bert": _bert,
    "roberta": lambda: tf.RobertaConfig(**TEXT, **SIZES),
    "xlm-roberta": lambda: tf.XLMRobertaConfig(**TEXT, **SIZES),
    "camembert": lambda: tf.CamembertConfig(**TEXT, **SIZES),
    "electra": lambda: tf.ElectraConfig(**TEXT, **SIZES, embedding_size=32),
    "distilbert": lambda: tf.DistilBertConfig(**TEXT, dim=64, hidden_dim=96, n_layers=2, n_heads=4),
    "mpnet": lambda: tf.MPNetConfig(**TEXT, **SIZES),
}


def make(config: Any, auto: Any = tf.AutoModel, block: tuple[int, int] = (8, 2)) -> Any:
    """A compressed model in eval mode, with weights that make every layer count."""
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return compress(model, prune(model, block, density=0.5))


def plain(model: Any) -> Any:
    """The same model with plain linears."""
    return decompress(copy.deepcopy(model))


def ids(batch: int = 2, length: int = 20) -> Tensor:
    return torch.randint(5, 60, (batch, length), generator=torch.Generator().manual_seed(1))


def hidden(model: Any, x: Tensor | None = None, **kwargs: Any) -> Tensor:
    return model(ids() if x is None else x, **kwargs)[0]


def inner(model: Any) -> Any:
    """The encoder of a model, fused or not."""
    return model.transformer if hasattr(model, "transformer") else model.encoder


@pytest.fixture(autouse=True)
def _auto_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_SPARSE_BACKEND", raising=False)
    monkeypatch.delenv("HF_SPARSE_ENCODER", raising=False)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every result of the native encoder."""
    results: list[int] = []
    run = NativeEncoder.run

    def counted(*args: Any) -> Tensor:
        y = run(*args)
        results.append(1)
        return y

    monkeypatch.setattr(NativeEncoder, "run", counted)
    return results


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=CLOSE, atol=CLOSE)


def paddings(batch: int, length: int) -> dict[str, Tensor | None]:
    whole = torch.ones(batch, length, dtype=torch.int64)
    right, left, one = whole.clone(), whole.clone(), torch.zeros_like(whole)
    for i in range(batch):
        right[i, length - i * length // (batch + 1) :] = 0
        left[i, : i * length // (batch + 1)] = 0
        one[i, i % length] = 1
    return {"none": None, "whole": whole, "right": right, "left": left, "one": one, "bool": right.bool()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_as_the_plain_model(family: str, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and hidden states, of padding too, for every kind of padding."""
    model = make(FAMILIES[family](), tf.AutoModelForSequenceClassification)
    dense = plain(model)
    assert isinstance(inner(model.base_model), FusedEncoder)
    for batch, length in ((1, 1), (1, 5), (2, 17), (3, 50), (2, 200)):
        x = ids(batch, length)
        for padding in paddings(batch, length).values():
            with torch.inference_mode():
                runs.clear()
                logits, states = model(x, attention_mask=padding).logits, model.base_model(x, attention_mask=padding)
                assert len(runs) == 2
                assert type(states) is type(dense.base_model(x))
                same(logits, dense(x, attention_mask=padding).logits)
                same(states[0], dense.base_model(x, attention_mask=padding)[0])
    with torch.no_grad():
        fused = model(x, attention_mask=padding).logits
        monkeypatch.setenv("HF_SPARSE_ENCODER", "off")
        runs.clear()
        same(fused, model(x, attention_mask=padding).logits)
        assert not runs


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading(family: str, tmp_path: Path, runs: list[int]) -> None:
    auto = tf.AutoModelForSequenceClassification
    model = make(FAMILIES[family](), auto)
    unfused = unfuse(copy.deepcopy(model))
    assert list(model.state_dict()) == list(unfused.state_dict())
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert set(fused_encoders(loaded).values()) == set(fused_encoders(model).values())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False), loaded]
    with torch.inference_mode():
        wanted = model(ids()).logits
        for other in copies:
            runs.clear()
            # The head is torch's, whose sums change with the address of a weight.
            torch.testing.assert_close(other(ids()).logits, wanted, rtol=1e-5, atol=1e-5)
            assert runs


def test_blocks_of_every_shape(runs: list[int]) -> None:
    for block in ((1, 1), (2, 1), (4, 1), (16, 16), (32, 32), (1, 8)):
        model = make(_bert(), block=block)
        with torch.inference_mode():
            same(hidden(model), hidden(plain(model)))
    assert len(runs) == 6


def test_bfloat16(runs: list[int]) -> None:
    model = make(_bert())
    with torch.inference_mode():
        wanted = hidden(model)
        model.to(torch.bfloat16)
        runs.clear()
        found = hidden(model)
        assert runs and found.dtype == torch.bfloat16
        # Two layers of values up to 4 whose terms are rounded to 8 bits, here and there.
        assert float((found.float() - wanted).abs().mean()) < 0.02


def test_activations(runs: list[int]) -> None:
    for name, fused in (("gelu", 1), ("gelu_new", 1), ("gelu_pytorch_tanh", 1), ("silu", 1), ("relu", 1), ("tanh", 0)):
        model = make(_bert(hidden_act=name))
        runs.clear()
        with torch.inference_mode():
            same(hidden(model), hidden(plain(model)))
        assert len(runs) == fused, name


# What is done to a model, and how it is called: {name: (change, call, whether the kernels run)}. Each is compared with
# the plain model treated alike.
Change = Callable[[Any], Any]
CAUSAL = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
SEEN = (torch.arange(20) < 15)[None, None, None].expand(2, 1, 20, 20)


def layer(model: Any, number: int = 0) -> Any:
    return model.encoder.layer[number]


def _nothing(_: Any) -> None:
    pass


def _shape_attention(model: Any) -> None:
    """As if half of the heads had been cut off, without telling the number of heads."""
    for one in model.encoder.layer:
        for name in ("query", "key", "value"):
            setattr(one.attention.self, name, nn.Linear(64, 32).eval())
        one.attention.output.dense = nn.Linear(32, 64).eval()
    with torch.no_grad():
        for one in model.encoder.layer:
            for linear in (*one.attention.self.children(), one.attention.output.dense):
                if isinstance(linear, nn.Linear):
                    linear.weight.copy_(torch.linspace(-0.4, 0.4, linear.weight.numel()).sin().view_as(linear.weight))
                    linear.bias.zero_()


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class ReLU(nn.Module):
    """Not what its name says."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


class Adapter(nn.Module):
    """What an adapter library puts in the place of a linear."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x.mean()


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return (query + value).transpose(1, 2).contiguous(), None


def _own_attention(model: Any) -> None:
    tf.AttentionInterface.register("own", _attention)
    model.set_attn_implementation("own")


def _replace(name: str, module: Callable[[Any], nn.Module]) -> Change:
    def change(model: Any) -> None:
        parent, _, child = name.rpartition(".")
        owner = layer(model).get_submodule(parent)
        setattr(owner, child, module(getattr(owner, child)))

    return change


def _doubled(_: Any, __: Any, out: Any) -> None:
    out.last_hidden_state = out.last_hidden_state * 2


def _hooked(model: Any) -> None:
    layer(model).attention.register_forward_hook(lambda m, args, out: (out[0] * 2, *out[1:]))


def _written(model: Any) -> None:
    with torch.no_grad():
        layer(model).output.LayerNorm.weight.mul_(2)


def _data_written(model: Any) -> None:
    for parameter in layer(model, 1).output.parameters():
        parameter.data.mul_(1.5)
    model.train().eval()


CHANGES: dict[str, tuple[Change, Callable[[Any], Tensor], bool]] = {
    "layers cut off": (lambda m: setattr(m.encoder, "layer", m.encoder.layer[:1]), hidden, True),
    "a layer deleted": (lambda m: m.encoder.layer.__delitem__(0), hidden, True),
    "layers in another order": (lambda m: setattr(m.encoder, "layer", m.encoder.layer[::-1]), hidden, True),
    "no layers": (lambda m: setattr(m.encoder, "layer", m.encoder.layer[:0]), hidden, False),
    "written in place": (_written, hidden, True),
    "written through data": (_data_written, hidden, True),
    "a parameter replaced": (
        lambda m: setattr(layer(m).output.LayerNorm, "bias", nn.Parameter(torch.ones(64))),
        hidden,
        True,
    ),
    "eps": (lambda m: (setattr(layer(m).output.LayerNorm, "eps", 0.3), m.train().eval()), hidden, False),
    "hook": (_hooked, hidden, False),
    "hook before": (lambda m: layer(m).register_forward_pre_hook(lambda m, a: (a[0] * 2, *a[1:])), hidden, False),
    "hook of the encoder": (lambda m: m.encoder.register_forward_hook(_doubled), hidden, True),
    "forward replaced": (lambda m: setattr(layer(m).output, "forward", lambda h, x: x + h.mean()), hidden, False),
    "adapter": (_replace("attention.self.query", Adapter), hidden, False),
    "norm replaced": (_replace("output.LayerNorm", lambda _: Doubled()), hidden, False),
    "activation replaced": (_replace("intermediate.intermediate_act_fn", lambda _: ReLU()), hidden, False),
    "plain linear": (_replace("output.dense", lambda _: _seeded_linear()), hidden, True),
    "heads cut off": (_shape_attention, hidden, False),
    "scaling": (lambda m: (setattr(layer(m).attention.self, "scaling", 0.5), m.train().eval()), hidden, False),
    "causal attention": (
        lambda m: (setattr(layer(m).attention.self, "is_causal", True), m.train().eval()),
        hidden,
        False,
    ),
    "own attention": (_own_attention, hidden, False),
    "eager attention": (lambda m: m.set_attn_implementation("eager"), hidden, True),
    "parametrized": (
        lambda m: parametrize.register_parametrization(layer(m).output.LayerNorm, "bias", Doubled()),
        hidden,
        False,
    ),
    "float64": (lambda m: m.double(), hidden, False),
    "output_hidden_states": (_nothing, lambda m: m(ids(), output_hidden_states=True).hidden_states[1], False),
    "config.output_hidden_states": (
        lambda m: setattr(m.config, "output_hidden_states", True),
        lambda m: m(ids(), output_hidden_states=True).hidden_states[1],
        False,
    ),
    "after output_hidden_states": (lambda m: m(ids(), output_hidden_states=True), hidden, True),
    "output_attentions": (
        lambda m: m.set_attn_implementation("eager"),
        lambda m: m(ids(), output_attentions=True).attentions[1],
        False,
    ),
    "return_dict=False": (_nothing, lambda m: m(ids(), return_dict=False)[0], True),
    "causal mask": (_nothing, lambda m: hidden(m, attention_mask=CAUSAL), False),
    "square mask": (_nothing, lambda m: hidden(m, attention_mask=SEEN), True),
    "square mask, eager": (
        lambda m: m.set_attn_implementation("eager"),
        lambda m: hidden(m, attention_mask=SEEN),
        False,
    ),
    "square mask of several heads": (_nothing, lambda m: hidden(m, attention_mask=SEEN.expand(2, 4, 20, 20)), False),
    "a sequence without tokens": (
        _nothing,
        lambda m: hidden(m, attention_mask=torch.tensor([[0], [1]]).expand(2, 20)),
        False,
    ),
    "strides": (_nothing, lambda m: m.encoder(_wave().transpose(0, 2).contiguous().transpose(0, 2))[0], True),
    "expanded": (_nothing, lambda m: m.encoder(_wave()[:, :1].expand(2, 9, 64))[0], True),
    "the default device": (lambda m: m.eval(), lambda m: _on_meta(m), True),
    "autocast": (_nothing, lambda m: _autocast(m), False),
    "functional_call": (_nothing, lambda m: _functional(m), True),
}


def _seeded_linear() -> nn.Linear:
    linear = nn.Linear(96, 64).eval()
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(0, 9, 96 * 64).sin().view(64, 96) * 0.3)
        linear.bias.zero_()
    return linear


def _wave() -> Tensor:
    return torch.linspace(0, 99, 2 * 9 * 64).sin().view(2, 9, 64)


def _on_meta(model: Any) -> Tensor:
    mask = (torch.arange(9) < 5).expand(2, 1, 1, 9)
    x = _wave()
    with torch.device("meta"):
        return model.encoder(x, mask)[0]


def _autocast(model: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        # Rounding to 8 bits hides what is compared here; that the kernels did not run is asserted by the caller.
        return hidden(model).isfinite().float()


def _functional(model: Any) -> Tensor:
    bias = {"encoder.layer.1.output.LayerNorm.bias": torch.ones(64)}
    return torch.func.functional_call(model, bias, (ids(),))[0]


@pytest.mark.parametrize("name", CHANGES)
def test_used_where_it_may_be_and_never_wrong(name: str, runs: list[int]) -> None:
    """The change comes after a call, and before any."""
    change, call, fused = CHANGES[name]
    for warm in (True, False):
        model = make(_bert())
        dense = plain(model)
        with torch.no_grad():
            if warm:
                hidden(model)
            change(model)
            change(dense)
            runs.clear()
            found = call(model)
            assert bool(runs) == fused
            same(found, call(dense))


def test_masks_that_are_added(runs: list[int]) -> None:
    """Of every size that broadcasts, and finite ones too."""
    model = make(_bert())
    dense = plain(model)
    keys = torch.zeros(2, 1, 1, 20)
    keys[0, ..., 13:] = torch.finfo(torch.float32).min
    keys[1, ..., 3] = -1.5
    with torch.no_grad():
        for mask in (
            keys,
            keys.expand(2, 1, 20, 20),
            keys.expand(2, 1, 20, 20).clone(),
            keys[:1],
            keys.bfloat16().float(),
        ):
            same(hidden(model, attention_mask=mask), hidden(dense, attention_mask=mask))
        assert len(runs) == 5
        poisoned = keys.clone()
        poisoned[0, ..., 2] = torch.nan
        found, wanted = (hidden(m, attention_mask=poisoned) for m in (model, dense))
        assert torch.equal(found.isnan(), wanted.isnan()) and bool(found[0].isnan().all())
        same(found[1], wanted[1])


def test_position_bias_follows_lengths_and_weights() -> None:
    model = make(FAMILIES["mpnet"]())
    dense = plain(model)
    with torch.inference_mode():
        for length in (5, 40, 9, 200, 9):
            same(hidden(model, ids(2, length)), hidden(dense, ids(2, length)))
    with torch.no_grad():
        for one in (model, dense):
            one.encoder.relative_attention_bias.weight.mul_(-3)
        same(hidden(model), hidden(dense))


@pytest.mark.parametrize("family", FAMILIES)
def test_encoders_called_directly_give_the_same_types(family: str) -> None:
    model = make(FAMILIES[family]())
    one, other = inner(model), inner(plain(model))
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        for kwargs in ({}, {"return_dict": True}, {"return_dict": False}, {"return_dict": None}):
            found, wanted = one(x, None, **kwargs), other(x, None, **kwargs)
            assert type(found) is type(wanted) and len(found) == len(wanted)
            same(found[0], wanted[0])


def test_gradients(runs: list[int]) -> None:
    """It steps aside where anything wants a gradient, and gradients are those of the plain model."""
    model = make(_bert())
    dense = plain(model)
    hidden(model).sum().backward()
    hidden(dense).sum().backward()
    assert not runs
    same(layer(model).output.LayerNorm.weight.grad, layer(dense).output.LayerNorm.weight.grad)
    same(layer(model).output.dense.bias.grad, layer(dense).output.dense.bias.grad)
    model.requires_grad_(False)
    hidden(model)
    assert len(runs) == 1
    x = torch.randn(2, 9, 64)
    for where in ("x", "mask"):
        grads = []
        for one in (model, dense.requires_grad_(False)):
            own = x.clone().requires_grad_(where == "x")
            mask = torch.zeros(2, 1, 1, 9, requires_grad=where == "mask")
            wanted = own if where == "x" else mask
            grads += torch.autograd.grad(one.encoder(own, mask)[0].square().sum(), wanted)
        same(grads[0], grads[1])
    assert len(runs) == 1
    with torch.no_grad(), forward_ad.dual_level():
        model.encoder(forward_ad.make_dual(x, x))
    assert len(runs) == 1


def test_training_mode(runs: list[int]) -> None:
    model = make(_bert())
    with torch.no_grad():
        for module in (model, model.encoder, layer(model), layer(model, 1).output.dropout):
            module.train()
            hidden(model)
            assert not runs
            model.eval()
        hidden(model)
        assert len(runs) == 1


def test_a_step_of_training(runs: list[int]) -> None:
    model = make(_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    dense = plain(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with torch.no_grad():
        before = hidden(model)
    model.train()
    hidden(model).square().sum().backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        runs.clear()
        after = hidden(model)
        assert runs
        same(after, hidden(plain(model)))
        assert float((after - before).abs().max()) > 0.01
        model.load_state_dict(compress_like(dense, model))
        same(hidden(model), before)


def compress_like(dense: Any, model: Any) -> dict[str, Tensor]:
    """The state of the dense model, compressed with the masks of the other."""
    masks = {n: m.block_mask() for n, m in model.named_modules() if hasattr(m, "block_mask")}
    return compress(copy.deepcopy(dense), masks).state_dict()


def test_the_bitmap_may_change(runs: list[int]) -> None:
    model = make(_bert())
    dense_layer = layer(model).output.dense
    with torch.no_grad():
        before = hidden(model)
        dense_layer.weight_block_mask.copy_(dense_layer.weight_block_mask.flip(0))
        after = hidden(model)
        same(after, hidden(plain(model)))
    assert len(runs) == 2 and float((after - before).abs().max()) > 0.01


def test_tracers_see_torch(runs: list[int]) -> None:
    model = make(_bert()).requires_grad_(False)
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        wanted = model.encoder(x)[0]
        runs.clear()
        traced = torch.jit.trace(_Only(model.encoder), (x,), check_trace=False)
        same(traced(x), wanted)
        with _Watch() as watch:
            model.encoder(x)
        assert torch.ops.aten.native_layer_norm.default in watch.seen
    assert not runs


def test_compile_and_export(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(_bert(num_hidden_layers=1))
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        wanted = model.encoder(x)[0]
        runs.clear()
        # A compiled graph takes what the linears have prepared, which a fused call leaves to be done.
        monkeypatch.setenv("HF_SPARSE_ENCODER", "off")
        model.encoder(x)
        monkeypatch.delenv("HF_SPARSE_ENCODER")
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: model.encoder(x)[0], backend="eager", fullgraph=True)
        same(compiled(x), wanted)
        exported = torch.export.export(_Only(model.encoder), (x,), strict=False)
        same(exported.module()(x), wanted)
    assert not runs


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


class _Only(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)[0]


def test_fake_tensors_and_the_meta_device(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = make(_bert())
    with torch.no_grad():
        monkeypatch.setenv("HF_SPARSE_ENCODER", "off")
        hidden(model)  # reads the bitmaps, whose values a fake tensor cannot have
        monkeypatch.delenv("HF_SPARSE_ENCODER")
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert hidden(model, mode.from_tensor(ids())).shape == (2, 20, 64)
        model.to("meta")
        assert "not all float32" in fused_encoders(model)["encoder"]
    assert not runs


@pytest.mark.parametrize("name", ["dense", "torch", "reference"])
def test_a_forced_backend_is_obeyed(name: str, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(_bert())
    with torch.no_grad():
        wanted = hidden(model)
        monkeypatch.setenv("HF_SPARSE_BACKEND", name)
        runs.clear()
        same(hidden(model), wanted)
        assert not runs
        assert fused_encoders(model) == {"encoder": "not fused: the environment forbids it"}
        monkeypatch.setenv("HF_SPARSE_BACKEND", "cpu")
        hidden(model)
    assert len(runs) == 1


def test_the_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(_bert())
    monkeypatch.setenv("HF_SPARSE_ENCODER", "yes")
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="HF_SPARSE_ENCODER='yes' is not a choice: use one of auto, off"),
    ):
        hidden(model)


def test_decoders_are_left_alone(runs: list[int]) -> None:
    for changes in ({"is_decoder": True}, {"is_decoder": True, "add_cross_attention": True}):
        model = make(_bert(**changes))
        states = torch.randn(2, 6, 64)
        dense = plain(model)
        with torch.no_grad():
            same(hidden(model), hidden(dense))
            if "add_cross_attention" in changes:
                same(hidden(model, encoder_hidden_states=states), hidden(dense, encoder_hidden_states=states))
        assert fused_encoders(model) == {"encoder": "not fused: it is a decoder"}
    assert not runs


def test_what_is_told() -> None:
    model = make(_bert())
    assert fused_encoders(model)["encoder"].startswith("fused: ")
    assert "kernels, 2 layers" in fused_encoders(model)["encoder"]
    assert fused_encoders(plain(model)) == {"encoder": "not fused: it has no compressed layers"}
    assert fused_encoders(nn.Linear(2, 2)) == {}
    told = {
        "not fused: 16 heads share 64 features: not a multiple of 8": _bert(num_attention_heads=16),
        "not fused: intermediate.intermediate_act_fn is a Tanh": _bert(hidden_act="tanh"),
    }
    for text, config in told.items():
        assert fused_encoders(make(config)) == {"encoder": text}
    model.double()
    assert "not all float32" in fused_encoders(model)["encoder"]


def test_fusing_and_unfusing() -> None:
    model = make(_bert())
    kind = type(model.encoder)
    assert kind.__name__ == "FusedBertEncoder" and kind.__mro__[1:3] == (FusedEncoder, *kind.__bases__[1:])
    assert type(fuse(model).encoder) is kind
    assert encoders.FusedBertEncoder is kind
    keys = list(model.state_dict())
    with torch.no_grad():
        wanted = hidden(model)
        assert type(unfuse(model).encoder).__name__ == "BertEncoder"
        assert "_ready" not in model.encoder.__dict__
        assert fused_encoders(model) == {"encoder": "not fused: fuse was not called"}
        same(hidden(model), wanted)
    assert list(model.state_dict()) == keys
    assert type(decompress(fuse(model)).encoder).__name__ == "BertEncoder"
    with pytest.raises(AttributeError, match="FusedNothing"):
        _ = encoders.FusedNothing


def test_replicas_of_data_parallel() -> None:
    model = make(_bert())
    model.requires_grad_(False)
    with torch.no_grad():
        wanted = hidden(model)
        replica = model.encoder._replicate_for_data_parallel()
        found = replica(model.embeddings(ids()))[0]
    same(found, wanted)


def test_several_python_threads() -> None:
    """One model, inputs of several lengths at once; the relative positions of one must not reach another."""
    model = make(FAMILIES["mpnet"]())
    dense = plain(model)
    inputs = [ids(batch, length) for batch, length in ((1, 5), (2, 9), (1, 40), (3, 17))]
    with torch.no_grad():
        wanted = [hidden(dense, x) for x in inputs]
    worst: list[float] = []

    def work(first: int) -> None:
        with torch.no_grad():
            for i in range(40):
                which = (first + i) % len(inputs)
                worst.append(float((hidden(model, inputs[which]) - wanted[which]).abs().max()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 160 and max(worst) < CLOSE


def test_the_position_bias_of_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread, with another length, puts its own in the place of the one that was just made."""
    model = make(FAMILIES["mpnet"]())
    with torch.no_grad():
        wanted = hidden(plain(model), ids(1, 9))
        hidden(model, ids(1, 5))
        other = model.encoder._ready.position_bias
        kept = property(lambda _: other, lambda *_: None)
        monkeypatch.setattr(encoders.Ready, "position_bias", kept, raising=False)
        same(hidden(model, ids(1, 9)), wanted)


def test_memory_does_not_grow() -> None:
    model = make(FAMILIES["mpnet"]())
    page = 4096

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    with torch.inference_mode():
        for _ in range(20):
            for length in (150, 30):
                hidden(model, ids(2, length))
        before = resident()
        for _ in range(100):
            for length in (150, 30):
                hidden(model, ids(2, length))
        # A leak of one result per call would be 200 times 46 kB on average: 9 MB.
        assert resident() - before < 3e6

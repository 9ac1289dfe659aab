"""Which linears are pruned: found from the structure of ten families of models, and of made-up ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_sparse.core.structure.targets import (
    assign_block_shapes,
    compile_pattern,
    find_stacks,
    find_targets,
    grad_view,
    is_conv1d,
    is_linear,
    weight_view,
)
from hf_sparse.training.distillation.graft import graft_sites
from tests.training.families import FAMILIES, family_model
from tests.training.tiny import SMALL, VOCAB


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_targets_are_exactly_the_linears_inside_the_layers(name: str) -> None:
    family, model = FAMILIES[name], family_model(name)
    targets = find_targets(model)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    assert set(family.outside) <= linears, "the linears outside the layers are there to be left alone"
    experts = {n for n, _ in model.named_parameters() if n.endswith(family.experts)} if family.experts else set()
    assert len(experts) == family.layers * len(family.experts)
    assert set(targets) == (linears - set(family.outside)) | experts
    if family.stacks:
        inside = [f"{s}.{i}.{n}" for s, names in family.stacks.items() for i in range(family.layers) for n in names]
        assert sorted(set(targets) - experts) == sorted(inside)
        assert list(find_stacks(model)) == list(family.stacks)
    found = [n for n in targets if n not in experts]
    assert found == [n for n, _ in model.named_modules() if n in targets], "in the model's own order"
    assert all(targets[n] is model.get_submodule(n) for n in found)
    assert all(targets[n].weight is model.get_parameter(n) for n in experts)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_layer_is_a_graft_site(name: str) -> None:
    student, teacher = family_model(name, 0), family_model(name, 1)
    sites = graft_sites(student, teacher)
    stacks = list(find_stacks(student).values())
    assert [(site.stack, site.index) for site in sites] == [(stack, i) for stack in stacks for i in range(len(stack))]
    for site in sites:
        assert type(site.stack[site.index]) is type(site.teacher_layer)
        assert site.teacher_layer in list(teacher.modules())


@pytest.mark.parametrize(
    ("head", "outside"),
    [
        ("Model", ["pooler.dense"]),
        ("ForMaskedLM", ["cls.predictions.transform.dense", "cls.predictions.decoder"]),
        ("ForTokenClassification", ["classifier"]),
        ("ForQuestionAnswering", ["qa_outputs"]),
        ("ForMultipleChoice", ["bert.pooler.dense", "classifier"]),
        ("ForPreTraining", ["bert.pooler.dense", "cls.predictions.transform.dense", "cls.seq_relationship"]),
        ("LMHeadModel", ["cls.predictions.transform.dense"]),
    ],
)
def test_the_head_makes_no_difference(head: str, outside: list[str]) -> None:
    config = tf.BertConfig(vocab_size=VOCAB, is_decoder=head == "LMHeadModel", **SMALL)
    model = getattr(tf, f"Bert{head}")(config)
    assert set(outside) <= {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    targets = find_targets(model)
    assert len(targets) == 12
    assert not set(outside) & set(targets)


def test_a_single_layer_is_a_stack() -> None:
    config = tf.BertConfig(vocab_size=VOCAB, **{**SMALL, "num_hidden_layers": 1})
    assert len(find_targets(tf.BertModel(config))) == 6


class Tower(nn.Module):
    """Layers and things around them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))
        self.mixed = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)])
        self.bare = nn.ModuleList(nn.Sequential(nn.LayerNorm(4)) for _ in range(2))
        self.empty = nn.ModuleList()


def test_lists_that_are_no_stacks() -> None:
    assert list(find_stacks(Tower())) == ["layers"]
    assert list(find_targets(Tower())) == ["layers.0.0", "layers.0.2", "layers.1.0", "layers.1.2"]


def test_a_list_inside_a_layer_belongs_to_it() -> None:
    experts = [
        nn.ModuleDict({"experts": nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))}) for _ in "ab"
    ]
    model = nn.ModuleDict({"layers": nn.ModuleList(experts)})
    assert list(find_stacks(model)) == ["layers"]
    assert len(find_targets(model)) == 4


def test_subclasses_of_linear_are_left_alone() -> None:
    class Other(nn.Linear):
        pass

    assert not is_linear(Other(2, 2))
    layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), Other(4, 4)) for _ in range(2))
    assert list(find_targets(nn.ModuleDict({"layers": layers}))) == ["layers.0.0", "layers.1.0"]


def falcon() -> tf.FalconForCausalLM:
    return tf.FalconForCausalLM(
        tf.FalconConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    )


def test_layers_of_subclasses_are_named() -> None:
    message = (
        r"linears inside transformer\.h of FalconForCausalLM are subclasses of nn\.Linear, such as "
        r"transformer\.h\.0\.self_attention\.query_key_value, a FalconLinear.* outside are lm_head: target_modules"
    )
    with pytest.raises(ValueError, match=message):
        find_targets(falcon())
    with pytest.raises(ValueError, match=r"linears inside h of FalconModel .* a FalconLinear\..* in their places\.$"):
        find_targets(falcon().transformer)


def test_linears_with_one_output_are_no_targets_unless_they_are_asked_for() -> None:
    config = tf.Qwen2MoeConfig(
        vocab_size=VOCAB, **SMALL, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    model = tf.Qwen2MoeForCausalLM(config)
    gates = [name for name, _ in model.named_modules() if name.endswith("shared_expert_gate")]
    assert len(gates) == 2
    targets = find_targets(model)
    assert not set(gates) & set(targets) and "model.layers.0.mlp.shared_expert.up_proj" in targets
    assert assign_block_shapes(targets, (8, 1))
    assert list(find_targets(model, r".*shared_expert_gate")) == gates
    only = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.Linear(4, 1)) for _ in range(2))})
    with pytest.raises(ValueError, match=r"no linear layer .* pruned inside layers: .* or have a single row"):
        find_targets(only)


def test_conv1d_is_read_output_rows_first() -> None:
    conv, linear = Conv1D(6, 4), nn.Linear(4, 6)
    assert is_conv1d(conv)
    assert is_linear(conv)
    assert not is_conv1d(linear)
    assert weight_view(conv).shape == weight_view(linear).shape == (6, 4)
    assert grad_view(conv) is None
    conv(torch.ones(1, 4)).sum().backward()
    grad = grad_view(conv)
    assert grad is not None
    assert grad.shape == (6, 4)
    assert grad.data_ptr() == conv.weight.grad.data_ptr()
    with torch.no_grad():
        weight_view(conv)[5, 3] = 7.0
    assert conv.weight[3, 5] == 7.0


class Conv1DOfSomebodyElse(nn.Module):
    pass


def test_another_conv1d_is_no_linear() -> None:
    assert not is_linear(nn.Conv1d(2, 2, 1))
    Conv1DOfSomebodyElse.__name__ = "Conv1D"
    assert not is_linear(Conv1DOfSomebodyElse())


def test_tied_layers_are_left_out_by_default_and_refused_when_asked_for() -> None:
    model = Tower()
    model.layers[1][0].weight = model.layers[0][0].weight
    assert list(find_targets(model)) == ["layers.0.2", "layers.1.2"]
    with pytest.raises(ValueError, match=r"picks layers\.0\.0, layers\.1\.0, whose weight is shared"):
        find_targets(model, r"layers\..*")
    assert list(find_targets(model, r"layers\..*", r".*\.0")) == ["layers.0.2", "layers.1.2"]


def test_a_layer_that_is_one_module_twice_is_shared() -> None:
    block = nn.Sequential(nn.Linear(4, 4))
    model = nn.ModuleDict({"layers": nn.ModuleList([block, block])})
    assert list(find_targets(model)) == ["layers.0.0"], "one module, one weight, one mask"


def test_ties_that_are_only_declared_count() -> None:
    model = Tower()
    model.all_tied_weights_keys = {"layers.0.0.weight": "embed.weight"}
    assert "layers.0.0" not in find_targets(model)


def test_patterns_match_whole_names() -> None:
    assert list(find_targets(Tower(), r"layers\.\d\.0")) == ["layers.0.0", "layers.1.0"]
    assert list(find_targets(Tower(), r"embed|heads\.1")) == ["embed", "heads.1"]
    assert list(find_targets(Tower(), None, r"layers\.0\..*")) == ["layers.1.0", "layers.1.2"]


@pytest.mark.parametrize(
    ("model", "patterns", "message"),
    [
        (Tower, ("layers",), r"target_modules='layers' matches none of the 10 linear layers .* are embed, layers"),
        (Tower, (None, "embed"), r"exclude_modules='embed' matches none of the 4 target layers"),
        (Tower, (None, ".*"), r"exclude_modules='\.\*' leaves no layer to prune"),
        (Tower, ("*",), r"target_modules='\*' is not a regular expression: nothing to repeat"),
        (Tower, (None, "["), r"exclude_modules='\[' is not a regular expression"),
        (lambda: nn.Linear(2, 2), (), r"Linear has no nn\.ModuleList of repeated layers.*target_modules"),
        (lambda: nn.ReLU(), (), r"ReLU has no nn\.Linear or Conv1D layer.*decompress"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_by_name(model: Any, patterns: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_targets(model(), *patterns)


def test_every_target_gets_its_shape() -> None:
    targets = {"q": nn.Linear(8, 4), "k": nn.Linear(8, 4), "c": Conv1D(8, 4)}
    assert assign_block_shapes(targets, (-1, 2)) == {"q": (4, 2), "k": (4, 2), "c": (8, 2)}
    shapes = assign_block_shapes(targets, (2, 2), {"q": (1, -1), "q|c": (1, -1)})
    assert shapes == {"q": (1, 8), "k": (2, 2), "c": (1, 4)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"x": (1, 1)}, r"block_overrides pattern 'x' matches none of the 2 target layers .* first are q, k"),
        ({"q": (1, 1), ".": (2, 1)}, r"block_overrides give q more than one shape"),
        ({"k": (3, 1)}, r"k: block_height=3 does not divide the 4 output rows .* in block_overrides, or leave it out"),
        ({"k": (3,)}, r"k: block_shape=\(3,\) is no block shape.*dimension\.$"),
        ({"k": (1, 3)}, r"k: block_width=3 does not divide the 8 input columns"),
        ({"(": (1, 1)}, r"block_overrides='\(' is not a regular expression"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(overrides: dict[str, tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assign_block_shapes({"q": nn.Linear(8, 4), "k": nn.Linear(8, 4)}, (2, 2), overrides)


def test_compile_pattern_gives_a_pattern() -> None:
    assert compile_pattern("target_modules", "a+").fullmatch("aa")

"""Feed-forward parts are found from the shapes of linears outside attention, in every family."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_sparse.core.structure.feed_forward import FeedForward, find_feed_forwards, unit_overrides
from hf_sparse.core.structure.targets import assign_block_shapes, find_targets
from tests.training.families import FAMILIES, family_model

PARTS = {
    "bert": (("intermediate.dense",), "output.dense"),
    "distilbert": (("ffn.lin1",), "ffn.lin2"),
    "modernbert": (("mlp.Wi",), "mlp.Wo"),
    "gpt2": (("mlp.c_fc",), "mlp.c_proj"),
    "llama": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
}


@pytest.mark.parametrize("name", sorted(PARTS))
def test_parts_of_known_families(name: str) -> None:
    (stack,), (into, out) = FAMILIES[name].stacks, PARTS[name]
    model = family_model(name)
    width = 64 if name == "gpt2" else 32
    expected = [
        FeedForward(into=tuple(f"{stack}.{i}.{n}" for n in into), out=f"{stack}.{i}.{out}", units=width)
        for i in range(2)
    ]
    assert find_feed_forwards(model, find_targets(model)) == expected


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_layer_of_every_family_has_one_and_no_attention_is_in_it(name: str) -> None:
    model = family_model(name)
    targets = find_targets(model)
    if name == "mixtral":
        with pytest.raises(ValueError, match="found no feed-forward part in MixtralForCausalLM"):
            find_feed_forwards(model, targets)
        return
    parts = find_feed_forwards(model, targets)
    layers = FAMILIES[name].layers * max(len(FAMILIES[name].stacks), 1)
    assert len(parts) == len({part.out for part in parts}) == layers
    shapes = assign_block_shapes(targets, (4, 4), unit_overrides(parts))
    for part in parts:
        assert shapes[part.out] == (targets[part.out].weight.numel() // part.units, 1)
        for into in part.into:
            assert shapes[into][0] == 1
            assert shapes[into][1] == shapes[part.out][0]
    inside = {member for part in parts for member in (*part.into, part.out)}
    assert all(shape == (4, 4) for name, shape in shapes.items() if name not in inside)
    assert not any("attn" in name.lower() or "attention" in name.lower() for name in inside)


def test_wide_heads_are_no_feed_forward_part() -> None:
    # Heads that are wider together than the hidden size have the shapes of a feed-forward part.
    class WideAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.o = nn.Linear(4, 16), nn.Linear(16, 4)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.up, self.down = WideAttention(), nn.Linear(4, 8), nn.Linear(8, 4)

    model = nn.Sequential(nn.ModuleList([Layer()]))
    assert find_feed_forwards(model, find_targets(model)) == [FeedForward(into=("0.0.up",), out="0.0.down", units=8)]


def test_what_does_not_fit_is_refused() -> None:
    square = nn.Sequential(nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))]))
    with pytest.raises(ValueError, match=r'feed_forward="units" found no feed-forward part in Sequential: no two of '):
        find_feed_forwards(square, find_targets(square))
    two = nn.Sequential(nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(8, 4))]))
    with pytest.raises(ValueError, match=r"cannot tell which linear 0.0.0 belongs to: \['0.0.1', '0.0.2'\] fit it"):
        find_feed_forwards(two, find_targets(two))


def test_a_part_without_its_way_out_is_left_to_the_uniform_blocks() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(2))
    model = nn.Sequential(layers)
    parts = find_feed_forwards(model, find_targets(model, exclude_modules="0.0.1"))
    assert [part.out for part in parts] == ["0.1.1"]

"""A mask on a layer counts for as long as the weight is what the mask says."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_sparse.core.bits import Bitmap
from hf_sparse.core.structure.carried import carried_mask, follows_mask
from hf_sparse.core.structure.experts import ExpertsWeight

MASK = Bitmap(torch.tensor([[True, False, True, False], [False, True, True, True]]))


def pruned() -> nn.Linear:
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        linear.weight[:2, [1, 3]] = 0.0
        linear.weight[2:, 0] = 0.0
    return linear


def test_a_layer_carries_what_was_put_on_it() -> None:
    linear = pruned()
    assert carried_mask(linear) is None
    linear.block_mask = MASK
    assert carried_mask(linear) is MASK
    experts = nn.Module()
    experts.weights = nn.Parameter(torch.ones(2, 2, 4))
    weight = ExpertsWeight(experts, "weights")
    assert carried_mask(weight) is None
    weight.block_mask = MASK
    assert carried_mask(ExpertsWeight(experts, "weights")) is MASK


def test_one_weight_in_a_pruned_block_is_enough() -> None:
    linear = pruned()
    assert follows_mask(linear, MASK)
    with torch.no_grad():
        linear.weight[0, 0] = 0.0
    assert follows_mask(linear, MASK), "a zero in a kept block is no contradiction"
    for value in (1e-30, float("nan")):
        changed = pruned()
        with torch.no_grad():
            changed.weight[1, 3] = value
        assert not follows_mask(changed, MASK)


def test_a_grid_of_another_weight() -> None:
    assert not follows_mask(nn.Linear(4, 3), MASK)
    assert not follows_mask(nn.Linear(6, 4), MASK)


class Sharded(Tensor):
    """A weight like those of FSDP2, to look at which all ranks have to come."""

    def to_local(self) -> Tensor:
        raise AssertionError("one rank alone has looked at a weight of all")


def test_weights_that_cannot_be_looked_at_are_trusted() -> None:
    assert follows_mask(nn.Linear(4, 4, device="meta"), MASK)
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.ones(4, 4).as_subclass(Sharded))
    assert follows_mask(linear, MASK)

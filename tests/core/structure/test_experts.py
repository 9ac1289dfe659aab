"""Fused experts as weights to prune: found by what their module says of itself, seen as one weight [E * O, I]."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_sparse import report
from hf_sparse.core.estimate import estimate
from hf_sparse.core.structure.experts import ExpertsWeight, experts_of, experts_parts
from hf_sparse.core.structure.targets import assign_block_shapes, find_targets, grad_view, tiled_shape, weight_view
from tests.mixtures import MIXTURES, expert_shapes, gpt_oss, mixture


class Experts(nn.Module):
    """Fused experts as transformers' classes describe themselves."""

    def __init__(self, transposed: bool | None = False, experts: int = 3) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 8, 4))
        self.scale = nn.Parameter(torch.randn(3, 8))
        self.num_experts = experts
        if transposed is not None:
            self.is_transposed = transposed


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_targets_beside_the_linears_in_the_models_order(name: str) -> None:
    model = mixture(name)
    targets = find_targets(model)
    experts = {n: tuple(t.weight.shape) for n, t in targets.items() if isinstance(t, ExpertsWeight)}
    assert experts == expert_shapes(name)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    assert set(targets) == linears | set(experts)
    order = [n.removesuffix(".weight") for n, _ in model.named_parameters()]
    # A module's own parameters come before those of the modules in it; of two layers, the first comes first.
    assert [n for n in targets if n in experts] == [n for n in order if n in experts]


def test_patterns_match_the_name_of_the_parameter() -> None:
    model = mixture("mixtral")
    down = [n for n in expert_shapes("mixtral") if n.endswith("down_proj")]
    assert list(find_targets(model, r".*experts\.down_proj")) == down
    assert not set(find_targets(model, exclude_modules=r".*experts\..*")) & set(expert_shapes("mixtral"))
    with pytest.raises(ValueError, match=r"target_modules='.*experts' matches none of the 13 linear layers"):
        find_targets(model, r".*\.experts")


def test_the_view_holds_all_rows_and_shares_memory() -> None:
    module = Experts()
    ((name, target),) = experts_of("mlp", module)
    assert (name, target.experts, tiled_shape(target)) == ("mlp.up_proj", 3, (8, 4))
    assert grad_view(target) is None
    module.up_proj.grad = torch.ones_like(module.up_proj)
    view, grad = weight_view(target), grad_view(target)
    assert view.shape == (24, 4)
    assert grad is not None
    with torch.no_grad():
        view[8 * 2 + 5, 3], grad[8 + 1, 2] = 7.0, 5.0
    assert module.up_proj[2, 5, 3].item() == 7.0
    assert module.up_proj.grad[1, 1, 2].item() == 5.0


@pytest.mark.parametrize(
    "module",
    [Experts(True), Experts(None), Experts(experts=8), nn.Linear(4, 4), nn.Conv1d(3, 8, 4)],
    ids=["transposed", "says nothing", "another number", "linear", "convolution"],
)
def test_what_may_be_laid_out_otherwise_is_left_alone(module: nn.Module) -> None:
    assert experts_parts(module) == []


def test_blocks_tile_one_expert() -> None:
    targets = {"up": ExpertsWeight(Experts(), "up_proj"), "q": nn.Linear(4, 24)}
    assert assign_block_shapes(targets, (-1, 2)) == {"up": (8, 2), "q": (24, 2)}
    assert assign_block_shapes({"q": targets["q"]}, (12, 1)) == {"q": (12, 1)}
    with pytest.raises(ValueError, match=r"up: block_height=12 does not divide the 8 output rows .* shape \(8, 4\)"):
        assign_block_shapes(targets, (12, 1))


@pytest.mark.parametrize("name", MIXTURES)
def test_estimate_and_report_count_them(name: str) -> None:
    model = mixture(name)
    promised = estimate(model, (4, 1), 0.75)
    shapes = {layer.name: layer for layer in promised.layers}
    for full, (experts, rows, cols) in expert_shapes(name).items():
        assert shapes[full].shape == (experts * rows, cols)
        assert shapes[full].total_blocks == experts * rows // 4 * cols
        assert shapes[full].sparsity == pytest.approx(0.75, abs=1 / shapes[full].total_blocks)
    assert promised.not_pruned == ()
    told = report(model)
    assert {layer.name for layer in told.layers} == set(shapes)
    assert told.dense_bytes == promised.dense_bytes == sum(t.numel() * 4 for t in model.state_dict().values())
    assert told.not_pruned == ()


def test_experts_laid_out_the_other_way_stay_dense() -> None:
    model: Any = gpt_oss()
    assert not any(isinstance(target, ExpertsWeight) for target in find_targets(model).values())
    assert [kind.name for kind in report(model).not_pruned] == [
        "model.layers.*.mlp.experts.gate_up_proj",
        "model.layers.*.mlp.experts.down_proj",
    ]

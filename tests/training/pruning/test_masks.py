"""Contract 5, the masks alone: budgets met within one block, pruned blocks zero and never back."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_sparse import BlockMasks
from hf_sparse.core import bits
from hf_sparse.core.blocks import expand_mask
from tests.training.tiny import bert


def linears(**sizes: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(size[1], size[0]) for name, size in sizes.items()}


def removed(masks: BlockMasks) -> dict[str, int]:
    return {name: int((~mask).sum()) for name, mask in masks.masks.items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.1, 1 / 3, 0.5, 0.77, 0.95, 0.999])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5), (-1, 1), (1, -1)])
def test_layer_budgets_are_met_within_one_block(sparsity: float, shape: tuple[int, int]) -> None:
    masks = BlockMasks(linears(a=(21, 15), b=(9, 35)), shape)
    masks.choose(sparsity)
    for name, count in removed(masks).items():
        assert abs(count - sparsity * masks.masks[name].numel()) <= 0.5 + 1e-9
    assert masks.off_target(sparsity) is None


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.1, 1 / 3, 0.5, 0.77, 0.95])
def test_the_global_budget_is_met_within_one_block(sparsity: float) -> None:
    targets = linears(a=(20, 16), b=(12, 32), c=(7, 3))
    masks = BlockMasks(targets, {"a": (4, 1), "b": (1, 16), "c": (7, 3)}, scope="global")
    masks.choose(sparsity)
    total = 20 * 16 + 12 * 32 + 21
    gone = sum(
        count * h * w for (h, w), count in zip(masks.block_shapes.values(), removed(masks).values(), strict=True)
    )
    assert abs(gone - sparsity * total) <= 21
    assert masks.sparsity == pytest.approx(gone / total)
    assert masks.off_target(sparsity) is None


def test_the_smallest_blocks_go_first() -> None:
    targets = linears(a=(8, 6))
    masks = BlockMasks(targets, (4, 1))
    masks.choose(0.5)
    norms = targets["a"].weight.detach().reshape(2, 4, 6).square().sum(1).sqrt()
    cut = sorted(norms.flatten().tolist())[6]
    assert torch.equal(masks.masks["a"], norms >= cut)


def test_global_scope_compares_the_weights_of_blocks_of_different_size() -> None:
    targets = linears(a=(4, 4), b=(4, 4))
    with torch.no_grad():
        targets["a"].weight.fill_(1.0)
        targets["b"].weight.fill_(1.1)
    # As sums, a whole 4 x 4 block of ones outweighs every single weight of 1.1.
    masks = BlockMasks(targets, {"a": (4, 4), "b": (1, 1)}, scope="global")
    masks.choose(0.5)
    assert removed(masks) == {"a": 1, "b": 0}


def uneven() -> dict[str, nn.Linear]:
    """Two weights of 40 and 60 blocks (4, 1), the first of which is a hundredth of the second everywhere."""
    targets = linears(a=(8, 20), b=(12, 20))
    with torch.no_grad():
        for module, size in zip(targets.values(), (0.01, 1.0), strict=True):
            module.weight.uniform_(size, 2 * size)
    return targets


@pytest.mark.parametrize(("share", "kept"), [(0.0, (0, 20)), (0.25, (2, 18)), (0.5, (4, 16)), (1.0, (8, 12))])
def test_a_share_of_a_global_budget_is_filled_inside_each_weight(share: float, kept: tuple[int, int]) -> None:
    targets = uneven()
    masks = BlockMasks(targets, (4, 1), "global", share)
    for sparsity in (0.3, 0.6, 0.8):
        masks.choose(sparsity)
    assert tuple(int(mask.sum()) for mask in masks.masks.values()) == kept
    assert masks.off_target(0.8) is None
    # The best of each are what is left.
    norms = masks.norms()["a"].flatten()
    assert not kept[0] or norms[masks.masks["a"].flatten()].min() > norms[~masks.masks["a"].flatten()].max()


def test_a_share_of_one_is_a_budget_for_each_weight() -> None:
    targets = linears(a=(20, 16), b=(12, 32), c=(8, 4))
    shared, alone = BlockMasks(targets, (4, 1), "global", 1.0), BlockMasks(targets, (4, 1))
    for masks in (shared, alone):
        masks.choose(0.75)
    assert all(torch.equal(alone.masks[name], mask) for name, mask in shared.masks.items())


def test_a_budget_without_targets_is_met() -> None:
    masks = BlockMasks({}, (4, 1), "global")
    masks.check_budgets(0.5)
    masks.choose(0.5)
    assert masks.off_target(0.5) is None


def test_the_share_of_one_update_may_be_another() -> None:
    masks = BlockMasks(uneven(), (4, 1), "global", 0.0)
    masks.choose(0.4, share=1.0)
    assert removed(masks) == {"a": 16, "b": 24}


def test_no_weight_is_spared_either() -> None:
    targets = uneven()
    free, shared = BlockMasks(targets, (4, 1), "global"), BlockMasks(targets, (4, 1), "global", 0.25)
    for masks in (free, shared):
        masks.choose(0.4)
    assert removed(free) == {"a": 40, "b": 0}
    # A quarter of the 24 that a budget of its own would take.
    assert removed(shared) == {"a": 34, "b": 6}


def test_a_share_holds_with_blocks_of_different_size() -> None:
    masks = BlockMasks(uneven(), {"a": (4, 1), "b": (4, 4)}, "global", 0.5)
    masks.choose(0.8)
    assert int(masks.masks["a"].sum()) == 4
    assert masks.off_target(0.8) is None


def test_many_updates_of_small_weights_end_on_target() -> None:
    targets = linears(**{f"layer{number}": (4, 3) for number in range(9)}, wide=(4, 40))
    masks = BlockMasks(targets, (4, 1), "global", 0.25)
    for number in range(1, 60):
        masks.choose(number / 100)
        assert masks.off_target(number / 100) is None
        assert all(bool(mask.any()) for mask in masks.masks.values())


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruned_blocks_never_come_back(scope: str) -> None:
    targets = linears(a=(24, 16), b=(16, 24))
    masks, previous = BlockMasks(targets, (4, 2), scope), None
    for sparsity in (0.1, 0.25, 0.5, 0.8, 0.9):
        masks.choose(sparsity)
        masks.apply_()
        if previous is not None:
            assert all((masks.masks[name] <= mask).all() for name, mask in previous.items())
        previous = masks.state_dict()
        with torch.no_grad():
            for module in targets.values():
                module.weight.normal_()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_lower_sparsity_brings_nothing_back(scope: str) -> None:
    masks = BlockMasks(linears(a=(24, 16)), (4, 2), scope)
    masks.choose(0.5)
    before = masks.state_dict()
    masks.choose(0.25)
    assert torch.equal(masks.masks["a"], before["a"])


def test_ties_break_by_position() -> None:
    targets = linears(a=(4, 8))
    nn.init.ones_(targets["a"].weight)
    masks = BlockMasks(targets, (4, 1))
    masks.choose(0.5)
    assert masks.masks["a"].tolist() == [[False] * 4 + [True] * 4]


@pytest.mark.parametrize("conv", [False, True])
def test_apply_zeroes_pruned_blocks_and_nothing_else(conv: bool) -> None:
    module = Conv1D(6, 8) if conv else nn.Linear(8, 6)
    masks = BlockMasks({"a": module}, (3, 2))
    masks.choose(0.5)
    before = module.weight.detach().clone()
    module.weight.grad = torch.ones_like(module.weight)
    masks.apply_()
    masks.apply_to_grads_()
    dense = expand_mask(masks.masks["a"], (3, 2))
    dense = dense.t() if conv else dense
    assert torch.equal(module.weight.detach(), before * dense)
    assert torch.equal(module.weight.grad, dense.float())
    assert masks.is_applied()
    with torch.no_grad():
        module.weight.add_(1e-30)
    assert not masks.is_applied()


def test_given_scores_decide() -> None:
    masks = BlockMasks(linears(a=(2, 4)), (2, 1))
    masks.choose(0.5, scores={"a": torch.tensor([[4.0, 3.0, 2.0, 1.0]])})
    assert masks.masks["a"].tolist() == [[True, True, False, False]]


def test_masks_travel_through_their_state() -> None:
    first, second = BlockMasks(linears(a=(8, 4)), (2, 1)), BlockMasks(linears(a=(8, 4)), (2, 1))
    first.choose(0.5)
    state = first.state_dict()
    second.load_state_dict(state)
    second.apply_()
    assert torch.equal(second.masks["a"], first.masks["a"])
    assert second.is_applied()
    assert not torch.equal(second.targets["a"].weight, torch.zeros(8, 4))
    first.choose(0.75)
    assert not torch.equal(state["a"], first.masks["a"]), "the state is a copy"


def test_for_model_takes_the_default_targets() -> None:
    model = bert()
    masks = BlockMasks.for_model(model, (4, 1))
    masks.choose(0.5)
    masks.apply_()
    assert len(masks.targets) == 12
    assert masks.sparsity == 0.5
    name = "bert.encoder.layer.0.output.dense"
    assert torch.equal(model.get_submodule(name).block_mask.mask(), masks.masks[name])


def test_masks_take_one_bit_per_block() -> None:
    model = bert()
    masks = BlockMasks.for_model(model, (4, 1))
    masks.choose(0.5)
    masks.apply_()
    # Everything that is held, found without the class's help: by itself and on the modules.
    held = {id(t): t for t in tensors_in({k: v for k, v in vars(masks).items() if k != "targets"})}
    held |= {id(t): t for module in masks.targets.values() for t in tensors_in(vars(module.block_mask))}
    blocks = {name: weight.numel() // 4 for name, weight in masks.weights()}
    assert sum(t.nbytes for t in held.values()) == masks.nbytes == sum(-(-count // 8) for count in blocks.values())
    ragged = BlockMasks(linears(a=(3, 3), b=(5, 5)), (1, 1))
    assert ragged.nbytes == 2 + 4


def tensors_in(thing: Any) -> list[Tensor]:
    if isinstance(thing, Tensor):
        return [thing]
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else ()
    parts = [*parts, *vars(thing).values()] if hasattr(thing, "__dict__") else parts
    return [tensor for part in parts for tensor in tensors_in(part)]


def test_masks_are_a_read_only_mapping() -> None:
    masks = BlockMasks(linears(a=(8, 4), b=(3, 5)), (1, 1))
    masks.choose(0.5)
    assert list(masks.masks) == ["a", "b"] and len(masks.masks) == 2 and "c" not in masks.masks
    assert {name: (mask.dtype, mask.shape) for name, mask in masks.masks.items()} == {
        "a": (torch.bool, (8, 4)), "b": (torch.bool, (3, 5)),
    }  # fmt: skip
    before = masks.state_dict()
    masks.masks["a"].fill_(True)
    assert torch.equal(masks.masks["a"], before["a"]), "a copy was written to"
    with pytest.raises(TypeError, match="does not support item assignment"):
        masks.masks["a"] = torch.ones(8, 4, dtype=torch.bool)  # type: ignore[index]
    with pytest.raises(KeyError):
        masks.masks["c"]


def test_many_layers_are_zeroed_in_several_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    # As large models do, some layers of which fit together and some do not.
    monkeypatch.setattr(bits, "_TOGETHER", 100)
    targets = linears(a=(8, 4), b=(3, 5), c=(20, 20), d=(7, 7), e=(5, 1))
    targets["d"].double()
    masks = BlockMasks(targets, (1, 1))
    masks.choose(0.5)
    before = {name: module.weight.detach().clone() for name, module in targets.items()}
    masks.apply_()
    for name, module in targets.items():
        assert torch.equal(module.weight.detach(), before[name] * masks.masks[name])
    assert masks.is_applied()


def choose(sparsity: Any) -> None:
    shaped((2, 1)).choose(sparsity)


def shaped(shape: Any) -> BlockMasks:
    return BlockMasks(linears(a=(8, 4)), shape)


def other(name: str, mask: Tensor) -> Any:
    masks = BlockMasks(linears(a=(8, 4)), (2, 1))
    return lambda: masks.load_state_dict({name: mask})


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: BlockMasks(linears(a=(8, 4)), (2, 1), scope="model"), r"scope='model'"),
        (lambda: BlockMasks(linears(a=(8, 4)), (2, 1), "global", 1.5), r"layer_share=1\.5 must be in \[0, 1\]"),
        (lambda: BlockMasks(linears(a=(8, 4)), (2, 1), "global", float("nan")), r"layer_share=nan must be in"),
        (lambda: BlockMasks(linears(a=(8, 4)), (3, 1)), r"a: block_height=3 does not divide the 8 output rows"),
        (lambda: BlockMasks(linears(a=(8, 4)), (2, 1)).choose(1.0), r"sparsity=1\.0 must be in \[0, 1\)"),
        (lambda: BlockMasks(linears(a=(8, 4)), (2, 1)).choose(-0.1), r"sparsity=-0\.1"),
        (
            lambda: BlockMasks(linears(a=(8, 4)), (2, 1)).choose(0.5, {"a": torch.ones(2, 4)}),
            r"scores of a have shape \[2, 4\], its grid is \[4, 4\]",
        ),
        (lambda: choose("0.5"), r"sparsity='0\.5' must be in \[0, 1\): the fraction of blocks to remove, a number"),
        (
            lambda: BlockMasks(linears(a=(8, 4), b=(8, 4)), (2, 1)).choose(0.5, {"a": torch.ones(4, 4)}),
            r"scores hold nothing for b \(1 of 2 targets are missing\)",
        ),
        (
            lambda: BlockMasks(linears(a=(8, 4)), (2, 1)).choose(0.5, {"a": torch.full((4, 4), float("nan"))}),
            r"the scores of a hold NaN, and so do those of 1 target layer",
        ),
        (lambda: BlockMasks(linears(a=(8, 4), b=(8, 4)), {"a": (2, 1)}), r"block_shapes hold nothing for b: give"),
        (lambda: shaped((4,)), r"a: block_shape=\(4,\) is no block shape"),
        (lambda: shaped({"a": 4}), r"a: block_shape=4 is no block shape"),
        (lambda: BlockMasks(linears(a=(8, 4)), (3, 1)), r"a: block_height=3 .* block_shapes=\{name: \(h, w\)\}"),
        (other("b", torch.ones(4, 4, dtype=torch.bool)), r"a is not among the saved masks"),
        (other("a", torch.ones(2, 4, dtype=torch.bool)), r"mask of a .*\[2, 4\].*needs torch\.bool of shape \[4, 4\]"),
        (other("a", torch.ones(4, 4)), r"saved mask of a is torch\.float32"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_by_name(act: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()


def test_a_budget_that_takes_a_whole_layer_is_refused_by_name() -> None:
    masks = BlockMasks(linears(fine=(64, 4), coarse=(4, 4)), {"fine": (1, 1), "coarse": (4, 4)})
    masks.check_budgets(0.4)
    with pytest.raises(ValueError, match=r"sparsity=0\.9 would remove all of coarse: it has 1 block"):
        masks.check_budgets(0.9)


def test_a_global_budget_that_takes_everything_is_refused() -> None:
    masks = BlockMasks(linears(a=(8, 4), b=(4, 4)), (4, 1), scope="global")
    # 12 blocks: at 11.4 of them one is left, at 11.5 none.
    masks.check_budgets(0.95)
    masks.choose(0.95)
    assert sum(removed(masks).values()) == 11
    with pytest.raises(ValueError, match=r"0\.96 would remove all 12 blocks of the 2 target layers, which share"):
        masks.check_budgets(0.96)
    mixed = BlockMasks(linears(a=(8, 4), b=(4, 4)), {"a": (4, 1), "b": (1, 1)}, scope="global")
    # 48 weights, of which a block of one weight may be the last.
    mixed.check_budgets(0.98)
    mixed.choose(0.98)
    assert removed(mixed) != {"a": 8, "b": 16}
    with pytest.raises(ValueError, match=r"sparsity=0\.99 would remove all 24 blocks"):
        mixed.check_budgets(0.99)


def test_a_global_budget_of_which_layers_fill_a_share_leaves_each_a_block() -> None:
    targets = linears(fine=(64, 4), coarse=(4, 4))
    shapes = {"fine": (1, 1), "coarse": (4, 4)}
    BlockMasks(targets, shapes, "global").check_budgets(0.9)
    with pytest.raises(ValueError, match=r"sparsity=0\.9 would remove all of coarse: it has 1 block"):
        BlockMasks(targets, shapes, "global", 0.25).check_budgets(0.9)


@pytest.mark.parametrize(("targets", "message"), [
    (nn.Linear(4, 4), r"targets must map names to linears, found a Linear: pass \{name: linear\}.*for_model"),
    ([("a", nn.Linear(4, 4))], r"targets must map names to linears, found a list"),
    ({"a": nn.Conv2d(4, 4, 3)}, r"target a is a Conv2d with a weight of shape \[4, 4, 3, 3\]: only weights \[O, I\]"),
    ({"a": nn.ReLU()}, r"target a is a ReLU with no weight"),
    ({"a": torch.ones(4, 4)}, r"target a is a Tensor with no weight"),
])  # fmt: skip
def test_targets_that_are_none(targets: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        BlockMasks(targets, (2, 1))


def test_shapes_given_by_name_may_hold_minus_one() -> None:
    masks = BlockMasks(linears(a=(8, 4)), {"a": (-1, 1)})
    assert masks.block_shapes == {"a": (8, 1)}
    masks.choose(0.5)
    masks.apply_()
    assert masks.is_applied() and masks.sparsity == 0.5


def test_nan_in_what_is_pruned_already_does_not_matter() -> None:
    masks = BlockMasks(linears(a=(8, 4)), (8, 1))
    masks.choose(0.25, {"a": torch.tensor([[0.0, 1.0, 2.0, 3.0]])})
    masks.choose(0.5, {"a": torch.tensor([[float("nan"), 1.0, 2.0, 3.0]])})
    assert masks.masks["a"].tolist() == [[False, False, True, True]]


def test_off_target_names_the_layer() -> None:
    masks = BlockMasks(linears(a=(8, 4), b=(8, 4)), (1, 1))
    masks.choose(0.5)
    state = masks.state_dict()
    state["b"][:3] = True
    masks.load_state_dict(state)
    assert "b has lost" in str(masks.off_target(0.5))
    assert BlockMasks(linears(a=(8, 4)), (1, 1), "global").off_target(0.5) == "sparsity 0.0000 over all layers"


def test_nan_weights_do_not_pass_as_zero() -> None:
    targets = linears(a=(4, 4))
    masks = BlockMasks(targets, (2, 1))
    masks.choose(0.5)
    nn.init.constant_(targets["a"].weight, float("nan"))
    assert not masks.is_applied()


def test_the_budget_holds_for_every_small_grid() -> None:
    for rows, cols, sparsity in itertools.product((1, 2, 3, 5), (1, 2, 7), (0.0, 0.2, 0.5, 0.9)):
        for scope in ("layer", "global"):
            masks = BlockMasks(linears(a=(rows, cols)), (1, 1), scope)
            masks.choose(sparsity)
            assert abs(removed(masks)["a"] - sparsity * rows * cols) <= 0.5 + 1e-9

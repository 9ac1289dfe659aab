"""Passes over all layers at once: the native kernel and torch do the same, and each layer goes to one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sparse.core import bits
from hf_sparse.core.bits import Bitmap
from hf_sparse.core.blocks import expand_mask, grid_shape
from hf_sparse.inference.kernels import library, prune
from hf_sparse.training.pruning import passes
from hf_sparse.training.pruning.passes import add_penalty_gradient_, mask_blocks_, shrink_blocks_
from hf_sparse.training.pruning.penalty import gradient_factors

SHAPES = {"linear": (8, 1), "conv1d": (4, 1), "tiles": (8, 8), "half": (8, 1), "double": (2, 2), "strided": (1, 4)}
TAKEN = {"linear", "conv1d", "tiles"}  # by the native kernel


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(32, 24, generator=generator) for name in SHAPES}
    drawn["conv1d"] = torch.randn(24, 32, generator=generator).t()
    drawn["half"] = drawn["half"].bfloat16()
    drawn["double"] = drawn["double"].double()
    drawn["strided"] = torch.randn(32, 48, generator=generator)[:, ::2]
    return drawn


def masks(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(grid_shape((32, 24), shape), generator=generator) < 0.5 for name, shape in SHAPES.items()}


def coefs_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wide = {
        name: torch.float64 if weight.dtype == torch.float64 else torch.float32 for name, weight in weights.items()
    }
    return {
        name: torch.rand(grid_shape((32, 24), SHAPES[name]), dtype=wide[name]) for name in SHAPES if name != "tiles"
    }


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the layers that the native kernel is given."""
    found: set[str] = set()
    original = prune._run

    def watch(mode: str, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shape = args[1]
        found.add("conv1d" if not target.is_contiguous() else "tiles" if shape == (8, 8) else "linear")
        return original(mode, target, *args, **kwargs)

    monkeypatch.setattr(prune, "_run", watch)
    return found


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("task", ["gradient", "shrink", "skipped"])
def test_both_ways_do_the_same(monkeypatch: pytest.MonkeyPatch, taken: set[str], task: str, pruned: bool) -> None:
    if library.load_library().handle is None:
        pytest.skip(library.load_library().reason)
    results = []
    coefs, bitmaps = coefs_of(tensors(1)), {name: Bitmap(mask) for name, mask in masks(3).items()} if pruned else None
    for backend in ("auto", "reference"):
        monkeypatch.setenv("HF_SPARSE_BACKEND", backend)
        weights, grads = tensors(1), tensors(2)
        taken.clear()
        if task == "gradient":
            value = add_penalty_gradient_(
                grads, weights, SHAPES, coefs, amount=0.3, scale=torch.tensor(2.0), bitmaps=bitmaps
            )
        else:
            thresholds = {name: 0.1 * (1 + at) for at, name in enumerate(SHAPES)}
            moved = torch.tensor(task == "shrink")
            value = shrink_blocks_(weights, SHAPES, coefs, thresholds, moved=moved, bitmaps=bitmaps)
        assert taken == (TAKEN if backend == "auto" else set())
        results.append((value, {**{f"{n} weight": w for n, w in weights.items()}, **grads}))
    (one, first), (two, second) = results
    assert one.item() == pytest.approx(two.item(), rel=1e-5)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], msg=lambda text, name=name: f"{name}: {text}")
    changed = {n: w for n, w in first.items() if n.endswith("weight") == (task != "gradient")}
    for name, mask in masks(3).items() if pruned else ():
        written = changed.get(name, changed.get(f"{name} weight"))
        assert written is not None and (written[~expand_mask(mask, SHAPES[name])] == 0).all()


def test_masks_reach_every_kind(taken: set[str]) -> None:
    given, bitmaps = tensors(1), {name: Bitmap(mask) for name, mask in masks(3).items()}
    mask_blocks_(given, SHAPES, bitmaps)
    before = tensors(1)
    for name, mask in masks(3).items():
        assert torch.equal(given[name], before[name] * expand_mask(mask, SHAPES[name])), name
    assert taken == (TAKEN if library.load_library().handle is not None else set())


class Launches(TorchDispatchMode):
    """Counts what would be launched on a GPU: all operators but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def launches(task: str, layers: int) -> int:
    names = [str(number) for number in range(layers)]
    weights, grads = ({name: torch.randn(32, 16) for name in names} for _ in range(2))
    shapes, coefs = dict.fromkeys(names, (16, 1)), {name: torch.rand(2, 16) for name in names}
    bitmaps = {name: Bitmap(torch.rand(2, 16) < 0.5) for name in names}
    with Launches() as counted:
        if task == "masks":
            mask_blocks_(weights, shapes, bitmaps)
        elif task == "gradient":
            add_penalty_gradient_(grads, weights, shapes, coefs, amount=0.1, scale=None, bitmaps=bitmaps)
        else:
            shrink_blocks_(weights, shapes, coefs, dict.fromkeys(names, 0.1), moved=None, bitmaps=bitmaps)
    return counted.count


@pytest.mark.parametrize(("task", "per_layer"), [("masks", 1), ("gradient", 5), ("shrink", 4)])
def test_launches_per_layer(monkeypatch: pytest.MonkeyPatch, task: str, per_layer: int) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", "reference")
    launches(task, 1)  # what is cached at first use
    assert launches(task, 40) - launches(task, 10) == 30 * per_layer


@pytest.mark.parametrize("together", [1, 40, 10**6])
def test_few_blocks_are_held_at_once(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", "reference")
    monkeypatch.setattr(bits, "_TOGETHER", together)
    sizes: list[int] = []

    def watch(norms: Tensor, coef: Tensor | None) -> Tensor:
        sizes.append(norms.numel())
        return gradient_factors(norms, coef)

    monkeypatch.setattr(passes, "gradient_factors", watch)
    names = list("abcd")
    weights, grads = ({name: torch.randn(32, 16) for name in names} for _ in range(2))
    expected = {name: grads[name] + 0.1 * weight / weight.norm(dim=0) for name, weight in weights.items()}
    shapes = dict.fromkeys(names, (32, 1))
    value = add_penalty_gradient_(grads, weights, shapes, {}, amount=0.1, scale=None, bitmaps=None)
    torch.testing.assert_close(grads, expected)
    assert value.item() == pytest.approx(sum(weight.norm(dim=0).sum().item() for weight in weights.values()), rel=1e-5)
    assert sizes == {1: [16] * 4, 40: [32, 32], 10**6: [64]}[together]


@pytest.mark.parametrize("task", ["gradient", "shrink", "skipped"])
def test_both_ways_treat_what_is_no_number_alike(monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    odd = torch.tensor(
        [torch.nan, 1.0, torch.inf, 1.0, 0.0, 0.0, 1e-30, -1e-30, -torch.inf, torch.nan, 1e30, 2.0, 3.0, 4.0]
    )
    results = []
    for backend in ("auto", "reference"):
        monkeypatch.setenv("HF_SPARSE_BACKEND", backend)
        # In two orders: blocks of one column in a register, and wider ones.
        weights = {"tall": odd.view(7, 2).t().contiguous(), "wide": odd.view(1, 14).clone()}
        grads = {name: torch.ones_like(weight) for name, weight in weights.items()}
        shapes, coefs = {"tall": (2, 1), "wide": (1, 2)}, {"tall": torch.full((1, 7), 2.0)}
        if task == "gradient":
            value = add_penalty_gradient_(grads, weights, shapes, coefs, amount=0.5, scale=None, bitmaps=None)
        else:
            moved = torch.tensor(task == "shrink")
            value = shrink_blocks_(weights, shapes, coefs, dict.fromkeys(shapes, 0.25), moved=moved, bitmaps=None)
        assert value.isnan()
        results.append({**{f"{name} weight": weight for name, weight in weights.items()}, **grads})
    for name, tensor in results[0].items():
        torch.testing.assert_close(
            tensor, results[1][name], equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )

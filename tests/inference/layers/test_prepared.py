from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_sparse.core.blocks import expand_mask, grid_shape
from hf_sparse.inference.kernels import get_backend, registry
from hf_sparse.inference.kernels.banded import BandedBackend
from hf_sparse.inference.layers.linear import BlockSparseLinear
from hf_sparse.inference.layers.prepared import Stamp


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice that "auto" makes on a machine without native kernels."""
    monkeypatch.setenv("HF_SPARSE_BACKEND", "auto")
    monkeypatch.setattr(registry, "PREFERENCE", ("torch", "dense"))


def layer(shape: tuple[int, int], block: tuple[int, int], density: float) -> tuple[torch.Tensor, BlockSparseLinear]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(grid_shape(shape, block), generator=generator) < density
    weight = torch.randn(shape, generator=generator).masked_fill(~expand_mask(mask, block), 0)
    parameter = torch.nn.Parameter(weight)
    return weight, BlockSparseLinear.from_dense(parameter, mask, block, bias=torch.ones(shape[0])).eval()


def test_stamps_tell_replacing_and_writing() -> None:
    tensor = torch.zeros(3)
    stamp = Stamp(tensor)
    assert stamp.fits(tensor)
    assert not stamp.fits(tensor.clone())
    assert not stamp.fits(None)
    tensor.add_(1)
    assert not stamp.fits(tensor)
    stamp = Stamp(tensor)
    tensor.data = torch.zeros(3)
    assert not stamp.fits(tensor)


def test_stamps_of_inference_tensors() -> None:
    with torch.inference_mode():
        tensor = torch.zeros(3)
    assert Stamp(tensor).fits(tensor)
    assert not Stamp(tensor).fits(torch.zeros(3))


def test_few_tokens_run_dense_and_many_do_not(plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, module = layer((1536, 384), (32, 1), 0.05)
    seen: list[int] = []
    backend: Any = get_backend("torch")
    run = BandedBackend.run

    def spy(self: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(x.shape[0])
        return run(self, x, *args)

    monkeypatch.setattr(BandedBackend, "run", spy)
    with torch.no_grad():
        for tokens in (1, 2, 512):
            x = torch.randn(tokens, 384)
            torch.testing.assert_close(module(x), x @ weight.t() + 1, rtol=1e-4, atol=1e-4)
    assert module.backend() == "torch"
    assert seen == [512]
    few = module._prepared.few
    assert 2 < few <= 512
    assert backend.from_tokens(module._prepared.state) == few


def test_many_tokens_run_dense_and_few_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = get_backend("cpu")
    if not backend.available()[0]:
        pytest.skip(backend.available()[1])
    seen: list[int] = []
    run = type(backend).run

    def spy(self: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(x.shape[0])
        return run(self, x, *args)

    monkeypatch.setenv("HF_SPARSE_BACKEND", "auto")
    monkeypatch.setattr(registry, "PREFERENCE", ("cpu", "dense"))
    monkeypatch.setattr(type(backend), "wins", lambda self, spec: False)
    monkeypatch.setattr(type(backend), "until_tokens", lambda self, spec: 8)
    monkeypatch.setattr(type(backend), "run", spy)
    weight, module = layer((64, 48), (8, 1), 0.5)
    with torch.no_grad():
        for tokens in (1, 8, 9, 100):
            x = torch.randn(tokens, 48)
            torch.testing.assert_close(module(x), x @ weight.t() + 1, rtol=1e-4, atol=1e-4)
    assert seen == [1, 8]
    assert (module.backend(), module._prepared.many) == ("cpu", 8)


def test_layers_that_never_win_are_held_dense_alone(plain: None) -> None:
    # Few wide blocks in a small layer: padding and calls cost more than the arithmetic saved.
    _, module = layer((64, 64), (32, 32), 0.25)
    with torch.no_grad():
        module(torch.randn(1, 64))
    assert module.backend() == "dense"
    assert module._prepared.dense is None
    assert module._prepared.few == 1


def test_a_forced_backend_runs_for_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", "torch")
    _, module = layer((64, 64), (32, 32), 0.25)
    with torch.no_grad():
        module(torch.randn(1, 64))
    assert module.backend() == "torch"
    assert (module._prepared.few, module._prepared.dense) == (1, None)


@pytest.mark.parametrize("tokens", [1, 512])
def test_gradients_on_both_sides_of_the_switch(plain: None, tokens: int) -> None:
    weight, module = layer((1536, 384), (32, 1), 0.05)
    x = torch.randn(tokens, 384, requires_grad=True)
    module(x).sum().backward()
    expected = torch.ones(tokens, 1536) @ weight
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-3)
    assert module.weight.grad is not None
    assert module.bias.grad.tolist() == [tokens] * 1536


def test_more_tokens_and_fewer_blocks_never_lose_a_win() -> None:
    backend = BandedBackend()
    starts = []
    for density in (0.02, 0.05, 0.1, 0.2, 0.3):
        _, module = layer((1536, 384), (32, 1), density)
        index = module.index()
        starts.append(backend.from_tokens(backend.prepare(module.weight, index)) or 10**9)
    assert starts == sorted(starts)
    assert starts[0] < 64


def test_a_backend_that_wins_for_few_and_never_for_many_keeps_the_few(
    plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Few(BandedBackend):
        def wins(self, spec: Any) -> bool:
            return False

        def until_tokens(self, spec: Any) -> int:
            return 8

        def from_tokens(self, state: Any) -> int | None:
            return None

    monkeypatch.setitem(registry._BACKENDS, "torch", Few())
    weight, module = layer((64, 48), (8, 1), 0.3)
    x = torch.randn(9, 48)
    torch.testing.assert_close(module(x), x @ weight.t() + 1, rtol=1e-4, atol=1e-4)
    ready = module._prepared
    assert ready is not None and ready.backend.name == "torch"
    assert [ready.runs_dense(tokens) for tokens in (1, 8, 9)] == [False, False, True]


def test_a_backend_that_wins_at_both_ends_runs_dense_between(plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ends(BandedBackend):
        def until_tokens(self, spec: Any) -> int:
            return 2

        def from_tokens(self, state: Any) -> int | None:
            return 100

    monkeypatch.setitem(registry._BACKENDS, "torch", Ends())
    _, module = layer((1536, 384), (32, 1), 0.05)
    module(torch.randn(3, 384))
    ready = module._prepared
    assert ready is not None
    assert [ready.runs_dense(tokens) for tokens in (1, 2, 3, 99, 100)] == [False, False, True, True, False]

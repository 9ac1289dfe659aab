from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_sparse.core.stored.packing import FormatError, LayerFormat, pack_mask
from hf_sparse.inference.kernels import registry
from hf_sparse.inference.kernels.registry import (
    CHOICES,
    BlockIndex,
    LayerSpec,
    backend_status,
    choose_backend,
    get_backend,
    register,
    requested_backend,
)


def spec(density: float = 0.1, block: tuple[int, int] = (32, 1), dtype: torch.dtype = torch.float32) -> LayerSpec:
    layer = LayerFormat(block_shape=block, kept=0, dense_shape=(128, 128))
    kept = round(density * layer.num_blocks)
    layer = LayerFormat(block_shape=block, kept=kept, dense_shape=(128, 128))
    return LayerSpec(layer=layer, device=torch.device("cpu"), dtype=dtype)


class Fake:
    """A backend whose answers a test chooses."""

    def __init__(self, name: str, available: bool = True, supports: bool = True, wins: bool = True) -> None:
        self.name = name
        self._answers = {"available": available, "supports": supports, "wins": wins}

    def available(self) -> tuple[bool, str]:
        return self._answers["available"], "no such machine"

    def supports(self, spec: LayerSpec) -> tuple[bool, str]:
        return self._answers["supports"], "no such layer"

    def wins(self, spec: LayerSpec) -> bool:
        return self._answers["wins"]

    def prepare(self, values: Any, index: Any) -> Any:
        return None

    def run(self, x: Any, state: Any, bias: Any, activation: Any) -> Any:
        return x


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    # Each test starts from the plain torch backends alone, with nothing said about usability.
    plain = {name: get_backend(name) for name in ("reference", "dense", "torch")}
    monkeypatch.setattr(registry, "_BACKENDS", {**plain, "cpu": Fake("cpu", False), "gpu": Fake("gpu", False)})
    registry._usable.cache_clear()
    yield
    registry._usable.cache_clear()


def test_index_lists_blocks_in_storage_order() -> None:
    mask = torch.tensor([[True, False, True], [False, True, False]])
    layer = LayerFormat(block_shape=(2, 1), kept=3, dense_shape=(4, 3))
    index = BlockIndex.from_bitmap(pack_mask(mask), layer)
    assert index.rows.tolist() == [0, 0, 1]
    assert index.cols.tolist() == [0, 2, 1]


def test_index_refuses_another_population() -> None:
    layer = LayerFormat(block_shape=(1, 1), kept=1, dense_shape=(2, 2))
    with pytest.raises(FormatError, match="keeps 2 blocks, but 1 are stored"):
        BlockIndex.from_bitmap(torch.tensor([3], dtype=torch.uint8), layer)


@pytest.mark.parametrize("name", CHOICES)
def test_env_names_a_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", name)
    assert requested_backend() == name


def test_env_unset_or_empty_is_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", "")
    assert requested_backend() == "auto"
    monkeypatch.delenv("HF_SPARSE_BACKEND")
    assert requested_backend() == "auto"


def test_env_with_a_wrong_value_names_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"HF_SPARSE_BACKEND='cuda'.*auto, reference, torch, cpu, gpu, dense"):
        choose_backend(spec())


def test_forced_backend_that_is_not_available_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", "gpu")
    with pytest.raises(ValueError, match="'gpu' cannot be used: no such machine"):
        choose_backend(spec())


def test_forced_backend_that_cannot_compute_the_layer_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    register(Fake("cpu", supports=False))
    monkeypatch.setenv("HF_SPARSE_BACKEND", "cpu")
    with pytest.raises(ValueError, match="'cpu' cannot be used: no such layer"):
        choose_backend(spec())


def test_forced_backend_need_not_win(monkeypatch: pytest.MonkeyPatch) -> None:
    register(Fake("cpu", wins=False))
    monkeypatch.setenv("HF_SPARSE_BACKEND", "cpu")
    assert choose_backend(spec()).name == "cpu"


def test_auto_prefers_native_code_where_it_wins() -> None:
    register(Fake("cpu"))
    assert choose_backend(spec(), "auto").name == "cpu"


@pytest.mark.parametrize("answer", ["available", "supports", "wins"])
def test_auto_passes_over_a_backend_that_says_no(answer: str) -> None:
    register(Fake("cpu", **{answer: False}))
    assert choose_backend(spec(density=0.99), "auto").name == "dense"


@pytest.mark.parametrize(
    ("density", "block", "dtype", "chosen"),
    [
        (0.05, (32, 1), torch.float32, "torch"),
        (0.9, (32, 1), torch.float32, "dense"),
        (0.05, (1, 1), torch.float32, "dense"),
        (0.05, (32, 1), torch.float64, "dense"),
    ],
)
def test_auto_runs_dense_where_dense_wins(
    density: float, block: tuple[int, int], dtype: torch.dtype, chosen: str
) -> None:
    assert choose_backend(spec(density, block, dtype), "auto").name == chosen


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'mps' is not one of"):
        get_backend("mps")
    with pytest.raises(ValueError, match="'mps' is not one of"):
        register(Fake("mps"))


def test_a_backend_that_this_version_lacks_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", {})
    monkeypatch.setitem(registry._MODULES, "gpu", "hf_sparse.inference.kernels.absent")
    assert backend_status()["gpu"] == (False, "the 'gpu' backend is not part of this version of hf_sparse.")


@pytest.mark.parametrize(("version", "reason"), [
    (None, "triton is not installed"),
    ("3.5.1", "Triton 3.5 is older than 3.6, which torch 2.10 brings along"),
    ("3.10.0+git1", "Triton's interpreter (TRITON_INTERPRET=1): right, and slow"),
])  # fmt: skip
def test_a_gpu_without_the_triton_that_it_needs_is_left_out(
    version: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_sparse.inference.kernels.gpu import backend

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None if version is None else object())
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    assert backend.GpuBackend().available() == (reason.endswith("slow"), reason)


def test_status_covers_every_backend() -> None:
    status = backend_status()
    assert set(status) == set(CHOICES) - {"auto"}
    assert status["torch"] == (True, "plain torch")
    assert status["gpu"] == (False, "no such machine")

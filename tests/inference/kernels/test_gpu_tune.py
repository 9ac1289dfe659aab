"""The file of plans, and the rules that need no GPU: which plan, from how many tokens."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_sparse.core.stored.packing import LayerFormat
from hf_sparse.inference.kernels import BlockIndex, LayerSpec
from tests.inference.kernels.conftest import triton_is_missing

if triton_is_missing():
    pytest.skip("no triton of 3.6 or newer is installed", allow_module_level=True)

from hf_sparse.inference.kernels.gpu import limits
from hf_sparse.inference.kernels.gpu.choice import plan_for, token_bucket
from hf_sparse.inference.kernels.gpu.layout import forward_side
from hf_sparse.inference.kernels.gpu.plan import Plan, candidates, default_plan
from hf_sparse.inference.kernels.gpu.tune import ENV_TUNE, Plans, plans_file

BLOCKS = [(8, 1), (32, 1), (128, 1), (16, 16), (64, 64), (128, 128), (24, 8), (1, 16), (256, 32)]


def layer(block: tuple[int, int], density: float = 0.1) -> LayerFormat:
    shape = (16 * block[0], 16 * block[1])
    return LayerFormat(block_shape=block, kept=max(1, round(density * 256)), dense_shape=shape)


def side(block: tuple[int, int]) -> object:
    found = layer(block, 2 / 256)
    return forward_side(BlockIndex(found, torch.tensor([0, 1]), torch.tensor([0, 1])))


def spec(shape: tuple[int, int], block: tuple[int, int], density: float, dtype: torch.dtype) -> LayerSpec:
    blocks = shape[0] * shape[1] // (block[0] * block[1])
    made = LayerFormat(block_shape=block, kept=round(density * blocks), dense_shape=shape)
    return LayerSpec(made, torch.device("cuda", 0), dtype)


def test_a_file_remembers_plans_of_several_processes(tmp_path: Path) -> None:
    one, two = Plans(tmp_path / "new" / "plans.json"), Plans(tmp_path / "new" / "plans.json")
    first, second = Plan("gather", 64, 64, 64), Plan("copy", 128, 64, 64, swapped=True)
    one.put("a", first)
    two.put("b", second)
    found = Plans(tmp_path / "new" / "plans.json")
    assert (found.get("a"), found.get("b"), found.get("c")) == (first, second, None)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["plans.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"gather"', '"other"'),
        lambda text: text.replace('"m": 64', '"m": 63'),
        lambda text: text.replace('"m": 64', '"m": "64"'),
        lambda text: text.replace('"stages": 3', '"stages": 3000'),
        lambda text: text.replace('"group": 4, ', "").replace('"group": 4,\n', ""),
        lambda text: "\x00\xff",
    ],
)
def test_a_broken_file_is_made_anew(damage: object, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "plans.json"
    Plans(path).put("a", Plan("gather", 64, 64, 64))
    path.write_text(damage(path.read_text()), encoding="latin-1")  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        plans = Plans(path)
    assert plans.get("a") is None and "is broken and is made anew" in caplog.text
    plans.put("b", Plan("gather", 32, 64, 64))
    assert set(json.loads(path.read_text())["plans"]) == {"b"}


def test_plans_of_other_programs_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    Plans(path).put("a", Plan("gather", 64, 64, 64))
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "sources": "others"}))
    assert Plans(path).get("a") is None


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    plans = Plans(tmp_path / "file" / "plans.json")
    with caplog.at_level(logging.WARNING):
        plans.put("a", Plan("gather", 64, 64, 64))
    assert ENV_TUNE in caplog.text and plans.get("a") is not None


def test_where_the_file_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3/x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(ENV_TUNE, raising=False)
    found = plans_file(torch.device("cuda", 0))
    assert found is not None and found.parent == tmp_path / "hf_sparse"
    assert found.name.startswith("NVIDIA_H100_80GB_HBM3_x-torch-")
    monkeypatch.setenv(ENV_TUNE, str(tmp_path / "other"))
    other = plans_file(torch.device("cuda", 0))
    assert other is not None and other.parent == tmp_path / "other"
    monkeypatch.setenv(ENV_TUNE, "off")
    assert plans_file(torch.device("cuda", 0)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_plan_fits_its_shape_and_a_file(block: tuple[int, int], dtype: torch.dtype) -> None:
    for tokens in (1, 2, 16, 17, 64, 1000, 16384):
        tried = candidates(side(block), tokens, dtype)  # type: ignore[arg-type]
        assert tried[0] == default_plan(side(block), tokens, dtype)  # type: ignore[arg-type]
        assert len(set(tried)) == len(tried) <= 16
        for plan in tried:
            assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
            assert plan.m == 1 if tokens == 1 and plan.program == "few" else plan.m >= 16
            if plan.program == "copy":
                assert block[1] % plan.k == 0 and block[0] % plan.o == 0 and dtype is torch.bfloat16


def test_without_a_gpu_nothing_is_tuned_and_nothing_begins_early() -> None:
    x, found = torch.zeros(40, 1024), side((64, 64))
    values = torch.zeros(2, 64, 64)
    expected = default_plan(found, token_bucket(40), torch.float32)  # type: ignore[arg-type]
    assert plan_for(x, values, found, 0.1, {}) == replace(expected, early=0)  # type: ignore[arg-type]


@pytest.fixture
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    limits._clear.cache_clear()
    monkeypatch.setattr(limits, "_clear", lambda device: limits.CLEAR)


@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_few_kept_win_and_most_kept_do_not(dtype: torch.dtype) -> None:
    shape = (4096, 4096)
    assert limits.wins_for_many(spec(shape, (64, 64), 0.1, dtype))
    assert limits.wins_until(spec(shape, (64, 64), 0.1, dtype)) == 16384
    assert not limits.wins_for_many(spec(shape, (64, 64), 0.95, dtype))
    assert limits.wins_until(spec(shape, (64, 64), 1.0, dtype)) == 0
    assert not limits.wins_for_many(spec(shape, (8, 1), 0.1, dtype))
    assert 1 <= limits.wins_until(spec(shape, (8, 1), 0.1, dtype)) < 512


def test_unknown_chips_need_a_clear_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = {}
    for chip in ((9, 0), (8, 0)):
        limits._clear.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, chip=chip: chip)
        densities = [share / 100 for share in range(1, 100)]
        found[chip] = max(
            d for d in densities if limits.wins_for_many(spec((4096, 4096), (64, 64), d, torch.bfloat16))
        )
    limits._clear.cache_clear()
    assert found[8, 0] < 0.7 * found[9, 0]

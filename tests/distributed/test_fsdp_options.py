"""FSDP2 with another number of ranks, on 2 x 2 meshes, offloaded and compiled: as one rank alone, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.fsdp_options_ranks import ALONE, trainer_of
from tests.distributed.fsdp_settings import RUN
from tests.distributed.launching import launched_once
from tests.training.tiny import assert_same, bert, pad_to_10, rows, weights_of

pytestmark = pytest.mark.dist
SCRIPT = "fsdp_options_ranks.py"
Launch = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launched_once(SCRIPT, 2, tmp_path_factory)


@pytest.fixture(scope="module")
def four(two: Launch, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launched_once(SCRIPT, 4, tmp_path_factory, after=two[0])


@pytest.fixture(scope="module")
def two_again(four: Launch, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launched_once(SCRIPT, 2, tmp_path_factory, after=four[0])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process without a launcher."""
    runs = {name: trainer_of(tmp_path_factory.mktemp(name), **changes) for name, changes in ALONE.items()}
    for trainer in runs.values():
        trainer.train()
    return runs


def check(launch: Launch, name: str, trainer: Any, steps: int = RUN["max_steps"]) -> list[dict[str, Any]]:
    """Assert that a run of ranks ended as one rank does: same masks, pruned blocks zero, weights but for rounding."""
    found = [seen[name] for seen in launch[1]]
    for rank in found:
        assert rank["zero"] == [True] * steps
        assert_same(trainer.pruner.masks.state_dict(), rank["masks"])
        assert_same(found[0]["weights"], rank["weights"])
        if rank["evaluated"] is not None:
            assert rank["evaluated"] == pytest.approx(trainer.evaluate(rows("classes", 16))["eval_loss"], rel=1e-3)
        for key, weight in weights_of(trainer.student).items():
            torch.testing.assert_close(rank["weights"][key], weight, rtol=2e-4, atol=2e-6)
    assert any(not mask.all() for mask in trainer.pruner.masks.state_dict().values())
    return found


def check_saved(launch: Launch, name: str) -> None:
    """Assert that what a run has saved loads and computes what its weights do."""
    loaded = type(bert()).from_pretrained(launch[0] / name / "final").eval()
    fresh = bert(num_hidden_layers=loaded.config.num_hidden_layers).eval()
    fresh.load_state_dict(launch[1][0][name]["weights"])
    inputs = pad_to_10(rows("classes", 8))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, fresh(**inputs).logits, rtol=1e-5, atol=1e-6)
    assert loaded.config.quantization_config.quant_method == "hf_sparse"


@pytest.mark.slow
def test_shards_of_two_ranks_are_gone_on_with_by_four(two: Launch, four: Launch, alone: Any) -> None:
    check(two, "saved", alone["plain"])
    check(four, "resumed", alone["plain"], steps=3)


@pytest.mark.slow
def test_shards_of_four_ranks_are_gone_on_with_by_two(four: Launch, two_again: Launch, alone: Any) -> None:
    check(four, "saved", alone["plain"])
    check(two_again, "resumed", alone["plain"], steps=3)


@pytest.mark.slow
def test_copies_of_shards(four: Launch, alone: Any) -> None:
    for rank in check(four, "hsdp", alone["plain"]):
        assert rank["mesh"] == (2, 2) and rank["placements"] == "(Replicate(), Shard(dim=0))"
    check_saved(four, "hsdp")


def test_offload_to_the_host(two: Launch, alone: Any) -> None:
    for rank in check(two, "offload", alone["plain"]):
        assert rank["placements"] == "(Shard(dim=0),)"
    check_saved(two, "offload")


def test_compiled_shards(two: Launch, alone: Any) -> None:
    for rank in check(two, "compiled", alone["compiled"]):
        assert rank["placements"] == "(Shard(dim=0),)" and "OptimizedModule" in rank["wrapped"]
    check_saved(two, "compiled")


def test_compiled_under_ddp(two: Launch, alone: Any) -> None:
    for rank in check(two, "ddp compiled", alone["compiled"]):
        assert rank["placements"] == "whole" and rank["wrapped"] == "OptimizedModule"
    check_saved(two, "ddp compiled")

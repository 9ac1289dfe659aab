"""The bytes that docs/at_scale.md promises, counted on 1, 2 and 4 ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.at_scale import (
    Model,
    bert_base,
    coef_update_bytes,
    end_bytes,
    mask_update_bytes,
    sent,
    step_bytes,
    table,
)
from tests.distributed.fsdp_ranks import TRAFFIC
from tests.distributed.launching import launched_once
from tests.distributed.traffic import counted
from tests.training.tiny import bert, make_trainer, rows

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "at_scale.md"
LAYER = [(16, 16)] * 4 + [(32, 16), (16, 32)]
TINY = Model(name="tiny", weights=tuple(LAYER * 2), parameters=0, block=16 * 2)


def expected(engine: str, importance: str) -> tuple[list[int], int]:
    """What the steps of `TRAFFIC` and its end send, by the formulas of the page."""
    sharded, activation = engine == "fsdp2", importance == "activation"
    masks, coefs = mask_update_bytes(TINY, sharded, activation), coef_update_bytes(TINY, sharded)
    steps = [step_bytes(TINY, sharded, penalty=step < 3) for step in range(5)]
    steps[0] += coefs
    steps[1] += coefs + masks
    steps[3] += masks
    return steps, end_bytes(TINY)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("importance", ["fisher", "magnitude", "activation"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_counted_bytes_are_those_of_the_formulas(
    tmp_path_factory: pytest.TempPathFactory, ranks: int, engine: str, importance: str
) -> None:
    _, seen = launched_once("fsdp_ranks.py", ranks, tmp_path_factory)
    steps, end = expected(engine, importance)
    for rank in seen:
        found = rank["traffic"][f"{engine} {importance}"]
        totals = [{k: v for k, v in step.items() if k != "messages"} for step in [*found["steps"], found["end"]]]
        assert [sum(total.values()) for total in totals] == [*steps, end], totals
        # Each kind of message goes out once for all layers, however many there are.
        assert max(step.get("messages", 0) for step in found["steps"]) <= 9


def test_one_rank_sends_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 16), **TRAFFIC)
    with counted() as seen:
        trainer.train()
    assert not seen


def test_what_a_gpu_sends_stays_below_twice_the_message() -> None:
    assert sent(1000, 1) == 0
    assert all(sent(1000, ranks) < 2000 for ranks in (2, 8, 64, 512, 10**6))
    assert sum(rows * cols for rows, cols in bert_base().weights) == 84_934_656


def test_the_table_of_the_page_is_up_to_date() -> None:
    assert table() in DOCUMENT.read_text(encoding="utf-8"), "run python benchmarks/at_scale.py"

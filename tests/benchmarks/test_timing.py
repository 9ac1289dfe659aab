from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from benchmarks import timing
from benchmarks.timing import time_in_turns


def _log(seen: list[str], name: str, seconds: float) -> Callable[[], None]:
    def call() -> None:
        seen.append(name)
        time.sleep(seconds)

    return call


def test_engines_take_turns_in_an_order_that_moves_on() -> None:
    seen: list[str] = []
    found = time_in_turns({name: _log(seen, name, 0.021) for name in "ab"}, seconds=0.0, rounds=3, threads=1)
    # Two calls of each to learn how long they take; long ones then run once in every turn.
    assert "".join(seen) == "aabb" + "abbaab"
    assert all(result.runs == 3 and result.ms >= 21 for result in found.values())
    assert found["a"].spread[0] <= found["a"].ms <= found["a"].spread[1]


def test_what_is_short_runs_once_untimed_and_then_in_a_row() -> None:
    seen: list[str] = []
    found = time_in_turns({"a": _log(seen, "a", 0.0005)}, seconds=0.0, rounds=2, threads=1)
    timed = found["a"].runs
    assert 2 <= timed <= 2 * timing.BURST
    assert len(seen) == 2 + 2 + timed


def test_rounds_are_added_until_the_time_is_up() -> None:
    found = time_in_turns({"a": _log([], "a", 0.021)}, seconds=0.2, rounds=1, threads=1)
    assert found["a"].runs > 1


def test_there_is_a_pause_before_every_turn_of_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    paused: list[float] = []
    monkeypatch.setattr(timing.time, "sleep", paused.append)
    time_in_turns({"a": list, "b": list}, seconds=0.0, rounds=2, threads=1)
    assert paused == []
    time_in_turns({"a": list, "b": list}, seconds=0.0, rounds=2, threads=2)
    assert paused == [timing.SETTLE_SECONDS] * 4


@pytest.mark.parametrize(("calls", "rounds"), [({}, 1), ({"a": list}, 0)])
def test_nothing_to_time_is_refused(calls: dict[str, Callable[[], object]], rounds: int) -> None:
    with pytest.raises(ValueError, match="give at least one call and one round"):
        time_in_turns(calls, seconds=0.0, rounds=rounds, threads=1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no sched_setaffinity here")
def test_every_thread_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 1, 2})
    monkeypatch.setattr(os, "sched_setaffinity", pinned.__setitem__)
    assert timing.pin(2) == [1, 2]
    assert set(pinned) >= {os.getpid()} and set(map(tuple, pinned.values())) == {(1, 2)}
    with pytest.raises(ValueError, match="4 threads need 4 cores, and this process may use 3"):
        timing.pin(4)

"""Time callables in turn, and pin what runs them. Standard library alone: other environments run this file, too."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}

# What is over sooner runs once untimed before it is timed, so that caches and sleeping threads count for nobody, and
# then several times in a row.
SHORT_SECONDS = 0.02
BURST_SECONDS, BURST = 0.002, 10

# Worker threads of the engine before spin for a while after their last task, up to 16 ms for those of OpenMP on a CPU
# with slow pauses, and would take the core that the next engine needs.
SETTLE_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What was measured for one callable.

    Attributes:
        ms: median milliseconds of one call.
        spread: first and third quartile.
        runs: number of calls timed.
    """

    ms: float
    spread: tuple[float, float]
    runs: int

    def row(self) -> dict[str, object]:
        """Give the fields of a row of results."""
        return {"ms": round(self.ms, 5), "spread": [round(edge, 5) for edge in self.spread], "runs": self.runs}


def time_in_turns(
    calls: Mapping[str, Callable[[], object]], *, seconds: float, rounds: int, threads: int, clock: str = "wall"
) -> dict[str, Timing]:
    """Time callables side by side: each has its turn in every round, in an order that moves on from round to round.

    Args:
        calls: {name: what to time}.
        seconds: rounds are added until this much time has gone by.
        rounds: at least so many rounds, however long they take.
        threads: that each of them uses; above 1, there is a pause before every turn.
        clock: one of `CLOCKS`. "process" counts the time of this process alone, which on a busy machine is what one
            thread would take on a quiet one.

    Returns:
        {name: timing}, in the order of `calls`.

    Raises:
        ValueError: if there is nothing to time, or `rounds` is below 1.
    """
    if not calls or rounds < 1:
        raise ValueError(f"calls={list(calls)} and rounds={rounds}: give at least one call and one round.")
    now, names = CLOCKS[clock], list(calls)
    expected = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        expected[name] = time.perf_counter() - start
    taken: dict[str, list[float]] = {name: [] for name in names}
    end, turn = time.perf_counter() + seconds, 0
    while turn < rounds or time.perf_counter() < end:
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            call = calls[name]
            if threads > 1:
                time.sleep(SETTLE_SECONDS)
            if expected[name] < SHORT_SECONDS:
                call()
            for _ in range(min(BURST, max(1, int(BURST_SECONDS / max(expected[name], 1e-9))))):
                start = now()
                call()
                taken[name].append(1e3 * (now() - start))
        turn += 1
    return {name: _summary(samples) for name, samples in taken.items()}


def _summary(samples: list[float]) -> Timing:
    low, median, high = statistics.quantiles(samples, method="inclusive") if len(samples) > 1 else samples * 3
    return Timing(ms=median, spread=(low, high), runs=len(samples))


def pin(threads: int) -> list[int]:
    """Keep every thread of this process, and those it starts from now on, on as many cores as it is to use.

    Args:
        threads: cores to use; the first ones of those that this process may use.

    Returns:
        The cores.

    Raises:
        ValueError: if there are fewer.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("threads can be pinned on Linux alone, and times of threads that wander mean little.")
    cores = sorted(os.sched_getaffinity(0))[:threads]
    if len(cores) < threads:
        raise ValueError(f"{threads} threads need {threads} cores, and this process may use {len(cores)}.")
    for task in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(task), cores)
    return cores

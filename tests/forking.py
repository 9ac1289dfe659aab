"""Processes of their own in a tenth of a second: forked from one that has imported what they need.

A process that starts anew spends seven seconds of a core on importing transformers and its trainer before it comes to
the question of a test. The tests that need many processes (kills, ranks, fuzz) fork them from one that has done so.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Not what reads the number of ranks when it is imported.
PRELOADED = ["tests.forking", "tests.faults.child", "tests.fuzz.__main__", "tests.training.test_speech",
             "tests.training.test_trainer_options", "tests.mixtures", "torch.distributed.fsdp"]  # fmt: skip


@cache
def server() -> Any:
    """The context whose processes are forked; the process that they come from is started by the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def stop() -> None:
    """End the process that others are forked from, if there is one, once the last of those has ended."""
    if server.cache_info().currsize:
        forkserver._forkserver._stop()  # type: ignore[attr-defined]


def start(log: Path, function: Callable[..., None], *arguments: Any, **environment: str) -> Any:
    """Start a process that calls a function; what it prints, errors included, goes to `log`."""
    process = server().Process(target=_call, args=(log, environment, function, arguments))
    process.start()
    return process


def _call(log: Path, environment: dict[str, str], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    function(*arguments)
    sys.stdout.flush()

"""Starts a script as several ranks on this machine, once for all tests that look at what the ranks saw.

`launch` is torchrun; `fork` gives the ranks the environment that torchrun would, without each of them importing all.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import forking

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TIMEOUT = 300.0


def free_port() -> int:
    """A port of the loopback that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(script: Path, ranks: int, *arguments: Path | str) -> None:
    """Run a script as ranks on this machine, and end all of them whatever happens."""
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-addr=127.0.0.1",
        f"--master-port={free_port()}", str(script), *map(str, arguments),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                   "TORCH_CPP_LOG_LEVEL": "ERROR"}  # fmt: skip
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait(10)
    assert process.returncode == 0, output[-6000:]


def fork(script: Path, ranks: int, *arguments: Path | str) -> None:
    """Run the `main` of a script of this folder as forked ranks, and end all of them whatever happens."""
    folder, port = Path(arguments[0]), str(free_port())
    logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
    processes = [
        forking.start(
            log, run_rank, script, [str(argument) for argument in arguments], RANK=str(rank), LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    deadline = time.monotonic() + TIMEOUT
    try:
        # One that fails leaves the others waiting.
        while any(p.exitcode is None for p in processes) and not any(p.exitcode for p in processes):
            assert time.monotonic() < deadline, f"{script.name} took more than {TIMEOUT} seconds"
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.join()
    told = {rank: log.read_text()[-6000:] for rank, log in enumerate(logs) if processes[rank].exitcode}
    assert not told, told


def run_rank(script: Path, arguments: list[str]) -> None:
    """Be one rank of a script."""
    sys.argv = [str(script), *arguments]
    importlib.import_module(f"tests.distributed.{script.stem}").main()


def launched_once(
    script: str,
    ranks: int,
    tmp_path_factory: pytest.TempPathFactory,
    after: Path | None = None,
    start: Callable[..., None] = fork,
) -> tuple[Path, list[dict[str, Any]]]:
    """Launch a script of this folder, and give its folder and what each rank saved there as rank-N.pt.

    With `after`, the folder of another launch, the script gets that one as well.
    """
    if script.startswith("fsdp") and torch.__version__ < "2.7":
        pytest.skip("FSDP2 of accelerate needs torch 2.7")
    base = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist share the folder above: the first to come launches, the others wait for it.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / (
        f"{script}-{ranks}" + (f"-after-{after.name}" if after else "")
    )
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + TIMEOUT
        while not (folder / "ended").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
    else:
        try:
            start(HERE / script, ranks, folder, *([after] if after else []))
        finally:
            (folder / "ended").touch()
    return folder, [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(ranks)]

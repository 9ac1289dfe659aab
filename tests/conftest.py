"""What every test gets: a fixed seed, one thread, an environment put back afterwards, and no network.

And what no test has to pay for: searching the half million objects of the imported libraries for garbage, which
accelerate has done at the start of every training run.
"""

from __future__ import annotations

import gc
import ipaddress
import os
import random
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Triton's interpreter runs the GPU kernels, on the CPU, unless the tests for a real GPU are asked for (-m gpu). Triton
# looks once, when it is imported; workers of pytest-xdist inherit what their parent decided.
if "PYTEST_XDIST_WORKER" not in os.environ and ["-m", "gpu"] not in [
    sys.argv[i : i + 2] for i in range(len(sys.argv))
]:
    os.environ["TRITON_INTERPRET"] = "1"

_connect = socket.socket.connect


def _connect_locally(self: socket.socket, address: Any) -> None:
    if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
        raise OSError(f"tests have no network: a connection to {address} was tried.")
    _connect(self, address)


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "")


# Libraries are imported while tests are collected, and leave no garbage worth looking for.
gc.disable()


def pytest_collection_finish() -> None:
    """Take what the libraries have left for good out of every later search for garbage."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """Leave no process behind, and let the time of those that were forked count as that of the tests."""
    if forking := sys.modules.get("tests.forking"):
        forking.stop()


@pytest.fixture(scope="module", autouse=True)
def _known_for_good() -> None:
    """Do the same with what has been imported since: models of transformers, backends of plots."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _connect_locally)
        yield


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    before = dict(os.environ)
    random.seed(0)
    # Only where a test has imported torch: the tests of the source alone take no second.
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(0)
    yield
    # TrainingArguments write to the environment (mixed precision, compiler), which the next test would inherit.
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)

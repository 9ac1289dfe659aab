"""Trying plans: the first call of a shape times those that are worth it, and a file remembers the fastest.

The file is one per device, torch and triton; it is read once, written whole or not at all, and one that is broken or
made by other programs is begun anew with a warning. `HF_SPARSE_TUNE` says where it lies, or "off" for no tuning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from hf_sparse.inference.kernels.gpu.plan import Plan

logger = logging.getLogger(__name__)

ENV_TUNE = "HF_SPARSE_TUNE"
FORMAT = 1
# Launches of a plan in one graph, and replays of it.
_LAUNCHES, _REPLAYS = 10, 5


class Plans:
    """The plans of one device, in memory and in a file.

    Args:
        path: of the file; None keeps them in memory.

    Example:
        >>> plans = Plans(None)
        >>> plans.put("64x64", Plan("gather", 64, 64, 64))
        >>> plans.get("64x64").m, plans.get("8x1")
        (64, None)
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._found: dict[str, Plan] = self._read()

    def get(self, key: str) -> Plan | None:
        """Give the plan of a shape; None where there is none."""
        return self._found.get(key)

    def put(self, key: str, plan: Plan) -> None:
        """Remember the plan of a shape. What another process wrote meanwhile is kept."""
        self._found[key] = plan
        if self.path is None:
            return
        self._found = {**self._read(), **self._found}
        plans = {name: found.to_dict() for name, found in sorted(self._found.items())}
        content = json.dumps({"format": FORMAT, "sources": sources(), "plans": plans}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            half = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
            half.write_text(content, encoding="utf-8")
            os.replace(half, self.path)
        except OSError as error:
            logger.warning("plans of the gpu backend cannot be kept in %s: %s. Set %s.", self.path, error, ENV_TUNE)
            self.path = None

    def _read(self) -> dict[str, Plan]:
        if self.path is None or not self.path.is_file():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if (content["format"], content["sources"]) != (FORMAT, sources()):
                logger.info("%s holds plans of other programs: they are found anew.", self.path)
                return {}
            return {str(key): Plan.from_dict(found) for key, found in content["plans"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("%s is broken and is made anew: %s", self.path, error)
            return {}


def sources() -> str:
    """Sum up the programs that the plans are for."""
    here = Path(__file__).parent
    texts = (here / name for name in ("programs.py", "launch.py", "plan.py"))
    return hashlib.sha256(b"\0".join(text.read_bytes() for text in texts)).hexdigest()[:16]


def plans_file(device: torch.device) -> Path | None:
    """Give the file for a device; None where `HF_SPARSE_TUNE` is "off"."""
    folder = os.environ.get(ENV_TUNE) or ""
    if folder == "off":
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_sparse"
    name = f"{torch.cuda.get_device_name(device)}-torch-{torch.__version__}-triton-{triton.__version__}"
    return (Path(folder) if folder else home) / (re.sub(r"[^A-Za-z0-9.+-]+", "_", name) + ".json")


def fastest(plans: Sequence[Plan], call: Callable[[Plan], Tensor]) -> Plan:
    """Time plans on the device and give the fastest; those that do not compile here, or need too much, drop out.

    Args:
        plans: the first one is taken to be right.
        call: computes with a plan.

    Raises:
        RuntimeError: if not even the first plan runs.
    """
    truth, taken = call(plans[0]).float(), {}
    for plan in plans:
        try:
            found = call(plan).float()
        # Compilers and drivers fail in their own ways, and a plan that fails is no reason not to have the others.
        except Exception as error:  # noqa: BLE001
            logger.debug("%s drops out: %s", plan, error)
            continue
        scale = float(truth.abs().max()) or 1.0
        if not float((found - truth).abs().max()) <= 0.05 * scale:
            logger.warning("%s computes something else than the default plan and is not used.", plan)
            continue
        taken[plan] = graph_time(partial(call, plan), launches=_LAUNCHES, replays=_REPLAYS)
    return min(taken, key=lambda plan: taken[plan])


def graph_time(call: Callable[[], Any], launches: int, replays: int) -> float:
    """Time a call by replaying a CUDA graph of several, so that what the CPU takes to launch them does not count.

    Returns:
        Median milliseconds of one call.
    """
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            call()
    taken = []
    for _ in range(replays + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / launches)
    return statistics.median(taken[1:])

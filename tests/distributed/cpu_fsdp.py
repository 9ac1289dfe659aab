"""FSDP2 through accelerate on ranks that have no accelerator.

accelerate turns FSDP on only where it finds an accelerator, though nothing in its FSDP2 code needs one. Inside
`fsdp_on_cpu` it is turned on for ranks of the CPU too, and offloads without pinning memory; everything that follows,
from `fully_shard` to the saved checkpoint, is accelerate's and torch's own code.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy


@contextlib.contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Let trainers with `fsdp=True` shard their models over ranks of the CPU."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if isinstance(fsdp_plugin.cpu_offload, CPUOffloadPolicy):
                # Pinned memory is what an accelerator reads from.
                fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = original
        os.environ.pop("ACCELERATE_USE_FSDP", None)

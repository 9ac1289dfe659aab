"""Settings that the scripts of FSDP2 ranks share."""

from __future__ import annotations

import os
from typing import Any

RANKS = int(os.environ.get("WORLD_SIZE", "1"))
# 8 samples per step, however many ranks there are.
SPLIT = {"per_device_train_batch_size": 8 // RANKS}
# 16 rows high, where the shards have 8 rows of a weight (4 on four ranks).
BLOCKS = {"block_height": 16, "block_width": 2}
RUN = {
    **BLOCKS, "max_steps": 6, "sparsity": 0.6, "sparsity_end": 0.7, "mask_updates": 2, "penalty_weight": 1e-3,
    "hidden_weight": 0.3, "weight_decay": 0.1, "max_grad_norm": 0.5,
}  # fmt: skip


def fsdp2(state_dict_type: str = "SHARDED_STATE_DICT", **config: Any) -> dict[str, Any]:
    """Training arguments that ask for FSDP2."""
    return {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": state_dict_type, **config}}

"""Settings that belong together, as values for the fields of `SparseDistillConfig` that the user does not give.

"spd" and "block_structured" are two papers; "hybrid" is a choice of block shapes, for engines without sparse kernels.

Sources: Sparse Progressive Distillation (Huang et al., ACL 2022) and Efficient Transformer-based Large Scale Language
Representations using Hardware-friendly Block Structured Pruning (Li et al., Findings of EMNLP 2020), with the
constants of their released code; Block Pruning For Faster Transformers (Lagunas et al., EMNLP 2021) for "hybrid".
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # 30 epochs of pruning, a 10-epoch ramp of the graft probability, 20 epochs of the student alone, the learning rate
    # from its peak again after the pruning; single weights; only the layers are trained; hidden states, attention maps
    # and soft labels with weight 1, temperature 1 and no hard labels.
    "spd": {
        "block_height": 1,
        "block_width": 1,
        "sparsity": 0.9,
        "sparsity_schedule": "cubic",
        "sparsity_start": 0.0,
        "sparsity_end": 0.5,
        "mask_updates": 12,
        "importance": "magnitude",
        "penalty_weight": 0.0,
        "task_weight": 0.0,
        "kd_weight": 1.0,
        "kd_temperature": 1.0,
        "hidden_weight": 1.0,
        "hidden_form": "mse",
        "attention_weight": 1.0,
        "graft_start": 0.3,
        "graft_hold": 0.5,
        "graft_end": 2 / 3,
        "lr_restart": 0.5,
        "train_only_layers": True,
    },
    # Row segments, reweighted group lasso through the loss, one hard prune inside each matrix, masked retraining on
    # the task loss alone, as a run of its own: learning rate and optimizer start anew. 96 columns are an eighth of
    # BERT-base's 768, the released default division. coef is taken at the start and at 1/5, 2/5, 3/5 and 4/5 of the
    # penalised stage: epochs 4, 8, 12 and 16 of 20.
    "block_structured": {
        "block_height": 1,
        "block_width": 96,
        "sparsity": 0.5,
        "sparsity_schedule": "one_shot",
        "sparsity_end": 0.5,
        "importance": "magnitude",
        "penalty_weight": 1e-4,
        "penalty_form": "loss",
        "penalty_reweights": 5,
        "penalty_epsilon": 1e-3,
        "task_weight": 1.0,
        "kd_weight": 0.0,
        "hidden_weight": 0.0,
        "attention_weight": 0.0,
        "graft_start": 1.0,
        "lr_restart": 0.5,
        "reset_optimizer": True,
    },
    # Tiles on attention, whole units on the feed-forward part: what is removed there can be cropped for good.
    "hybrid": {
        "block_height": 32,
        "block_width": 32,
        "feed_forward": "units",
    },
}

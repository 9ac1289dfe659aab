"""A training run that can be killed anywhere: what a child process of the fault tests does."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from hf_sparse.training.checkpoints.whole import last_whole_checkpoint
from tests.training.scenarios import begin_process
from tests.training.tiny import Watch, bert, make_trainer, rows, weights_of

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
RUN = {
    "max_steps": 8, "sparsity": 0.6, "sparsity_end": 0.7, "mask_updates": 3, "penalty_weight": 1e-3,
    "penalty_reweights": 2, "kd_weight": 0.5, "hidden_weight": 0.3, "graft_start": 0.4, "graft_end": 0.9,
    "weight_decay": 0.1, "max_grad_norm": 0.5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
    "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2,
}  # fmt: skip

# What Python tells of every change to a file, before it happens.
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate"}


def trainer_in(folder: Path, **changes: Any) -> Any:
    """The trainer of the run, of which every random choice is on."""
    return make_trainer(bert(**DROPOUT), folder, rows("classes", 20), **{**RUN, **changes})


def kill_at_change(folder: Path, count: int) -> None:
    """Arrange that this process kills itself at the count-th change to a file below a folder."""
    left = [count]

    def watch(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or writes) and isinstance(args[0], str | bytes | os.PathLike):
            if os.fsdecode(args[0]).startswith(str(folder)):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def train(folder: Path, kill_at: tuple[Path, int] | None, begun: Any) -> None:
    """Begin the run or go on with it, save the final model, and leave the final weights beside it."""
    begin_process()
    if kill_at is not None:
        kill_at_change(*kill_at)
    trainer = trainer_in(folder / "run")
    trainer.add_callback(Watch(on_train_begin=lambda state: begun.set()))
    try:
        last_whole_checkpoint(folder / "run")
        resumed = True
    except ValueError:
        resumed = False
    trainer.train(resume_from_checkpoint=resumed or None)
    trainer.save_model(folder / "final")
    torch.save(weights_of(trainer.model), folder / "weights.part")
    os.replace(folder / "weights.part", folder / "weights.pt")

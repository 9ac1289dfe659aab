"""The moments of a step, passed on from the callbacks of `Trainer` to `SparseDistillTrainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from hf_sparse.training.overrides import refuse_bypassed_methods, refuse_unsupported_steps
from hf_sparse.training.support import refuse_unsupported_optimizer

if TYPE_CHECKING:
    from hf_sparse.training.trainer import SparseDistillTrainer


class StepHooks(TrainerCallback):
    """Calls the trainer back. Keeps no state, so that nothing is restored from checkpoints."""

    def __init__(self, trainer: SparseDistillTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Once the number of steps is known, and the optimizer made."""
        refuse_unsupported_steps(self.trainer)
        self.trainer.compare_length()
        refuse_unsupported_optimizer(self.trainer)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Before the forward."""
        self.trainer.begin_step()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Before the optimizer moves anything."""
        refuse_bypassed_methods(self.trainer)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """After the optimizer has moved the weights."""
        self.trainer.finish_step()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """At the end, however it came."""
        self.trainer.pruner.check_target()

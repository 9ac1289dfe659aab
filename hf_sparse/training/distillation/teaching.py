"""The teaching side of the trainer: its teacher, measured like the student, and what is trained for it alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_sparse.training.checkpoints.publishing import PublishingTrainer
from hf_sparse.training.config import SparseDistillConfig
from hf_sparse.training.distillation.distiller import Distiller


class TeachingTrainer(PublishingTrainer):
    """Holds the teacher, and trains the projections that a teacher of another width needs."""

    args: SparseDistillConfig
    distiller: Distiller

    @property
    def teacher_model(self) -> nn.Module | None:
        """The teacher; None before training starts where it is a copy of the dense model, or where none is used."""
        return self.distiller.teacher

    @property
    def student(self) -> nn.Module:
        """The model being pruned, without the wrappers of a distributed run or a compiler."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer as `Trainer` does; it also trains projections of hidden states.

        Raises:
            ValueError: if a learning-rate schedule was given that does not know them.
        """
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.distiller.projections is not None and self.distiller.projections.add_to(optimizer):
            if self.lr_scheduler is not None:
                raise ValueError(
                    "optimizers=(optimizer, schedule) holds a schedule for the model's parameters alone, and "
                    "hidden_weight with a teacher of another width trains projections as well: give "
                    "optimizers=(optimizer, None) with lr_scheduler_type, use a teacher of the model's width, or set "
                    "hidden_weight=0."
                )
        return optimizer

    def end_backward(self) -> None:
        """Let all ranks agree on the gradients of what no distributed wrapper holds."""
        if self.distiller.projections is not None:
            self.distiller.projections.average_gradients_()

    def end_update(self) -> None:
        """Clear those gradients: `Trainer` clears the model's alone."""
        if self.distiller.projections is not None:
            self.distiller.projections.zero_grad()

    def evaluate_teacher(self, eval_dataset: Any = None) -> dict[str, float]:
        """Measure the dense teacher as `evaluate` measures the student, for the comparison in the model card.

        Args:
            eval_dataset: None = the trainer's own; several, as {name: data set}, as `evaluate` takes them.

        Returns:
            Metrics with the prefix "teacher_", of several data sets "teacher_<name>_".

        Raises:
            ValueError: if the run has no teacher, or there is nothing to evaluate it on.
        """
        if not self.args.needs_teacher:
            raise ValueError(
                "no teacher to evaluate: neither kd_weight nor hidden_weight nor attention_weight asks for one."
            )
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if data is None:
            raise ValueError("no data to evaluate the teacher on: give eval_dataset, here or to the trainer.")
        sets = (
            {f"teacher_{name}": part for name, part in data.items()} if isinstance(data, dict) else {"teacher": data}
        )
        student, wrapped = self.model, self.model_wrapped
        teacher = self.distiller.hire(self.student, self.args.device)
        metrics: dict[str, float] = {}
        try:
            self.model = self.model_wrapped = teacher
            for prefix, part in sets.items():
                metrics |= self.predict(part, metric_key_prefix=prefix).metrics or {}
        finally:
            self.model, self.model_wrapped = student, wrapped
        self._teacher_metrics = {key.removeprefix("teacher_"): value for key, value in metrics.items()}
        return metrics

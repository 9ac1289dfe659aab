"""What code of the user may put in place of ours, refused where a part of the training would be lost without a word.

Subclasses of `Trainer` often write `compute_loss` or `training_step` anew, and optimizers may be of any kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.training_args import OptimizerNames

if TYPE_CHECKING:
    from hf_sparse.training.trainer import SparseDistillTrainer


def refuse_bypassed_methods(trainer: SparseDistillTrainer) -> None:
    """Refuse a step that has gone past a method of the trainer which it needed; called before the optimizer moves.

    Args:
        trainer: `passed` names the methods that this step's micro-batches went through; emptied for the next step.

    Raises:
        RuntimeError: naming the method, what was lost and the way out.
    """
    passed, config, name = set(trainer.passed), trainer.args, type(trainer).__name__
    trainer.passed.clear()
    lost = ["the teacher"] if config.needs_teacher else []
    lost += ["the shares of micro-batches of different size"] if trainer.totals.counts is not None else []
    if lost and "compute_loss" not in passed:
        raise RuntimeError(
            f"{name}.compute_loss does not call super().compute_loss, which leaves out {' and '.join(lost)}. Pass a "
            f"task loss of your own as compute_loss_func, or add to what super().compute_loss returns. Without a "
            f"teacher (kd_weight=0, hidden_weight=0, attention_weight=0, graft_start=1) and with one micro-batch per "
            f"step on one process, compute_loss may be written anew."
        )
    if (config.sparsity or config.penalty_weight) and "training_step" not in passed:
        raise RuntimeError(
            f"{name}.training_step does not call super().training_step, which adds the penalty's gradient and keeps "
            f"pruned blocks out of the norm that gradients are clipped by. Call it, and do your own part around it."
        )


def refuse_unsupported_steps(trainer: SparseDistillTrainer) -> None:
    """Refuse optimizers and schedules with which a run would not do what its settings say.

    Raises:
        ValueError: for an optimizer that moves weights inside the backward, that holds two sets of them or none of the
            model's, and for a given schedule that `lr_restart` does not reach; naming it and the way out.
    """
    args, optimizer = trainer.args, trainer.optimizer
    if args.optim in _STEP_IN_BACKWARD:
        raise ValueError(
            f"optim={OptimizerNames(args.optim).value!r} is not supported: it moves weights while gradients are "
            f"still being computed, before the penalty is added and pruned blocks are left out. Use an "
            f"optimizer that steps after the backward, such as adamw_torch or adafactor."
        )
    plain = getattr(optimizer, "optimizer", optimizer)
    if callable(getattr(plain, "train", None)) and callable(getattr(plain, "eval", None)):
        raise ValueError(
            f"{type(plain).__name__} is not supported: it holds one set of weights for training and another for "
            f"evaluation, in which pruned blocks would not be zero. Use one without, such as adamw_torch."
        )
    groups = [] if optimizer is None else optimizer.param_groups
    held = {id(parameter) for group in groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in trainer.student.parameters()):
        raise ValueError(
            f"optimizers=: the {type(plain).__name__} holds none of the parameters of the model, which would be "
            f"pruned and never trained. Make it from the parameters of the very model that the trainer is given."
        )
    if args.lr_restart and not trainer._created_lr_scheduler:
        raise ValueError(
            f"lr_restart={args.lr_restart} does not reach a schedule that is given with optimizers=: give "
            f"optimizers=(optimizer, None) with lr_scheduler_type, or set lr_restart=0."
        )


_STEP_IN_BACKWARD = {
    OptimizerNames(name)
    for name in ("lomo", "adalomo", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise",
                 "galore_adafactor_layerwise", "apollo_adamw_layerwise")
    if name in {known.value for known in OptimizerNames}
}  # fmt: skip

"""What two ranks do together: runs under a launcher, trains in several ways and leaves what it saw in a folder.

Started by test_two_ranks.py, which holds the assertions; each entry of a rank's file is one scenario.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_sparse.training.pruning import pruner
from tests.training.scenarios import TASKS, begin_process, everything_on, model_for, wider_teacher
from tests.training.test_speech import ctc
from tests.training.test_trainer_options import mean_loss, sum_loss
from tests.training.tiny import CHECKPOINTING, Watch, bert, gradients_of, make_trainer, pruned_zero, rows, weights_of

RESUMED = {
    "max_steps": 6, "sparsity": 0.6, "sparsity_end": 0.7, "mask_updates": 2, "penalty_weight": 1e-3, "kd_weight": 0.5,
    "hidden_weight": 0.3, "graft_start": 0.4, "graft_end": 0.9, "weight_decay": 0.1, "max_grad_norm": 0.5,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
}  # fmt: skip
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def setting(folder: Path) -> dict[str, Any]:
    """Who is here, and in what."""
    trainer = make_trainer(bert(), folder, rows("classes", 8), sparsity=0.0, kd_weight=0.0, max_steps=1,
                           per_device_train_batch_size=4)  # fmt: skip
    trainer.train()
    return {
        "world_size": trainer.args.world_size,
        "backend": dist.get_backend(),
        "wrapper": type(trainer.model_wrapped).__name__,
        "rank": dist.get_rank(),
    }


def invariance(folder: Path) -> dict[str, Any]:
    """Gradients of all tasks, 8 samples per step over 2 ranks, whole and in micro-batches; and what was logged."""
    seen: dict[str, Any] = {}
    for task in TASKS:
        for per_device, accumulate in ((4, 1), (2, 2)) if task in ("classes", "lm") else ((4, 1),):
            trainer = everything_on(task, folder, per_device, accumulate, logging_strategy="steps", logging_steps=1)
            gradients = gradients_of(trainer)
            logs = [entry for entry in trainer.state.log_history if "loss" in entry]
            seen[f"{task} {per_device} x {accumulate}"] = {
                "gradients": gradients, "logs": logs, "masks": trainer.pruner.masks.state_dict(),
                "weights": weights_of(trainer.model),
            }  # fmt: skip
    return seen


def masks_agree(folder: Path) -> dict[str, Any]:
    """Masks and coefficients after every step, where rank 1 alone would have chosen others."""
    trainer = make_trainer(bert(), folder, rows("classes", 16), sparsity=0.5, sparsity_end=0.6, penalty_weight=1e-3,
                           kd_weight=0.0, max_steps=5, per_device_train_batch_size=4)  # fmt: skip
    masks, choose = trainer.pruner.masks, trainer.pruner.masks.choose
    alone: list[dict[str, Tensor]] = []

    def choose_at_random(sparsity: float, scores: Any, share: float | None) -> None:
        if dist.get_rank() == 1:
            scores = {name: torch.rand(mask.shape) for name, mask in masks.masks.items()}
        choose(sparsity, scores)
        alone.append(masks.state_dict())

    masks.choose = choose_at_random
    agreed: list[dict[str, Tensor]] = []
    coefs: list[dict[str, Tensor]] = []

    def keep(state: Any) -> None:
        agreed.append(masks.state_dict())
        coefs.append({name: coef.clone() for name, coef in trainer.pruner.coefs.items()})

    trainer.add_callback(Watch(on_step_end=keep))
    trainer.train()
    return {"alone": alone, "agreed": agreed, "coefs": coefs, "weights": weights_of(trainer.model)}


def resume(folder: Path) -> dict[str, Any]:
    """Weights after a whole run, and after runs resumed before, between and after the mask updates."""
    data = rows("classes", 20)

    def run(name: str, **train: Any) -> dict[str, Tensor]:
        saving = {} if train else {"save_strategy": "steps", "save_steps": 1}
        trainer = make_trainer(bert(**DROPOUT), folder / name, data, **RESUMED, **saving)
        trainer.train(**train)
        return weights_of(trainer.model)

    straight = run("straight")
    stops = (1, 3, 5, 6)
    resumed = {n: run(f"from-{n}", resume_from_checkpoint=str(folder / "straight" / f"checkpoint-{n}")) for n in stops}
    return {"straight": straight, "resumed": resumed}


def other_world_size(folder: Path) -> dict[str, Any]:
    """Weights of a run whose checkpoints one rank alone goes on with."""
    trainer = make_trainer(bert(), folder, rows("classes", 24), **RESUMED, save_strategy="steps", save_steps=3)
    trainer.train()
    return {"weights": weights_of(trainer.model), "masks": trainer.pruner.masks.state_dict()}


def uneven(folder: Path) -> dict[str, Any]:
    """A run over samples that neither ranks nor steps divide: 11 samples, 2 x 2 x 2 per step."""
    trainer = make_trainer(bert(), folder, rows("classes", 11), **{**RESUMED, "max_steps": -1, "num_train_epochs": 3})
    trainer.train()
    return {"weights": weights_of(trainer.model), "steps": trainer.state.global_step, "zero": pruned_zero(trainer)}


def evaluation(folder: Path) -> dict[str, Any]:
    """Evaluation, the best checkpoint and the final save of a run."""
    data = rows("classes", 16)
    trainer = make_trainer(
        bert(), folder / "run", data, sparsity=0.5, sparsity_end=0.4, hidden_weight=0.5, graft_start=0.3,
        graft_end=1.0, max_steps=4, per_device_train_batch_size=4, per_device_eval_batch_size=4, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
        extra={"eval_dataset": data},
    )  # fmt: skip
    trainer.train()
    trainer.save_model(folder / "final")
    dist.barrier()
    return {
        "eval_loss": trainer.evaluate()["eval_loss"],
        "teacher_loss": trainer.evaluate_teacher()["teacher_loss"],
        "best": trainer.state.best_model_checkpoint,
        "weights": weights_of(trainer.model),
        "masks": trainer.pruner.masks.state_dict(),
    }


def loss_functions(folder: Path) -> dict[str, Any]:
    """Gradients under a loss function of the user: a mean, and a sum over the count that Trainer gives."""
    seen = {}
    for function in (mean_loss, sum_loss):
        trainer = make_trainer(
            model_for("tagging", 0), folder, rows("tagging", 8), sparsity=0.0, kd_weight=0.0, max_steps=1,
            optim="sgd", max_grad_norm=0.0, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            extra={"compute_loss_func": function},
        )  # fmt: skip
        seen[function.__name__] = gradients_of(trainer)[0]
    return seen


def checkpointing(folder: Path) -> dict[str, Any]:
    """Gradients with grafting and activation checkpointing, which need unused parameters to be looked for."""
    return {"gradients": gradients_of(everything_on("classes", folder, 4, 1, **{CHECKPOINTING: True}))}


def wide(folder: Path) -> dict[str, Any]:
    """A teacher of another width: the projections are trained beside what DDP wraps."""
    return wider_teacher(folder, 4)


def speech(folder: Path) -> dict[str, Any]:
    """Gradients of CTC, whose loss is a mean over recordings or a sum over them."""
    return {reduction: gradients_of(ctc(reduction, folder, 2, 2)) for reduction in ("mean", "sum")}


def tampering(folder: Path) -> dict[str, Any]:
    """What a run says in which one bit of one mask changes on one rank: between updates, in one, after the last."""
    name, seen = "bert.encoder.layer.1.attention.self.key", {}

    def flip(trainer: Any) -> None:
        if dist.get_rank() == 1:
            trainer.pruner.masks.bits[name][0] ^= 1

    for moment in ("between", "in", "after", "never"):
        trainer = make_trainer(bert(), folder, rows("classes", 16), sparsity=0.5, sparsity_end=0.6, kd_weight=0.0,
                               max_steps=6, mask_updates=2, per_device_train_batch_size=4)  # fmt: skip
        trainer.train_steps = 0

        def at_step_end(state: Any, trainer: Any = trainer, moment: str = moment) -> None:
            trainer.train_steps = state.global_step
            if (moment == "between" and state.global_step == 3) or (moment == "after" and state.global_step == 5):
                flip(trainer)

        trainer.add_callback(Watch(on_step_end=at_step_end))
        if moment == "in":
            received = pruner.broadcast_from_rank_0_

            def received_wrongly(tensors: Any, trainer: Any = trainer, received: Any = received) -> None:
                received(tensors)
                flip(trainer)

            pruner.broadcast_from_rank_0_ = received_wrongly
        try:
            trainer.train()
            seen[moment] = "", trainer.train_steps
        except RuntimeError as error:
            seen[moment] = str(error), trainer.train_steps
        finally:
            if moment == "in":
                pruner.broadcast_from_rank_0_ = received
    return seen


def off_target(folder: Path) -> dict[str, Any]:
    """What a run that stops early says."""
    trainer = make_trainer(
        bert(), folder, rows("classes", 8), sparsity=0.5, max_steps=8, per_device_train_batch_size=4
    )

    def stop(state: Any) -> None:
        trainer.control.should_training_stop = state.global_step == 2

    trainer.add_callback(Watch(on_step_end=stop))
    try:
        trainer.train()
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": ""}


SCENARIOS = (
    setting, invariance, masks_agree, resume, other_world_size, uneven, evaluation, loss_functions, checkpointing,
    wide, speech, tampering, off_target,
)  # fmt: skip


def main() -> None:
    """Run every scenario and save what this rank saw."""
    folder = Path(sys.argv[1])
    begin_process()
    seen = {scenario.__name__: scenario(folder / scenario.__name__) for scenario in SCENARIOS}
    torch.save(seen, folder / f"rank-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

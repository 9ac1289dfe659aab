"""What ranks do together under FSDP2: runs under a launcher, and leaves what each rank saw in a folder.

Started by test_fsdp.py, which holds the assertions. No shard of an attention weight holds a whole block.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_sparse import SparseDistillTrainer
from hf_sparse.training.distributed.shards import parts_of_shard
from tests.distributed.cpu_fsdp import fsdp_on_cpu
from tests.distributed.fsdp_settings import BLOCKS, RANKS, RUN, SPLIT, fsdp2
from tests.distributed.traffic import counted
from tests.mixtures import mixture
from tests.training.scenarios import begin_process, everything_on
from tests.training.tiny import (
    CHECKPOINTING,
    Watch,
    bert,
    gradients_of,
    make_trainer,
    pad,
    rows,
    sparse_config,
    weights_of,
)

SHARDED, FULL = fsdp2(), fsdp2("FULL_STATE_DICT")
# Masks are chosen before steps 1 and 3, coefficients before steps 0 and 1, the penalty acts up to step 2.
TRAFFIC = {
    **BLOCKS, "max_steps": 5, "sparsity": 0.5, "sparsity_end": 0.6, "mask_updates": 2, "penalty_weight": 1e-3,
    "penalty_reweights": 2, "hidden_weight": 0.3, "graft_start": 0.5, "graft_end": 0.9,
}  # fmt: skip
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
STOPS = (1, 3, 5) if RANKS == 2 else (3,)


def setting(folder: Path) -> dict[str, Any]:
    """How the weights lie, before and after, and how often a shard's edge cuts through blocks."""
    trainer = make_trainer(bert(), folder, rows("classes", 8), **BLOCKS, **SHARDED, **SPLIT, max_steps=1)
    trainer.train()
    cut = 0
    for name, weight in trainer.pruner.masks.weights():
        height = weight.to_local().shape[0]
        shape = trainer.pruner.masks.block_shapes[name]
        parts = parts_of_shard((dist.get_rank() * height, 0), (height, weight.shape[1]), shape)
        cut += any(part.shape != shape for part in parts)
    of_teacher = next(trainer.teacher_model.bert.encoder.layer[0].parameters())
    return {
        "world_size": trainer.args.world_size, "rank": dist.get_rank(), "class": type(trainer.model).__name__,
        "sharded": [isinstance(p, DTensor) for p in trainer.model.parameters()], "cut": cut,
        "teacher_sharded": isinstance(of_teacher, DTensor),
    }  # fmt: skip


def invariance(folder: Path) -> dict[str, Any]:
    """Gradients with every loss, the penalty and the masks on, with and without grafting, and what was logged."""
    seen: dict[str, Any] = {}
    cases: list[tuple[str, int, dict[str, Any]]] = [
        ("classes", 1, {}), ("lm", 1, {"graft_start": 1.0}), ("gpt2", 1, {}), ("classes", 2, {"graft_start": 1.0}),
    ]  # fmt: skip
    for task, accumulate, changes in cases if RANKS == 2 else cases[::2]:
        # GPT-2 stores its weights the other way round: there the shards cut through the width of blocks.
        shape = {"gpt2": {"block_height": 2, "block_width": 16}, "lm": {"block_height": 8}}.get(task, BLOCKS)
        # SGD keeps no second moments, without which Fisher information is refused on shards.
        changes = {"importance": "magnitude", **changes}
        trainer = everything_on(
            task, folder, 8 // RANKS // accumulate, accumulate, logging_strategy="steps", logging_steps=1, **shape,
            **SHARDED, **changes,
        )  # fmt: skip
        gradients = gradients_of(trainer)
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        seen[f"{task} {accumulate}"] = {
            "gradients": gradients, "logs": logs, "masks": trainer.pruner.masks.state_dict(),
            "weights": weights_of(trainer.student), "changes": {**shape, **changes},
        }  # fmt: skip
    return seen


def whole_runs(folder: Path) -> dict[str, Any]:
    """Runs to the end with AdamW and clipping: final weights, masks, coefficients."""
    seen = {}
    for name, changes in {
        "loss": {}, "proximal": {"penalty_form": "proximal"}, "activation": {"importance": "activation"},
        "fisher": {"importance": "fisher"},
        "global": {"sparsity_scope": "global"}, "grafted": {"graft_start": 0.4, "graft_end": 0.9},
    }.items():  # fmt: skip
        zero: list[bool] = []
        trainer = make_trainer(bert(), folder, rows("classes", 32), **RUN, **SPLIT, **SHARDED, **changes)
        trainer.add_callback(Watch(on_step_end=lambda s, t=trainer, z=zero: z.append(t.pruner.masks.is_applied())))
        trainer.train()
        seen[name] = {
            "weights": weights_of(trainer.student), "masks": trainer.pruner.masks.state_dict(),
            "coefs": trainer.pruner.coefs, "zero": zero, "changes": changes,
        }  # fmt: skip
    return seen


def resume(folder: Path) -> dict[str, Any]:
    """Weights after a whole run and after resumed ones, from checkpoints of shards and from whole ones."""
    seen: dict[str, Any] = {}
    kinds = {"sharded": SHARDED, "full": FULL} if RANKS == 2 else {"sharded": SHARDED}
    for kind, fsdp in kinds.items():

        def run(name: str, kind: str = kind, fsdp: Any = fsdp, **train: Any) -> dict[str, Tensor]:
            saving = {} if train else {"save_strategy": "steps", "save_steps": 1}
            trainer = make_trainer(bert(**DROPOUT), folder / kind / name, rows("classes", 20), **RUN, **SPLIT, **fsdp,
                                   **saving)  # fmt: skip
            trainer.train(**train)
            return weights_of(trainer.student)

        straight = run("straight")
        checkpoint = str(folder / kind / "straight" / "checkpoint-{}")
        resumed = {n: run(f"from-{n}", resume_from_checkpoint=checkpoint.format(n)) for n in STOPS}
        seen[kind] = {"straight": straight, "resumed": resumed}
    return seen


def saving(folder: Path) -> dict[str, Any]:
    """Evaluation between steps, the best checkpoint, the final save, a second save after more training."""
    data = rows("classes", 16)
    trainer = make_trainer(
        bert(), folder / "run", data, **{**RUN, "sparsity_end": 0.4, "max_steps": 4}, **SPLIT, **SHARDED,
        per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="loss", extra={"eval_dataset": data},
    )  # fmt: skip
    trainer.train()
    trainer.save_model(folder / "final")
    dist.barrier()
    weights = weights_of(trainer.student)
    return {
        "best": trainer.state.best_model_checkpoint, "eval_loss": trainer.evaluate()["eval_loss"], "weights": weights,
        "teacher_loss": trainer.evaluate_teacher()["teacher_loss"], "masks": trainer.pruner.masks.state_dict(),
        "applied": trainer.pruner.masks.is_applied(),
    }  # fmt: skip


def options(folder: Path) -> dict[str, Any]:
    """Mixed precision, activation checkpointing of FSDP and of the model, loading on one rank alone."""
    seen: dict[str, Any] = {}
    checkpointing = fsdp2(activation_checkpointing=True)
    for name, changes in {
        "plain": SHARDED, "bf16": {**SHARDED, "bf16": True}, "checkpointing": checkpointing,
        "checkpointing_of_model": {**SHARDED, CHECKPOINTING: True},
    }.items():  # fmt: skip
        trainer = make_trainer(bert(), folder / name, rows("classes", 16), **RUN, **SPLIT, **changes)
        trainer.train()
        trainer.save_model(folder / name / "final")
        seen[name] = weights_of(trainer.student)
        dist.barrier()
    # Where a checkpoint is loaded on one rank alone, the others hold anything.
    model = bert(seed=dist.get_rank())
    fsdp = fsdp2(cpu_ram_efficient_loading=True)
    trainer = make_trainer(model, folder / "efficient", rows("classes", 16), **RUN, **SPLIT, **fsdp)
    trainer.train()
    seen["efficient"] = weights_of(trainer.student)
    return seen


def traffic(folder: Path) -> dict[str, Any]:
    """Bytes that each step sends, and the end, under DDP and FSDP2."""
    seen: dict[str, Any] = {}
    for engine, fsdp in (("ddp", {}), ("fsdp2", SHARDED)):
        for importance in ("fisher", "magnitude", "activation"):
            trainer = make_trainer(bert(), folder, rows("classes", 16), **TRAFFIC, **SPLIT, **fsdp,
                                   importance=importance)  # fmt: skip
            with counted() as sent:
                steps: list[dict[str, int]] = []
                trainer.add_callback(Watch(on_step_end=lambda state, s=steps, c=sent: (s.append(dict(c)), c.clear())))
                trainer.train()
            seen[f"{engine} {importance}"] = {"steps": steps, "end": dict(sent)}
    return seen


def refusals(folder: Path) -> dict[str, Any]:
    """What is said to runs that end off target, and to FSDP1."""
    trainer = make_trainer(bert(), folder, rows("classes", 8), **{**RUN, "max_steps": 8}, **SPLIT, **SHARDED)

    def stop(state: Any) -> None:
        trainer.control.should_training_stop = state.global_step == 2

    trainer.add_callback(Watch(on_step_end=stop))
    seen: dict[str, Any] = {"off_target": "", "late_teacher": "", "projections": ""}
    try:
        trainer.train()
    except RuntimeError as error:
        seen["off_target"] = str(error)
    try:
        make_trainer(
            bert(), folder, rows("classes", 8), bert(hidden_size=32), **{**RUN, "hidden_weight": 0.5}, **SHARDED
        )
    except ValueError as error:
        seen["projections"] = str(error)
    seen["fisher"] = fisher_refusals(folder)
    trainer.distiller.teacher = None
    try:
        trainer.train()
    except RuntimeError as error:
        seen["late_teacher"] = str(error)
    return seen


def mixture_of_experts(folder: Path) -> dict[str, Any]:
    """A mixture: each rank holds two of its four experts. And one whose experts cannot be shared."""
    run = {**RUN, "block_height": 8, "block_width": 1}
    trainer = make_trainer(mixture("mixtral"), folder, rows("lm", 16), **run, **SPLIT, **SHARDED)
    trainer.train()
    trainer.save_model(folder / "final")
    dist.barrier()
    refused = ""
    try:
        make_trainer(mixture("mixtral", num_local_experts=3), folder, rows("lm", 16), **run, **SPLIT, **SHARDED)
    except ValueError as error:
        refused = str(error)
    experts = {name: p for name, p in trainer.student.named_parameters() if ".experts." in name}
    return {
        "local": {name: tuple(p.to_local().shape) for name, p in experts.items()}, "refused": refused,
        "masks": trainer.pruner.masks.state_dict(), "weights": weights_of(trainer.student), "run": run,
    }  # fmt: skip


def fisher_refusals(folder: Path) -> dict[str, tuple[str, bool, int]]:
    """When and how optimizers are refused that keep no second moments, in every way in which one can be given."""
    seen, made, stepped = {}, [False], [0]

    class Own(SparseDistillTrainer):
        def create_optimizer(self, *args: Any) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    class WantsMore(torch.optim.SGD):
        def __init__(self, params: Any, lr: float = 0.1) -> None:
            params = list(params)
            assert len(params) > 1, "more than the one weight with which optimizers are tried"
            super().__init__(params, lr)

    for name, kind, changes, extra in (
        ("named", SparseDistillTrainer, {"optim": "sgd"}, {}),
        ("class", SparseDistillTrainer, {}, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}),
        ("own", Own, {}, {}),
        ("untried", SparseDistillTrainer, {}, {"optimizer_cls_and_kwargs": (WantsMore, {})}),
        ("unneeded", SparseDistillTrainer, {"optim": "sgd", "sparsity": 0.0}, {}),
    ):
        made[0], stepped[0] = False, 0
        config = sparse_config(folder, **{**RUN, "importance": "fisher", **changes}, **SPLIT, **SHARDED)
        try:
            trainer: Any = kind(bert(), config, data_collator=pad, train_dataset=rows("classes", 8), **extra)
            made[0] = True
            trainer.add_callback(Watch(on_step_begin=lambda state: stepped.__setitem__(0, state.global_step + 1)))
            trainer.train()
            seen[name] = "", made[0], stepped[0]
        except ValueError as error:
            seen[name] = str(error), made[0], stepped[0]
    return seen


SCENARIOS = {
    2: (setting, invariance, whole_runs, resume, saving, options, traffic, refusals, mixture_of_experts),
    4: (setting, invariance, resume, traffic),
}


def main() -> None:
    """Run the scenarios of this number of ranks and save what this rank saw."""
    folder = Path(sys.argv[1])
    begin_process()
    seen = {}
    for scenario in SCENARIOS[RANKS]:
        with fsdp_on_cpu():
            seen[scenario.__name__] = scenario(folder / scenario.__name__)
    torch.save(seen, folder / f"rank-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

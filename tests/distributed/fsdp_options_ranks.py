"""What FSDP2 is combined with: another number of ranks, copies of shards, offload to the CPU, the compiler.

Started by test_fsdp_options.py on 2 ranks, then on 4 and on 2 again, which go on with the checkpoints before theirs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from torch.distributed.tensor import DTensor

from tests.distributed.cpu_fsdp import fsdp_on_cpu
from tests.distributed.fsdp_settings import RANKS, RUN, SPLIT, fsdp2
from tests.training.scenarios import begin_process
from tests.training.tiny import Watch, bert, make_trainer, pad_to_10, rows, weights_of

STOP = 3
SAVING = {"save_strategy": "steps", "save_steps": STOP}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
# What a run is without ranks; one layer where it is compiled, which takes most of the time. Grafting beside hidden
# states, and importance by activations, run the model by itself, outside the training loop.
ALONE: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": {"layers": 1, "graft_start": 0.4, "graft_end": 0.9, "importance": "activation"},
}


def trainer_of(folder: Path, layers: int = 2, **changes: Any) -> Any:
    """The trainer of a run; all rows are of one length, so that a compiler sees one shape."""
    # Adam must not divide by gradients that are all but zero, where rounding is all there is.
    run = {**RUN, "adam_epsilon": 1e-3, **changes}
    return make_trainer(
        bert(num_hidden_layers=layers), folder, rows("classes", 48), extra={"data_collator": pad_to_10}, **run
    )


def train(
    folder: Path, resume: Path | None = None, save: bool = False, layers: int = 2, **changes: Any
) -> dict[str, Any]:
    """Run to the end, or from a checkpoint on; what came of it."""
    trainer = trainer_of(folder, layers, **SPLIT, **changes)
    zero: list[bool] = []
    trainer.add_callback(Watch(on_step_end=lambda state: zero.append(trainer.pruner.masks.is_applied())))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if save:
        trainer.save_model(folder / "final")
        dist.barrier()
    parameter = next(iter(trainer.pruner.masks.weights()))[1]
    # To evaluate, a compiler begins anew.
    evaluated = None if "torch_compile" in changes else trainer.evaluate(rows("classes", 16))["eval_loss"]
    return {
        "weights": {name.replace("_orig_mod.", ""): weight for name, weight in weights_of(trainer.student).items()},
        "masks": trainer.pruner.masks.state_dict(), "coefs": trainer.pruner.coefs, "zero": zero,
        "placements": str(parameter.placements) if isinstance(parameter, DTensor) else "whole",
        "mesh": tuple(parameter.device_mesh.shape) if isinstance(parameter, DTensor) else (),
        "wrapped": type(trainer.model_wrapped).__name__, "evaluated": evaluated,
    }  # fmt: skip


def main() -> None:
    """Run what this number of ranks can, and save what this rank saw."""
    folder, before = Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None
    begin_process()
    seen: dict[str, Any] = {}
    plan: dict[str, dict[str, Any]] = {}
    if before is not None:
        plan["resumed"] = {**fsdp2(), "resume": before / "saved" / f"checkpoint-{STOP}"}
    if before is None or RANKS == 4:
        plan["saved"] = {**fsdp2(), **SAVING}
    if RANKS == 4:
        parallelism = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
        plan["hsdp"] = {**fsdp2(), "parallelism_config": parallelism, "save": True}
    elif before is None:
        plan["offload"] = {**fsdp2(cpu_offload=True), "save": True}
        plan["compiled"] = {**fsdp2(), **COMPILED, **ALONE["compiled"], "save": True}
        plan["ddp compiled"] = {**COMPILED, **ALONE["compiled"], "save": True}
    for name, changes in plan.items():
        with fsdp_on_cpu():
            seen[name] = train(folder / name, **changes)
    torch.save(seen, folder / f"rank-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

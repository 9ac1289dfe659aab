"""Check and time training on the GPUs of this machine: DDP and FSDP2 with every feature on, beside the bare Trainer.

    torchrun --nproc-per-node 8 benchmarks/many_gpus.py
    torchrun --nproc-per-node 8 benchmarks/many_gpus.py --engines ddp fsdp2 hsdp offload
    torchrun --nproc-per-node 2 benchmarks/many_gpus.py --device cpu --smoke

For each engine a small BERT is trained with masks, penalty, distillation of logits, hidden states and attention maps,
and grafting. Masks and weights have to be equal on all ranks, and those of one process that trains alone; between two
updates of the masks, no code of hf_sparse may wait for the device; what Trainer and the model wait for by themselves
is counted beside it. Only then steps are timed: the bare Trainer with a teacher's forward, and hf_sparse with
everything on, take turns. Any difference ends the run, and no time is written.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from accelerate import ParallelismConfig  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainingArguments  # noqa: E402
from transformers.utils import logging  # noqa: E402

from benchmarks.training import TINY, Samples, StopAfter, TeacherBeside, run  # noqa: E402
from hf_sparse import SparseDistillConfig, SparseDistillTrainer, plan_step  # noqa: E402
from hf_sparse.inference.measuring.environment import environment  # noqa: E402

ENGINES = ("ddp", "fsdp2", "hsdp", "offload")
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EVERYTHING: dict[str, Any] = {
    "penalty_weight": 1e-3, "task_weight": 0.5, "kd_weight": 0.5, "hidden_weight": 0.3, "attention_weight": 0.5,
    "graft_start": 0.5, "graft_end": 0.9, "weight_decay": 0.1, "max_grad_norm": 0.5,
}  # fmt: skip
CHECKED: dict[str, Any] = {
    **EVERYTHING, "max_steps": 10, "sparsity": 0.6, "sparsity_end": 0.7, "mask_updates": 2, "penalty_reweights": 2,
    "learning_rate": 1e-3,
}  # fmt: skip
# Between two updates of the masks, which are the rule; with so little grafting that the student does its own work.
TIMED: dict[str, Any] = {
    **EVERYTHING, "max_steps": 100_000, "sparsity": 0.8, "sparsity_end": 0.9, "mask_updates": 1,
    "penalty_weight": 1e-5, "attention_weight": 0.0, "graft_start": 0.999, "graft_end": 1.0,
}  # fmt: skip
PER_RANK, WARM_UP, ROUNDS = 4, 3, 2
# As close as sums in another order come to each other after Adam has divided by the size of gradients.
CLOSE: dict[str, Any] = {"rtol": 2e-3, "atol": 2e-4}
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def engine_settings(engine: str, ranks: int) -> dict[str, Any]:
    """Give the training arguments of an engine.

    Raises:
        ValueError: if the number of ranks does not fit it.
    """
    if engine == "ddp":
        return {}
    config = {
        "version": 2, "state_dict_type": "SHARDED_STATE_DICT", "cpu_offload": engine == "offload",
        # hf_sparse finds it by itself; the bare Trainer fails on what BERT names.
        "transformer_layer_cls_to_wrap": "BertLayer",
    }  # fmt: skip
    given: dict[str, Any] = {"fsdp": True, "fsdp_config": config}
    if engine == "hsdp":
        if ranks < 4 or ranks % 2:
            raise ValueError(
                f"hsdp needs an even number of at least 4 ranks, there are {ranks}: leave it out of --engines."
            )
        given["parallelism_config"] = ParallelismConfig(dp_replicate_size=2, dp_shard_size=ranks // 2)
    return given


@contextlib.contextmanager
def engine_of(engine: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Give the training arguments of an engine, and leave no trace of it for the next one."""
    with contextlib.ExitStack() as stack:
        if args.device == "cpu" and engine != "ddp":
            # accelerate shards over accelerators alone; the tests know how to make it do so here.
            from tests.distributed.cpu_fsdp import fsdp_on_cpu

            stack.enter_context(fsdp_on_cpu())
        try:
            yield engine_settings(engine, world_size())
        finally:
            os.environ.pop("ACCELERATE_USE_FSDP", None)


def world_size() -> int:
    """Ranks of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_trainer(
    kind: Any, config: BertConfig, args: argparse.Namespace, batch: int, length: int, **given: Any
) -> Any:
    """Make a trainer of a kind, the bare one with a teacher beside it; models and data are those of the seed."""
    torch.manual_seed(0)
    student, teacher = BertForSequenceClassification(config), BertForSequenceClassification(config)
    arguments = {
        "output_dir": tempfile.mkdtemp(), "use_cpu": args.device == "cpu", "per_device_train_batch_size": batch,
        "save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 1, **given,
    }  # fmt: skip
    data = Samples(64 * batch * (world_size() if args.ranks is None else 1), length, config.vocab_size)
    if kind is SparseDistillTrainer:
        return kind(student, SparseDistillConfig(**arguments), train_dataset=data, teacher_model=teacher)
    known = {name: value for name, value in arguments.items() if name in TrainingArguments.__dataclass_fields__}
    trainer = kind(student, TrainingArguments(**known), train_dataset=data)
    trainer.teacher, trainer.hidden = teacher.to(trainer.args.device).eval().requires_grad_(False), True
    return trainer


def small() -> BertConfig:
    """The model of the checks."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    sizes |= {"num_attention_heads": 2, "vocab_size": 500, "attn_implementation": "eager"}
    return BertConfig(**sizes, **NO_DROPOUT)


def result(trainer: Any) -> dict[str, dict[str, Tensor]]:
    """Give masks and whole weights, on the host; call it on all ranks."""
    weights = {}
    for name, parameter in trainer.student.named_parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        weights[name] = whole.detach().cpu().clone()
    return {"weights": weights, "masks": trainer.pruner.masks.state_dict()}


class Waits:
    """Counts what waits for the GPU in the steps that it is told to watch, by the file of whoever called torch.

    Args:
        quiet: whether to watch a step, by its number.
    """

    def __init__(self, quiet: Sequence[int]) -> None:
        self.quiet, self.ours, self.others = set(quiet), Counter[str](), Counter[str]()

    def watch(self, trainer: Any) -> None:
        """Watch a trainer's steps, from before its callbacks to after them."""
        callback, waits = TrainerCallback(), self

        def begin(args: Any, state: Any, control: Any, **_: Any) -> None:
            waits.switch(state.global_step in waits.quiet)

        def end(args: Any, state: Any, control: Any, **_: Any) -> None:
            waits.switch(False)

        callback.on_step_begin, callback.on_step_end = begin, end  # type: ignore[method-assign]
        trainer.callback_handler.callbacks.insert(0, callback)

    def switch(self, on: bool) -> None:
        """Let torch tell of everything that waits, or not."""
        torch.cuda.set_sync_debug_mode("warn" if on else "default")

    def add(self) -> None:
        """Count one, by the first caller outside of torch."""
        frame: Any = sys._getframe(1)
        while frame is not None and any(
            part in frame.f_code.co_filename for part in ("/torch/", "warnings", __file__)
        ):
            frame = frame.f_back
        file = "unknown" if frame is None else frame.f_code.co_filename
        count = self.ours if file.startswith(str(REPOSITORY / "hf_sparse")) else self.others
        count["unknown" if frame is None else f"{Path(file).name}:{frame.f_code.co_name}"] += 1

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear torch's warnings until the block ends."""
        before, show = torch.is_warn_always_enabled(), warnings.showwarning

        def heard(message: Any, *rest: Any, **more: Any) -> None:
            if "synchroniz" in str(message):
                self.add()
            else:
                show(message, *rest, **more)

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = heard
            torch.set_warn_always(True)
            try:
                yield
            finally:
                torch.set_warn_always(before)
                warnings.showwarning = show


def train_alone(file: Path, args: argparse.Namespace) -> None:
    """Be the one process with which the ranks are compared, and leave masks and weights in a file."""
    trainer = make_trainer(SparseDistillTrainer, small(), args, PER_RANK * args.ranks, 16, **CHECKED)
    trainer.train()
    torch.save(result(trainer), file)


def alone(args: argparse.Namespace) -> dict[str, dict[str, Tensor]]:
    """Train in one process, started by rank 0 on its device, and give the result to all ranks."""
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "alone.pt"
            keep = {k: v for k, v in os.environ.items() if k not in LAUNCHED and not k.startswith("TORCHELASTIC")}
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            subprocess.run(
                [sys.executable, __file__, f"--device={args.device}", f"--alone={file}", f"--ranks={world_size()}"],
                env={**keep, "CUDA_VISIBLE_DEVICES": visible}, check=True,
            )  # fmt: skip
            found = [torch.load(file, weights_only=True)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def check(engine: str, reference: dict[str, dict[str, Tensor]], args: argparse.Namespace) -> dict[str, Any]:
    """Train with everything on, and compare the ranks with each other and with one process.

    Raises:
        RuntimeError: on all ranks, if anything differs or hf_sparse waits for the device.
    """
    with engine_of(engine, args) as given:
        trainer = make_trainer(SparseDistillTrainer, small(), args, PER_RANK, 16, **CHECKED, **given)
        plans = [plan_step(trainer.args, step, CHECKED["max_steps"]) for step in range(CHECKED["max_steps"])]
        waits = Waits([plan.step for plan in plans[1:] if not plan.update_masks and not plan.update_coefs])
        if args.device == "cuda":
            waits.watch(trainer)
        with waits.listening():
            trainer.train()
        found, wrapped = result(trainer), type(trainer.model_wrapped).__name__
        if not trainer.pruner.masks.is_applied():
            raise RuntimeError(f"{engine}: pruned blocks are not zero")
    digest = hashlib.sha256()
    for part in found.values():
        for tensor in part.values():
            digest.update(tensor.numpy().tobytes())
    seen: list[Any] = [None] * world_size()
    dist.all_gather_object(seen, (digest.hexdigest(), dict(waits.ours)))
    if len({hashed for hashed, _ in seen}) > 1:
        raise RuntimeError(f"{engine}: masks or weights are not the same on all ranks")
    if guilty := [ours for _, ours in seen if ours]:
        raise RuntimeError(f"{engine}: hf_sparse waits for the device between mask updates: {guilty[0]}")
    error = compare(engine, found, reference)
    steps = len(waits.quiet)
    return {
        "engine": engine, "wrapped": wrapped, "equal_on_ranks": True, "masks_as_alone": True,
        "max_weight_error": error,
        "waits_of_hf_sparse": 0 if args.device == "cuda" else None,
        "waits_of_others_per_step": sum(waits.others.values()) / steps if args.device == "cuda" else None,
    }  # fmt: skip


def compare(engine: str, found: dict[str, dict[str, Tensor]], reference: dict[str, dict[str, Tensor]]) -> float:
    """Give the largest difference between two sets of weights.

    Raises:
        RuntimeError: if masks differ at all, or weights by more than rounding.
    """
    differing = sum(int((mask != found["masks"][name]).sum()) for name, mask in reference["masks"].items())
    errors = {
        name: (weight - found["weights"][name]).abs().max().item() for name, weight in reference["weights"].items()
    }
    far = [
        name
        for name, weight in reference["weights"].items()
        if not torch.allclose(found["weights"][name], weight, **CLOSE)
    ]
    if differing or far:
        raise RuntimeError(
            f"{engine}: {differing} blocks are masked otherwise than by one process, and {len(far)} weights differ: "
            f"{ {name: errors[name] for name in far[:3]} }"
        )
    return max(errors.values())


class Clock(TrainerCallback):
    """Takes the time of whole steps, device included, and ends training after a number of them."""

    def __init__(self, steps: int, device: str) -> None:
        self.device, self.stop, self.times, self.last = device, StopAfter(steps), list[float](), 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After a step."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.last:
            self.times.append(1e3 * (now - self.last))
        self.last = now
        self.stop.on_step_end()


def step_times(kind: Any, engine: str, args: argparse.Namespace) -> tuple[list[float], int | None]:
    """Train for a while; the times of its steps in ms, and the peak of memory on this rank's GPU in bytes."""
    config = BertConfig(**(TINY if args.smoke else {}))
    with engine_of(engine, args) as given:
        # Trainers refer to themselves: what the last one held is let go of here.
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        settings = {**TIMED, "bf16": args.device == "cuda", **given}
        trainer = make_trainer(kind, copy.deepcopy(config), args, args.batch, args.length, **settings)
        if kind is SparseDistillTrainer:
            trainer.pruner.masks.choose(TIMED["sparsity"])
            trainer.pruner.masks.apply_()
        clock = Clock(WARM_UP + args.steps, args.device)
        run(trainer, clock)
        peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else None
    return clock.times[WARM_UP - 1 :], peak


def measure(engine: str, args: argparse.Namespace) -> dict[str, Any]:
    """Time the bare Trainer with a teacher's forward, and hf_sparse with everything on, in turns."""
    kinds = {"bare": TeacherBeside, "ours": SparseDistillTrainer}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    peaks: dict[str, int | None] = {}
    for turn in range(ROUNDS):
        for name in sorted(kinds, reverse=bool(turn % 2)):
            taken, peaks[name] = step_times(kinds[name], engine, args)
            times[name] += taken
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    row: dict[str, Any] = {"ratio": round(medians["ours"] / medians["bare"], 4)}
    for name, taken in times.items():
        quartiles = statistics.quantiles(taken, n=4)
        row |= {f"{name}_ms": round(medians[name], 3), f"{name}_spread": [round(q, 3) for q in quartiles[::2]],
                f"{name}_peak_bytes": peaks[name]}  # fmt: skip
    return row


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["ddp", "fsdp2"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument(
        "--smoke", action="store_true", help="time a tiny model for few steps, to see that all of it runs"
    )
    parser.add_argument("--steps", type=int, help="timed steps per turn; 30, or 3 with --smoke")
    parser.add_argument("--batch", type=int, help="samples per step and rank; 32, or 2 with --smoke")
    parser.add_argument("--length", type=int, help="tokens per sample; 128, or 8 with --smoke")
    parser.add_argument("--out", type=Path, help="benchmarks/results/many_gpus.json, or none with --smoke")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    for name, (usual, smoke) in {"steps": (30, 3), "batch": (32, 2), "length": (128, 8)}.items():
        setattr(args, name, getattr(args, name) or (smoke if args.smoke else usual))
    if not args.smoke:
        args.out = args.out or REPOSITORY / "benchmarks" / "results" / "many_gpus.json"
    if args.alone is None and "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node N benchmarks/many_gpus.py")
    return args


def main(given: Sequence[str] | None = None) -> None:
    """Check, measure and write the results."""
    args = parse(given)
    logging.set_verbosity_error()
    # float32 everywhere, or one process and many would round differently.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if args.alone is not None:
        train_alone(args.alone, args)
        return
    # Makes the process group, as TrainingArguments do under a launcher.
    rank = TrainingArguments(output_dir=tempfile.mkdtemp(), use_cpu=args.device == "cpu").process_index
    begin, reference, rows = time.monotonic(), alone(args), []
    for engine in args.engines:
        rows.append({**check(engine, reference, args), **measure(engine, args)})
        if rank == 0:
            print(json.dumps(rows[-1]), flush=True)
    if rank == 0 and args.out is not None:
        settings = {"model": "tiny BERT" if args.smoke else "BERT-base", "ranks": world_size(), "device": args.device,
                    "backend": dist.get_backend(), "batch_per_rank": args.batch, "length": args.length,
                    "steps": args.steps * ROUNDS, "precision": "bf16 autocast" if args.device == "cuda" else "float32",
                    "bare": "Trainer with a teacher's forward, hidden states returned"}  # fmt: skip
        command = shlex.join(["torchrun", "--nproc-per-node", str(world_size()), "benchmarks/many_gpus.py",
                              *(given if given is not None else sys.argv[1:])])  # fmt: skip
        content = {"command": command, **environment(REPOSITORY), "settings": settings,
                   "seconds": round(time.monotonic() - begin, 1), "rows": rows}  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        half = args.out.with_suffix(".part")
        half.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(half, args.out)
        print(f"{args.out}: {content['seconds']} s")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

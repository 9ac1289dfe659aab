"""Time training steps of `Trainer`, of `Trainer` plus a teacher's forward, and of hf_sparse with each feature on.

All trainers run their real loops, each in a thread of its own that waits for its turn: every round takes one whole
step of each, from the fetching of its batch to its `on_step_end`, in an order that moves on. What is compared has then
met the same state of the machine. Before a time counts, the run is checked: finite losses, pruned blocks exactly zero,
each feature really on. Peak memory is measured for each trainer alone, before.

Usage: python benchmarks/training.py [--device cuda] [--smoke] [--steps 30] [--batch 32] [--length 128] [--out FILE]
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging  # noqa: E402

from hf_sparse import SparseDistillConfig, SparseDistillTrainer  # noqa: E402
from hf_sparse.inference.measuring.environment import environment  # noqa: E402

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
}
SPARSITY, TOTAL_STEPS, WARM_UP = 0.8, 100_000, 3
AT_ONCE = 3  # trainers beside their baseline whose weights and optimizer the memory of a CPU machine holds
USUAL = {
    "cpu": {"steps": 16, "batch": 8, "length": 64},
    "cuda": {"steps": 30, "batch": 32, "length": 128},
    "smoke": {"steps": 3, "batch": 2, "length": 8},
}
# Steps between two updates of the masks, which are the rule; the row "mask update" has one in every step.
BETWEEN = {"sparsity": SPARSITY, "sparsity_end": 0.9, "mask_updates": 1, "task_weight": 0.5}
PENALTY = {**BETWEEN, "penalty_weight": 1e-5}
HIDDEN = {"hidden_weight": 1.0}  # with the default form


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to train.

    Attributes:
        name: in the results.
        settings: fields of `SparseDistillConfig`; None = a plain `Trainer`.
        baseline: name of the variant that it is compared with; None = none.
        teaches: for a plain `Trainer`: whether a teacher's forward is run beside it.
        hidden: for that teacher and its student: whether hidden states are asked for.
    """

    name: str
    settings: dict[str, Any] | None = None
    baseline: str | None = "trainer + teacher"
    teaches: bool = False
    hidden: bool = False


VARIANTS = (
    Variant(name="trainer", baseline=None),
    Variant(name="trainer + teacher", baseline=None, teaches=True),
    Variant(name="trainer + teacher, hidden states", baseline=None, teaches=True, hidden=True),
    Variant(name="masks alone", settings={**BETWEEN, "kd_weight": 0.0, "task_weight": 1.0}, baseline="trainer"),
    Variant(name="logits", settings={"sparsity": 0.0}),
    Variant(name="logits, masks", settings=BETWEEN),
    Variant(name="logits, masks, penalty", settings=PENALTY),
    Variant(name="logits, masks, proximal penalty", settings={**PENALTY, "penalty_form": "proximal"}),
    Variant(name="logits, masks, grafting", settings={**BETWEEN, "graft_start": 0.999, "graft_end": 1.0}),
    Variant(name="logits, masks, hidden states", settings={**BETWEEN, **HIDDEN},
            baseline="trainer + teacher, hidden states"),
    Variant(name="everything", settings={**PENALTY, **HIDDEN, "graft_start": 0.999, "graft_end": 1.0},
            baseline="trainer + teacher, hidden states"),
    Variant(name="mask update in every step", settings={**BETWEEN, "mask_updates": TOTAL_STEPS}),
)  # fmt: skip


class Ended(Exception):
    """Ends a training loop from inside."""


class TeacherBeside(Trainer):
    """A `Trainer` that runs a teacher on each batch, and does nothing with what it says."""

    teacher: nn.Module
    hidden = False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Run both models."""
        inputs = {**inputs, "output_hidden_states": True} if self.hidden else inputs
        with torch.no_grad(), self.accelerator.autocast():
            self.teacher(**inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)


@dataclass
class Turns:
    """Hands the turn from thread to thread.

    Attributes:
        names: of those who take part, in their first order.
        rounds: how many turns each has.
        device: waited for before a time is taken.
    """

    names: Sequence[str]
    rounds: int
    device: torch.device
    taken: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._order = [name for turn in range(self.rounds) for name in self._moved_on(turn)]
        self._at, self._moved = 0, threading.Condition()
        self.taken = {name: [] for name in self.names}
        self.error: BaseException | None = None

    def _moved_on(self, turn: int) -> list[str]:
        names = list(self.names)
        return names[turn % len(names) :] + names[: turn % len(names)]

    def wait(self, name: str) -> bool:
        """Wait for a turn; False where there is none left."""
        with self._moved:
            while self._at < len(self._order) and self._order[self._at] != name and self.error is None:
                self._moved.wait()
            return self._at < len(self._order) and self.error is None and name in self._order[self._at :]

    def end(self, name: str, seconds: float) -> None:
        """End a turn."""
        with self._moved:
            self.taken[name].append(1e3 * seconds)
            self._at += 1
            self._moved.notify_all()

    def fail(self, error: BaseException) -> None:
        """End everything."""
        with self._moved:
            self.error = error
            self._moved.notify_all()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class TakeTurns(TrainerCallback):
    """Makes a training loop wait for its turn after each step."""

    def __init__(self, name: str, turns: Turns) -> None:
        self.name, self.turns, self.start = name, turns, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Before the first step."""
        self._next()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After a step."""
        self.turns.synchronize()
        self.turns.end(self.name, time.perf_counter() - self.start)
        self._next()

    def _next(self) -> None:
        if not self.turns.wait(self.name):
            raise Ended
        self.turns.synchronize()
        self.start = time.perf_counter()


class StopAfter(TrainerCallback):
    """Ends a training loop after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After a step."""
        self.left -= 1
        if not self.left:
            raise Ended


class Samples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random samples of one length, made once."""

    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, vocabulary, (count, length), generator=generator)
        self.labels = torch.randint(0, 2, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self.labels[index]}


def make_trainer(variant: Variant, model: nn.Module, teacher: nn.Module, args: argparse.Namespace) -> Any:
    """Make the trainer of a variant, with a copy of the model; all share the teacher, which none of them changes."""
    student = copy.deepcopy(model)
    given: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "use_cpu": args.device == "cpu", "per_device_train_batch_size": args.batch,
        "max_steps": TOTAL_STEPS, "save_strategy": "no", "logging_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "bf16": args.device == "cuda", "seed": 1, "dataloader_pin_memory": args.device == "cuda",
    }  # fmt: skip
    data = Samples(64 * args.batch, args.length, model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    if variant.settings is None:
        kind: Any = TeacherBeside if variant.teaches else Trainer
        trainer = kind(student, TrainingArguments(**given), train_dataset=data)
        if variant.teaches:
            trainer.teacher = teacher.to(trainer.args.device).eval().requires_grad_(False)
            trainer.hidden = variant.hidden
        return trainer
    config = SparseDistillConfig(**{"hidden_weight": 0.0, **given, **variant.settings})
    sparse = SparseDistillTrainer(
        student, config, train_dataset=data, teacher_model=teacher if config.needs_teacher else None
    )
    if config.sparsity and config.mask_updates == 1:
        sparse.pruner.masks.choose(SPARSITY)
        sparse.pruner.masks.apply_()
    return sparse


def run(trainer: Any, callback: TrainerCallback) -> None:
    """Train until the callback ends it."""
    trainer.add_callback(callback)
    try:
        trainer.train()
    except Ended:
        return
    raise RuntimeError("the training loop ended by itself")


def check(variant: Variant, trainer: Any) -> str | None:
    """Say what is wrong with a run; None where nothing is."""
    if not all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters()):
        return "weights are not finite"
    if variant.settings is None:
        return None
    means = trainer._means.read()
    wanted = {"loss_kd": trainer.args.kd_weight, "loss_hidden": trainer.args.hidden_weight,
              "penalty": trainer.args.penalty_weight}  # fmt: skip
    for name, weight in wanted.items():
        if bool(weight) != (means.get(name, 0.0) > 0.0):
            return f"{name} is {means.get(name)} with a weight of {weight}"
    masks = trainer.pruner.masks
    if not masks.is_applied():
        return "pruned blocks are not zero"
    if trainer.args.mask_updates == 1 and abs(masks.sparsity - trainer.args.sparsity) > 0.01:
        return f"sparsity is {masks.sparsity}"
    return None


def peak_memory(variant: Variant, model: nn.Module, teacher: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps alone, and give the peak of memory and what masks and coefficients hold, in bytes."""
    gc.collect()
    before = 0
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    trainer = make_trainer(variant, model, teacher, args)
    run(trainer, StopAfter(WARM_UP))
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    found: dict[str, Any] = {"peak_bytes": peak}
    if variant.settings is not None:
        pruner = trainer.pruner
        found["blocks"] = sum(mask.numel() for mask in pruner.masks.masks.values())
        found["mask_bytes"] = pruner.masks.nbytes
        found["coef_bytes"] = sum(coef.nbytes for coef in pruner.coefs.values())
    return found


def peak_memory_in_child(variant: Variant, args: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process of its own: on the CPU memory that was freed may still count."""
    shape = [f"--{name}={getattr(args, name)}" for name in USUAL["cpu"]]
    command = [sys.executable, __file__, "--memory-of", variant.name, *shape]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def measure(variants: Sequence[Variant], model: Any, teacher: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time variants in turns, and check what they did.

    Raises:
        RuntimeError: if a check fails.
    """
    trainers = {variant.name: make_trainer(variant, model, teacher, args) for variant in variants}
    turns = Turns(list(trainers), WARM_UP + args.steps, torch.device(args.device))

    def train(name: str) -> None:
        try:
            run(trainers[name], TakeTurns(name, turns))
        except BaseException as error:  # noqa: BLE001 (raised again by the thread that waits)
            turns.fail(error)

    threads = [threading.Thread(target=train, args=(name,)) for name in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if turns.error is not None:
        raise turns.error
    rows = []
    for variant in variants:
        if problem := check(variant, trainers[variant.name]):
            raise RuntimeError(f"{variant.name}: {problem}")
        times = turns.taken[variant.name][WARM_UP:]
        row = {"name": variant.name, "ms": round(statistics.median(times), 3),
               "spread": [round(edge, 3) for edge in statistics.quantiles(times, n=4)[::2]]}  # fmt: skip
        if variant.baseline is not None:
            # Step by step: what slows the machine down for a while slows neighbouring turns alike.
            pairs = list(zip(times, turns.taken[variant.baseline][WARM_UP:], strict=True))
            ratios = [a / b for a, b in pairs]
            row |= {"baseline": variant.baseline, "ratio": round(statistics.median(ratios), 4),
                    "ratio_spread": [round(edge, 4) for edge in statistics.quantiles(ratios, n=4)[::2]],
                    "adds_ms": round(statistics.median(a - b for a, b in pairs), 3)}  # fmt: skip
        rows.append(row)
    return rows


def chosen(only: Sequence[str] | None) -> list[Variant]:
    """Give the variants with these names, and their baselines; all of them for None.

    Raises:
        ValueError: for a name that there is not.
    """
    by_name = {variant.name: variant for variant in VARIANTS}
    if only is None:
        return list(VARIANTS)
    if unknown := [name for name in only if name not in by_name]:
        raise ValueError(f"--only {unknown[0]!r}: the trainers are {list(by_name)}.")
    wanted = {*only, *(by_name[name].baseline for name in only)}
    return [variant for variant in VARIANTS if variant.name in wanted]


def groups(args: argparse.Namespace) -> list[list[Variant]]:
    """Sort the variants into runs: one on a GPU; on a CPU as many as its memory holds beside their baselines."""
    variants = chosen(args.only)
    if args.device == "cuda" or args.smoke:
        return [variants]
    found = []
    for plain in (variant for variant in variants if variant.settings is None):
        beside = [variant for variant in variants if variant.baseline == plain.name]
        found += [[plain, *beside[at : at + AT_ONCE]] for at in range(0, len(beside), AT_ONCE)]
    return found


def main(given: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and few steps, to see that all of it runs")
    parser.add_argument("--steps", type=int, help="timed steps of each; 30 on a GPU, 16 on a CPU")
    parser.add_argument("--batch", type=int, help="samples per step; 32 on a GPU, 8 on a CPU")
    parser.add_argument("--length", type=int, help="tokens per sample; 128 on a GPU, 64 on a CPU")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these trainers and their baselines alone")
    parser.add_argument("--no-memory", action="store_true", help="leave the peaks of memory out")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="benchmarks/results/training_DEVICE.json by default")
    args = parser.parse_args(given)
    for name, value in USUAL["smoke" if args.smoke else args.device].items():
        setattr(args, name, getattr(args, name) or value)
    args.out = args.out or REPOSITORY / "benchmarks" / "results" / f"training_{args.device}.json"
    logging.set_verbosity_error()
    torch.manual_seed(0)
    config = BertConfig(**(TINY if args.smoke else {}))
    model, teacher = BertForSequenceClassification(config), BertForSequenceClassification(config)
    if args.memory_of:
        (variant,) = (variant for variant in VARIANTS if variant.name == args.memory_of)
        print(json.dumps(peak_memory(variant, model, teacher, args)))
        return
    begin = time.monotonic()
    alone = args.device == "cpu" and not args.smoke
    memory = {
        variant.name: peak_memory_in_child(variant, args) if alone else peak_memory(variant, model, teacher, args)
        for variant in chosen(args.only)
        if not args.no_memory
    }
    gc.collect()
    rows: list[dict[str, Any]] = []
    for group in groups(args):
        for row in measure(group, model, teacher, args):
            print(json.dumps(row), flush=True)
            rows.append({**row, **memory.get(row["name"], {})})
        gc.collect()
    settings = {"model": "tiny BERT" if args.smoke else "BERT-base", "batch": args.batch, "length": args.length,
                "steps": args.steps, "block_shape": [8, 1], "sparsity": SPARSITY, "device": args.device,
                "precision": "bf16 autocast" if args.device == "cuda" else "float32",
                "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip
    content = {
        "command": shlex.join(["python", "benchmarks/training.py", *(given if given is not None else sys.argv[1:])]),
        **environment(REPOSITORY), "settings": settings, "seconds": round(time.monotonic() - begin, 1),
        "load": os.getloadavg()[0], "rows": rows,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    half = args.out.with_suffix(".part")
    half.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(half, args.out)
    print(f"{args.out}: {content['seconds']} s")


if __name__ == "__main__":
    main()

"""Cells of one task and one length trained side by side, as one stack of models on one device.

Does what `SparseDistillTrainer` does to each of them, step for step (tests/benchmarks/test_stack.py compares
weights), without its cost per model: a step of a small model keeps a GPU busy for a fraction of the time that it
takes to launch. Imported by accuracy.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.grid.stacked_bert import StackedBert
from benchmarks.grid.stacked_pruning import StackedPruner, Watched
from hf_sparse import SparseDistillConfig
from hf_sparse.training.schedules import StepPlan, graft_draws, plan_step

BUCKET = 8  # batches of neighbouring lengths from which rows are drawn together
EVAL_ROWS = 128
_SCHEDULE = (
    "sparsity", "sparsity_schedule", "sparsity_start", "sparsity_end", "mask_updates", "penalty_weight",
    "penalty_reweights", "graft_start", "graft_hold", "graft_end",
)  # fmt: skip


class OutOfTimeError(Exception):
    """The deadline has come; holds what was measured until then, per cell."""

    def __init__(self, unfinished: list[dict[str, Any]]) -> None:
        super().__init__("the deadline has come")
        self.unfinished = unfinished


@dataclass(frozen=True)
class Rows:
    """Tokenised rows on a device: ids, types [rows, L]; lengths, labels [rows]."""

    ids: Tensor
    types: Tensor
    lengths: Tensor
    labels: Tensor

    @classmethod
    def of(cls, arrays: Mapping[str, Any], device: torch.device) -> Rows:
        """Take numpy arrays over."""
        return cls(*(torch.as_tensor(arrays[key]).to(device) for key in ("ids", "types", "lengths", "labels")))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Give ids, types, real [..., T] and labels [...] of rows, T being the longest, a multiple of 8."""
        lengths = self.lengths[index]
        # lengths stay on the CPU: reading the longest from a GPU would wait for it.
        longest = min(-(-int(lengths.max()) // 8) * 8, self.ids.shape[1])
        at = index.to(self.ids.device, non_blocking=True)
        real = torch.arange(longest)[None] < lengths[..., None]
        return (
            self.ids[at][..., :longest].long(),
            self.types[at][..., :longest].long(),
            real.to(self.ids.device, non_blocking=True),
            self.labels[at].long(),
        )


def on(rows: Mapping[str, Any], device: torch.device) -> Rows:
    """Move rows to a device, but for the lengths."""
    made = Rows.of(rows, device)
    return Rows(made.ids, made.types, made.lengths.cpu().long(), made.labels)


def batch_order(
    lengths: Tensor,
    size: int,
    epochs: int,
    seeds: Sequence[int],
    spare: Sequence[bool] = (),
    spare_lengths: Any = None,
) -> Iterator[Tensor]:
    """Draw batches: rows of neighbouring lengths together, in every epoch each row once.

    All streams see the same lengths at the same step, and different rows.

    Args:
        lengths: [rows].
        size: rows per batch.
        epochs: passes.
        seeds: one per stream.
        spare: whether a stream draws from spare rows as well, half of its batches on average.
        spare_lengths: [k * rows] of the spare rows, which are indexed after the others; another set in each epoch.

    Yields:
        [streams, B] indices of rows.
    """
    buckets = torch.sort(lengths, stable=True).indices.split(size * BUCKET)
    common = torch.Generator().manual_seed(0)
    own = [torch.Generator().manual_seed(1 + seed) for seed in seeds]
    mixes = list(spare) or [False] * len(seeds)
    for epoch in range(epochs):
        more: Sequence[Tensor] = [torch.empty(0, dtype=torch.long)] * len(buckets)
        if any(mixes):
            sets = spare_lengths.view(-1, len(lengths))
            chosen = sets[epoch % len(sets)]
            first = len(lengths) * (1 + epoch % len(sets))
            more = (first + torch.sort(chosen, stable=True).indices).split(size * BUCKET)
        drawn = []
        for generator, mixed in zip(own, mixes, strict=True):
            pools = [torch.cat([b, m]) if mixed else b for b, m in zip(buckets, more, strict=True)]
            drawn.append([
                pool[torch.randperm(len(pool), generator=generator)][: len(bucket)].split(size)
                for pool, bucket in zip(pools, buckets, strict=True)
            ])  # fmt: skip
        slots = [(i, j) for i, bucket in enumerate(drawn[0]) for j in range(len(bucket))]
        for k in torch.randperm(len(slots), generator=common).tolist():
            i, j = slots[k]
            yield torch.stack([of_stream[i][j] for of_stream in drawn])


def repaired(rows: Mapping[str, Any], sets: int, seed: int = 0) -> dict[str, Any]:
    """Make pairs that no one has labelled: the first sentence of a row with the second one of another.

    Args:
        rows: ids, types [rows, L]; lengths, labels [rows]: pairs, as BERT's tokenizer lays them out.
        sets: how many for each row.
        seed: of the drawing.

    Returns:
        As `rows`, sets * rows of them, each with the label -100.
    """
    rng = np.random.default_rng(seed)
    count, width = rows["ids"].shape
    first = ((rows["types"] == 0) & (np.arange(width)[None] < rows["lengths"][:, None])).sum(1)
    ids, types, lengths = [], [], []
    for _ in range(sets):
        for i, j in enumerate(rng.permutation(count)):
            a, b = rows["ids"][i, : first[i]], rows["ids"][j, first[j] : rows["lengths"][j]]
            joined = np.concatenate([a, b])[:width]
            lengths.append(len(joined))
            ids.append(np.pad(joined, (0, width - len(joined))))
            types.append((np.arange(width) >= len(a)) & (np.arange(width) < len(joined)))
    return {
        "ids": np.stack(ids).astype(rows["ids"].dtype), "types": np.stack(types).astype(rows["types"].dtype),
        "lengths": np.asarray(lengths, rows["lengths"].dtype), "labels": np.full(len(ids), -100, np.int16),
    }  # fmt: skip


class Stack:
    """The training of one stack.

    Args:
        models: one per cell, as each starts.
        teacher: the dense model; None if no config needs one.
        configs: one per cell; all of one length.
        extra: see `StackedPruner`.
        seeds: one per cell.
        train: the rows.
        device: where it runs.
        own_rows: how many of `train` are labelled; those after them are spare ones (`repaired`).
    """

    def __init__(
        self,
        models: Sequence[Any],
        teacher: Any,
        configs: Sequence[SparseDistillConfig],
        extra: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        train: Rows,
        device: torch.device,
        own_rows: int | None = None,
    ) -> None:
        compute = torch.bfloat16 if configs[0].bf16 else torch.float32
        self.configs, self.train_rows, self.device = list(configs), train, device
        self.stack = StackedBert(models, compute, device)
        needed = any(config.needs_teacher for config in configs)
        self.teacher = StackedBert([teacher], compute, device, trained=False) if needed else None
        self.pruner = StackedPruner(self.stack, configs, extra)
        self.prunes = any(config.sparsity or config.penalty_weight for config in configs)
        keys = [(seed, bool(more.get("repair"))) for seed, more in zip(seeds, extra, strict=True)]
        self.streams = list(dict.fromkeys(keys))
        self.stream_of = torch.tensor([self.streams.index(key) for key in keys], device=device)
        first = configs[0]
        self.epochs, self.size = int(first.num_train_epochs), first.per_device_train_batch_size
        self.own_rows = len(train) if own_rows is None else own_rows
        self.total = -(-self.own_rows // self.size) * self.epochs
        self.step = 0
        self.weights = {
            kind: torch.tensor([getattr(config, field) for config in configs], device=device)
            for kind, field in (("task", "task_weight"), ("kd", "kd_weight"), ("hidden", "wanted_hidden_weight"))
        }
        self.temperature = torch.tensor([config.kd_temperature for config in configs], device=device)
        self.relative = torch.tensor([config.hidden_form == "relative" for config in configs], device=device)
        self.clip = torch.tensor([config.max_grad_norm for config in configs], device=device)
        self.grafts = [n for n, config in enumerate(configs) if config.graft_start < 1.0]
        self.adam = _Adam(self.stack, configs, self.grafts)
        self._plans: dict[tuple[Any, ...], StepPlan] = {}
        self._check()

    def _check(self) -> None:
        for config in self.configs:
            unsupported = {
                "attention_weight": config.attention_weight, "lr_restart": config.lr_restart,
                "train_only_layers": config.train_only_layers, "weight_decay": config.weight_decay,
                "block_overrides": config.block_overrides, "gradient_accumulation_steps":
                config.gradient_accumulation_steps - 1,
                # Layers that were grafted so far have no second moments, which the trainer makes up for.
                "importance, grafted,": "fisher" * (config.importance == "fisher" and config.graft_start < 1.0),
            }  # fmt: skip
            for name, value in unsupported.items():
                if value:
                    raise ValueError(f"{name}={value!r} is not trained in stacks: run the cell by itself.")
            same = ("num_train_epochs", "per_device_train_batch_size", "bf16")
            if any(getattr(config, name) != getattr(self.configs[0], name) for name in same):
                raise ValueError(f"cells of one stack have the same {', '.join(same)}.")

    def batches(self) -> Iterator[Tensor]:
        """Draw the batches of the whole run."""
        lengths, own = self.train_rows.lengths, self.own_rows
        seeds, spare = [seed for seed, _ in self.streams], [spare for _, spare in self.streams]
        return batch_order(lengths[:own], self.size, self.epochs, seeds, spare, lengths[own:])

    def plans(self) -> list[StepPlan]:
        """Give what this step does, per cell."""
        self._plans.clear()
        found = []
        for config in self.configs:
            key = tuple(getattr(config, name) for name in _SCHEDULE)
            if key not in self._plans:
                self._plans[key] = plan_step(config, self.step, self.total)
            found.append(self._plans[key])
        return found

    def rate(self, config: SparseDistillConfig) -> float:
        """Give the learning rate of this step: linear warm-up, linear decay."""
        warmup = config.get_warmup_steps(self.total)
        if self.step < warmup:
            return config.learning_rate * self.step / max(1, warmup)
        return config.learning_rate * max(0.0, (self.total - self.step) / max(1, self.total - warmup))

    def run_step(self, index: Tensor) -> dict[str, Tensor]:
        """Train one step on rows [S, B]; gives loss, loss_task, loss_kd, loss_hidden, grad_norm, each [N]."""
        ids, types, real, labels = self.train_rows.batch(index)
        embedded = self.stack.embed(ids, types)
        x, mask, answers = embedded[self.stream_of], real[self.stream_of], labels[self.stream_of]
        plans = self.plans()
        if self.prunes:
            self.pruner.begin_step(plans, lambda some: self._measure(x, mask, some), self.adam.squares)
            if any(plan.update_masks for plan in plans):
                self.stack.refresh()
        taught = self._ask_teacher(embedded, real)
        logits, states = self.stack.forward(x, mask, None, self.teacher, self._grafted(plans))
        terms = self._losses(logits.float(), states, mask, answers, taught)
        loss = sum(self.weights[kind] * term for kind, term in terms.items())
        loss.sum().backward()  # type: ignore[union-attr]
        self.stack.collect_gradients()
        if self.prunes:
            self.pruner.add_gradients(plans)
            self.pruner.apply_to_grads_()
        norm = self.adam.clip(self.clip)
        rates = [self.rate(config) for config in self.configs]
        self.adam.step(rates, self._own(plans))
        if self.prunes:
            self.pruner.finish_step(plans, rates)
        self.stack.refresh()
        self.step += 1
        return {"loss": loss.detach(), "grad_norm": norm,  # type: ignore[union-attr]
                **{f"loss_{kind}": term.detach() for kind, term in terms.items()}}  # fmt: skip

    def _measure(self, x: Tensor, mask: Tensor, some: list[int]) -> dict[str, Any]:
        watched = Watched(mask.flatten(1), some)
        with torch.no_grad():
            self.stack.forward(x, mask, watched)
        return watched.found

    def _ask_teacher(self, embedded: Tensor, real: Tensor) -> tuple[Tensor, list[Tensor]] | None:
        if self.teacher is None:
            return None
        with torch.no_grad():
            logits, states = self.teacher.forward(embedded.flatten(0, 1)[None], real.flatten(0, 1)[None])
        shape = embedded.shape
        return logits[0].float().view(*shape[:2], -1), [state[0].view(shape) for state in states]

    def _losses(
        self, logits: Tensor, states: list[Tensor], mask: Tensor, labels: Tensor, taught: Any
    ) -> dict[str, Tensor]:
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
        counted = (labels != -100).float()
        terms = {"task": (losses.view(labels.shape) * counted).sum(1) / counted.sum(1).clamp(min=1.0)}
        if taught is None:
            return terms
        heat = self.temperature[:, None, None]
        mine, theirs = F.log_softmax(logits / heat, -1), F.log_softmax(taught[0][self.stream_of] / heat, -1)
        terms["kd"] = (theirs.exp() * (theirs - mine)).sum(-1).mean(1) * self.temperature**2
        if any(config.wanted_hidden_weight for config in self.configs):
            share = mask / mask.sum(-1, keepdim=True)
            total = torch.zeros_like(terms["task"])
            for mine, theirs in zip(states[1:], taught[1][1:], strict=True):
                theirs = theirs[self.stream_of]
                error, size, own = (
                    (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square() * share).sum(-1) / x.shape[-1]
                    for x in (mine - theirs, theirs, mine.detach())
                )
                least = torch.maximum(size, 1e-3 * own).clamp(min=torch.finfo(torch.float32).tiny)
                total = total + torch.where(self.relative[:, None], error / least, error).mean(1)
            terms["hidden"] = total
        return terms

    def _own(self, plans: Sequence[StepPlan]) -> dict[int, list[bool]]:
        return {
            n: graft_draws(plans[n].graft_prob, self.stack.depth, self.configs[n].seed, self.step)
            if plans[n].graft_prob < 1.0 else [True] * self.stack.depth
            for n in self.grafts
        }  # fmt: skip

    def _grafted(self, plans: Sequence[StepPlan]) -> list[list[int]] | None:
        own = self._own(plans)
        if not own:
            return None
        return [[n for n, draws in own.items() if not draws[layer]] for layer in range(self.stack.depth)]

    @torch.no_grad()
    def evaluate(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Measure accuracy and mean loss of every cell: [N], [N]."""
        lengths = rows.lengths
        right = loss = torch.zeros(self.stack.size, device=self.device)
        for index in torch.sort(lengths, stable=True).indices.split(EVAL_ROWS):
            ids, types, real, labels = rows.batch(index)
            n = self.stack.size
            x = self.stack.embed(ids, types)[None].expand(n, -1, -1, -1)
            logits = self.stack.forward(x, real[None].expand(n, -1, -1))[0].float()
            right = right + (logits.argmax(-1) == labels).sum(1)
            each = F.cross_entropy(logits.flatten(0, 1), labels.repeat(n), reduction="none")
            loss = loss + each.view(n, -1).sum(1)
        return right / len(lengths), loss / len(lengths)


class _Adam:
    """Fused AdamW over a stack: one call per learning rate, and per cell where layers are left out of steps."""

    def __init__(self, stack: StackedBert, configs: Sequence[SparseDistillConfig], grafts: Sequence[int]) -> None:
        self.stack, first = stack, configs[0]
        self.betas, self.epsilon = (first.adam_beta1, first.adam_beta2), first.adam_epsilon
        self.mean, self.square = torch.zeros_like(stack.flat), torch.zeros_like(stack.flat)
        self.squares = stack.views(self.square)
        self.groups: list[tuple[int, int]] = []
        for n in range(stack.size):
            rate = configs[n].learning_rate
            begin, end = self.groups[-1] if self.groups else (0, 0)
            if self.groups and n not in grafts and begin not in grafts and configs[begin].learning_rate == rate:
                self.groups[-1] = begin, end + 1
            else:
                self.groups.append((n, n + 1))
        # Where each layer begins and ends in the flat tensors, and, under -1, what follows the layers.
        width = stack.flat.shape[1]
        starts = [stack.bounds[f"bert.encoder.layer.{i}.attention.self.query.weight"][0] for i in range(stack.depth)]
        ends = [*starts[1:], stack.bounds["bert.pooler.dense.weight"][0]]
        cut = [slice(a, b) for a, b in zip(starts, ends, strict=True)] + [slice(ends[-1], width)]
        self.parts = {begin: cut if begin in grafts else [slice(0, width)] for begin, _ in self.groups}
        self.counts = {
            (begin, i): torch.zeros((), device=stack.flat.device)
            for begin, _ in self.groups for i in range(len(self.parts[begin]))
        }  # fmt: skip

    @torch.no_grad()
    def clip(self, limits: Tensor) -> Tensor:
        """Scale the gradients of every cell down to a norm of at most its limit; gives the norms [N]."""
        norm = torch.linalg.vector_norm(self.stack.grad, dim=1)
        self.stack.grad.mul_((limits / (norm + 1e-6)).clamp(max=1.0)[:, None])
        return norm

    @torch.no_grad()
    def step(self, rates: Sequence[float], own: Mapping[int, Sequence[bool]]) -> None:
        """Move the weights."""
        flats = (self.stack.flat, self.stack.grad, self.mean, self.square)
        for begin, end in self.groups:
            runs, cut = own.get(begin, ()), self.parts[begin]
            parts = [i for i in range(len(cut)) if i >= len(runs) or runs[i]]
            counts = [self.counts[begin, i] for i in parts]
            torch._foreach_add_(counts, 1)
            lists = [[flat[begin:end, cut[i]] for i in parts] for flat in flats]
            torch._fused_adamw_(
                lists[0], lists[1], lists[2], lists[3], [], counts, amsgrad=False, lr=rates[begin],
                beta1=self.betas[0], beta2=self.betas[1], weight_decay=0.0, eps=self.epsilon, maximize=False,
            )  # fmt: skip


def train(
    stack: Stack, evaluations: int, dev: Rows, probe: Rows, known: Rows, deadline: float, logging_steps: int,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Train a stack to its end.

    Args:
        stack: before its first step.
        evaluations: how many, the last one at the last step.
        dev, probe, known: rows to evaluate on: at the end, before it, and those known from training.
        deadline: `time.monotonic()` at which to give up.
        logging_steps: steps per entry of the course.
        tell: takes a line about the progress.

    Returns:
        {"steps", "sparsity_reached", "train", "dev", "wall_seconds"} per cell, as `cell.train_cell` gives.

    Raises:
        OutOfTimeError: at the deadline.
    """
    n, begin = stack.stack.size, time.monotonic()
    courses: list[list[dict[str, Any]]] = [[] for _ in range(n)]
    measured: list[list[dict[str, Any]]] = [[] for _ in range(n)]
    sums: dict[str, Tensor] = {}
    every = -(-stack.total // evaluations)
    for index in stack.batches():
        if time.monotonic() > deadline:
            raise OutOfTimeError([
                {"stopped_at": stack.step, "of": stack.total, "train": courses[k], "dev": measured[k]}
                for k in range(n)
            ])  # fmt: skip
        plans = stack.plans()
        for name, value in stack.run_step(index).items():
            sums[name] = sums[name] + value if name in sums else value
        if stack.step % logging_steps == 0 or stack.step == stack.total:
            steps = (stack.step - 1) % logging_steps + 1
            means = {name: (value / steps).tolist() for name, value in sums.items()}
            sums = {}
            for k in range(n):
                entry = {name: float(f"{values[k]:.5g}") for name, values in means.items()}
                courses[k].append({"step": stack.step, "sparsity": round(plans[k].sparsity, 5),
                                   "graft_prob": round(plans[k].graft_prob, 4), **entry})  # fmt: skip
        if stack.step % (16 * logging_steps) == 0:
            tell(f"step {stack.step}/{stack.total}, {time.monotonic() - begin:.1f} s")
        if stack.step % every == 0 or stack.step == stack.total:
            some = dev if stack.step == stack.total else probe
            values = torch.stack([*stack.evaluate(some), *stack.evaluate(known)], 1).tolist()
            for k in range(n):
                keys = ("dev_accuracy", "dev_loss", "train_accuracy", "train_loss")
                at = {
                    "step": stack.step,
                    "dev_rows": len(some),
                    "sparsity": plans[k].sparsity,
                    "final_sparsity": plans[k].final_sparsity,
                }
                measured[k].append({**at, **dict(zip(keys, values[k], strict=True))})
            used = time.monotonic() - begin
            tell(
                f"step {stack.step}/{stack.total}, {used:.1f} s, {1000 * used / stack.step / n:.2f} ms per step of one"
            )
    wall = time.monotonic() - begin
    for k, sparsity in enumerate(stack.pruner.sparsity()):
        wanted = stack.configs[k].sparsity
        if not math.isclose(sparsity, wanted, abs_tol=0.01):
            raise RuntimeError(f"cell {k} ends at sparsity {sparsity}, not {wanted}.")
    return [
        {
            "steps": stack.step, "sparsity_reached": sparsity, "wall_seconds": round(wall, 1), "stacked": n,
            "train": courses[k], "dev": measured[k],
        }
        for k, sparsity in enumerate(stack.pruner.sparsity())
    ]  # fmt: skip

"""preset="spd" against Sparse Progressive Distillation written out in plain torch, step by step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_sparse import BlockMasks, plan_step
from hf_sparse.training.schedules import graft_draws
from tests.training.plain_bert import LINEARS, Weights, layers_of, run_bert
from tests.training.tiny import Recorder, arguments, bert, pad, rows, sparse_config, weights_of

STEPS, SEED, PEAK, SPARSITY = 36, 11, 5e-3, 0.75
# Where a gradient is zero but for rounding (the biases of keys), Adam would blow the rounding up to a whole step.
EPSILON = 1e-3
LAYERS, HEADS = 4, 2
# Between the smallest and the largest gradients, so that clipping acts in some steps and not in others.
CLIP = 0.25


class Seeded(Recorder):
    """Starts each step with a seed of its own, so that the same values can be dropped elsewhere."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(self.plan.step)
        return super().compute_loss(*args, **kwargs)


def trained(folder: Path, model: Any, data: list[dict[str, Any]], **given: Any) -> Recorder:
    settings = {"preset": "spd", "sparsity": SPARSITY, "max_steps": STEPS, "learning_rate": PEAK, "seed": SEED,
                "adam_epsilon": EPSILON, "max_grad_norm": CLIP, "lr_scheduler_type": "linear", **given}  # fmt: skip
    plain = {key: value for key, value in arguments(folder).items() if key not in ("block_height", *settings)}
    recorder = Seeded(model, sparse_config(folder, **plain | settings, block_height=None), train_dataset=data,
                      data_collator=pad)  # fmt: skip
    recorder.train()
    return recorder


class Paper:
    """The method by itself: an encoder pruned weight by weight, some of its layers replaced by the teacher's."""

    def __init__(self, model: Any, dropout: float = 0.0) -> None:
        self.dropout, self.norms = dropout, list[float]()
        self.shared = weights_of(model)
        self.teacher = layers_of(self.shared, LAYERS)
        self.student = [{k: v.clone().requires_grad_() for k, v in layer.items()} for layer in copy.copy(self.teacher)]
        trained = [weight for layer in self.student for weight in layer.values()]
        self.optimizer = torch.optim.AdamW(trained, lr=PEAK, weight_decay=0.0, eps=EPSILON)
        self.masks = [
            {f"{n}.weight": torch.ones_like(layer[f"{n}.weight"]) for n in LINEARS} for layer in self.student
        ]

    def step(self, step: int, batch: dict[str, Tensor], classes_weight: float = 1.0, gold: bool = False) -> float:
        """Do one optimizer step; gives the loss."""
        # Stage 1 prunes, 12 times in all; in stage 2 the graft probability rises; in stage 3 the student is alone.
        prune, ramp = STEPS // 2, STEPS * 2 // 3
        updates = [prune * k // 12 for k in range(1, 13)]
        if step in updates:
            left = 1.0 - (updates.index(step) + 1) / 12
            self.prune(SPARSITY * (1.0 - left**3))
        own = 0.3 if step < prune else min(1.0, 0.3 + 0.7 * (step - prune) / (ramp - prune))
        draws = graft_draws(own, LAYERS, SEED, step)
        for group in self.optimizer.param_groups:
            done = step / prune if step < prune else (step - prune) / (STEPS - prune)
            group["lr"] = PEAK * (1.0 - done)

        mixed = [
            mine if keep else theirs for mine, theirs, keep in zip(self.student, self.teacher, draws, strict=True)
        ]
        torch.manual_seed(step)
        # The teacher's layers drop nothing, wherever they run.
        logits, hidden, maps = run_bert(self.shared, mixed, batch, HEADS, self.dropout, in_train_mode=draws)
        with torch.no_grad():
            target, target_hidden, target_maps = run_bert(self.shared, self.teacher, batch, HEADS)
        if gold:
            loss = F.mse_loss(logits[:, 0], batch["labels"])
        else:
            cross = -(target.softmax(-1) * logits.log_softmax(-1)).sum(-1)
            entropy = -(target.softmax(-1) * target.log_softmax(-1)).sum(-1)
            loss = classes_weight * (cross - entropy).mean()
        lengths = batch["attention_mask"].sum(1).tolist()
        for mine, theirs in zip(hidden, target_hidden, strict=True):
            errors = [F.mse_loss(mine[i, :n], theirs[i, :n]) for i, n in enumerate(lengths)]
            loss = loss + sum(errors) / len(errors)
        for mine, theirs in zip(maps, target_maps, strict=True):
            errors = [F.mse_loss(mine[i, :, :n, :n], theirs[i, :, :n, :n]) for i, n in enumerate(lengths)]
            loss = loss + sum(errors) / len(errors)

        self.optimizer.zero_grad()
        if any(draws):
            loss.backward()
        for layer, masks in zip(self.student, self.masks, strict=True):
            for name, mask in masks.items():
                if layer[name].grad is not None:
                    layer[name].grad.mul_(mask)
        norm = torch.nn.utils.clip_grad_norm_([w for layer in self.student for w in layer.values()], CLIP)
        self.norms.append(norm.item())
        self.optimizer.step()
        self.apply_masks()
        return loss.item()

    def prune(self, sparsity: float) -> None:
        """Inside each matrix, keep the largest of the weights that are still there.

        Their number is rounded as in the library; a test below says how far the released code is from it.
        """
        for layer, masks in zip(self.student, self.masks, strict=True):
            for name, mask in masks.items():
                size = (layer[name].detach().abs() * mask - (1 - mask)).flatten()
                order = sorted(range(len(size)), key=lambda i: size[i].item())
                for i in order[: int(sparsity * len(order) + 0.5)]:
                    mask.view(-1)[i] = 0.0
        self.apply_masks()

    def apply_masks(self) -> None:
        with torch.no_grad():
            for layer, masks in zip(self.student, self.masks, strict=True):
                for name, mask in masks.items():
                    layer[name].mul_(mask)

    def assert_clipped(self) -> None:
        # The first steps, in which nothing is pruned yet, are left out: the masks of gradients are to matter as well.
        norms = self.norms[STEPS // 2 // 12 :]
        assert any(norm > CLIP for norm in norms) and any(0.0 < norm <= CLIP for norm in norms)

    def assert_same(self, weights: dict[str, Tensor], step: int) -> None:
        expected = {f"bert.encoder.layer.{i}.{k}": v for i, layer in enumerate(self.student) for k, v in layer.items()}
        for name, weight in weights.items():
            torch.testing.assert_close(
                weight, expected.get(name, self.shared[name]).detach(), rtol=1e-4, atol=1e-6,
                msg=lambda text, name=name: f"step {step}, {name}: {text}",
            )  # fmt: skip


def model_of(seed: int = 3, **changes: Any) -> Any:
    return bert(seed, num_hidden_layers=LAYERS, attn_implementation="eager", **changes)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_losses_and_weights_of_every_step_are_those_of_the_paper(tmp_path: Path, dropout: float) -> None:
    model = model_of(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    paper = Paper(model, dropout)
    recorder = trained(tmp_path, model, rows("classes", 48))
    assert len(recorder.after) == len(recorder.losses) == STEPS
    for step in range(STEPS):
        expected = paper.step(step, recorder.batches[step])
        assert recorder.losses[step] == pytest.approx(expected, rel=1e-4, abs=1e-6), f"step {step}"
        paper.assert_same(recorder.after[step], step)
    paper.assert_clipped()
    zeros = [(layer[f"{name}.weight"] == 0).float().mean().item() for layer in paper.student for name in LINEARS]
    assert zeros == pytest.approx([SPARSITY] * len(zeros))


def test_kd_weight_of_one_over_the_classes_is_the_released_reduction(tmp_path: Path) -> None:
    # The released code takes a mean over samples and classes, which divides the loss by the number of classes.
    model = model_of()
    paper = Paper(model)
    recorder = trained(tmp_path, model, rows("classes", 48), kd_weight=1 / 3)
    for step in range(STEPS):
        expected = paper.step(step, recorder.batches[step], classes_weight=1 / 3)
        assert recorder.losses[step] == pytest.approx(expected, rel=1e-4, abs=1e-6), f"step {step}"
        paper.assert_same(recorder.after[step], step)


def test_a_task_loss_in_place_of_kd_is_what_the_released_code_does_for_scores(tmp_path: Path) -> None:
    model = model_of(num_labels=1, problem_type="regression")
    paper = Paper(model)
    recorder = trained(tmp_path, model, rows("regression", 48), task_weight=1.0, kd_weight=0.0)
    for step in range(STEPS):
        expected = paper.step(step, recorder.batches[step], gold=True)
        assert recorder.losses[step] == pytest.approx(expected, rel=1e-4, abs=1e-6), f"step {step}"
        paper.assert_same(recorder.after[step], step)


def test_only_the_layers_are_trained(tmp_path: Path) -> None:
    model = model_of()
    before = weights_of(model)
    recorder = trained(tmp_path, model, rows("classes", 48), max_steps=4)
    moved = {name for name, weight in recorder.after[-1].items() if not torch.equal(weight, before[name])}
    assert moved and all(name.startswith("bert.encoder.layer.") for name in moved)


def test_a_step_in_which_the_teacher_runs_every_layer_moves_nothing(tmp_path: Path) -> None:
    seed = next(s for s in range(1000) if not any(graft_draws(0.3, LAYERS, s, 0)))
    model = model_of()
    before: Weights = weights_of(model)
    recorder = trained(tmp_path, model, rows("classes", 8), seed=seed, max_steps=8)
    assert all(torch.equal(weight, before[name]) for name, weight in recorder.after[0].items())
    assert recorder.losses[0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("shape", [(768, 768), (13, 7)])
def test_the_released_rounding_keeps_as_many_weights_or_one_less(shape: tuple[int, int], sparsity: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=False)
    ours, size = BlockMasks({"linear": linear}, (1, 1)), linear.weight.detach().abs()
    config = sparse_config("unused", preset="spd", sparsity=sparsity, block_height=None)
    plans = [plan for plan in (plan_step(config, step, 240) for step in range(240)) if plan.update_masks]
    assert len(plans) == 12
    theirs, differences = torch.ones(shape, dtype=torch.bool), []
    for k, plan in enumerate(plans, start=1):
        ours.choose(plan.sparsity)
        # The released code rounds the number of kept weights down, and keeps all down to the last of them.
        keep = int(size.numel() * (1.0 - sparsity * (1.0 - (1.0 - k / 12) ** 3)))
        theirs = (size * theirs) >= (size * theirs).flatten().topk(keep).values[-1]
        assert not (theirs & ~ours.masks["linear"]).any()
        differences.append(int((ours.masks["linear"] & ~theirs).sum()))
    assert set(differences) == {0, 1}
    if (shape, sparsity) == ((768, 768), 0.9):  # as docs/method.md says
        assert sum(differences) == 7

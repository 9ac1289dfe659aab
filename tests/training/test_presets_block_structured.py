"""preset="block_structured" against Block Structured Pruning written out in plain torch, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.training.plain_bert import LINEARS, Weights, layers_of, run_bert
from tests.training.tiny import Recorder, arguments, bert, pad, rows, sparse_config, weights_of

STEPS, PEAK, RATIO, WIDTH, LAYERS, HEADS = 20, 5e-3, 0.5, 8, 2, 2
# The penalty of so small a model would be too weak to matter.
PENALTY = 1e-2
# Where a gradient is zero but for rounding (the biases of keys), Adam would blow the rounding up to a whole step.
EPSILON = 1e-3
# The released code renews its coefficients at the start of epochs 4, 8, 12 and 16 of, here, 20 half-steps.
RENEWALS = (0, 2, 4, 6, 8)


def trained(folder: Path, model: Any, **given: Any) -> Recorder:
    settings = {"preset": "block_structured", "block_width": WIDTH, "penalty_weight": PENALTY, "max_steps": STEPS,
                "learning_rate": PEAK, "adam_epsilon": EPSILON, "lr_scheduler_type": "linear", **given}  # fmt: skip
    plain = {key: value for key, value in arguments(folder).items() if key not in ("block_height", *settings)}
    recorder = Recorder(model, sparse_config(folder, **plain | settings, block_height=None),
                        train_dataset=rows("classes", 48), data_collator=pad)  # fmt: skip
    recorder.train()
    return recorder


class Paper:
    """The method by itself: a run with the penalty, one cut by percentile, a second run with masked gradients."""

    def __init__(self, model: Any) -> None:
        self.weights: Weights = {name: value.clone().requires_grad_() for name, value in weights_of(model).items()}
        names = [f"bert.encoder.layer.{i}.{linear}.weight" for i in range(LAYERS) for linear in LINEARS]
        self.matrices = {name: self.weights[name] for name in names}
        self.gammas: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}

    def step(self, step: int, batch: dict[str, Tensor]) -> float:
        """Do one optimizer step; gives the task loss."""
        stage, first = (0, 0) if step < STEPS // 2 else (1, STEPS // 2)
        if step == first:
            self.optimizer = torch.optim.AdamW(list(self.weights.values()), lr=PEAK, weight_decay=0.0, eps=EPSILON)
        if stage == 1 and step == first:
            self.hard_prune()
        if step in RENEWALS:
            with torch.no_grad():
                self.gammas = {name: 1.0 / (self.group_norms(w) + 1e-3) for name, w in self.matrices.items()}
        for group in self.optimizer.param_groups:
            group["lr"] = PEAK * (1.0 - (step - first) / (STEPS // 2))

        logits, _, _ = run_bert(self.weights, layers_of(self.weights, LAYERS), batch, HEADS)
        task = F.cross_entropy(logits, batch["labels"])
        loss = task
        if stage == 0:
            for name, matrix in self.matrices.items():
                loss = loss + PENALTY * (self.gammas[name] * self.group_norms(matrix)).sum()
        self.optimizer.zero_grad()
        loss.backward()
        for name, mask in self.masks.items():
            self.weights[name].grad.mul_(mask)
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), 1.0)
        self.optimizer.step()
        return task.item()

    @staticmethod
    def group_norms(matrix: Tensor) -> Tensor:
        """Cut into blocks of columns, laid below each other, one group per row: the released `block_filter`."""
        stacked = torch.cat(torch.split(matrix, WIDTH, dim=1), dim=0)
        return stacked.square().sum(dim=1).sqrt()

    def hard_prune(self) -> None:
        for name, matrix in self.matrices.items():
            norms = self.group_norms(matrix).detach().numpy()
            below = norms < np.percentile(norms, RATIO * 100)
            with torch.no_grad():
                for group in np.flatnonzero(below):
                    column, row = divmod(int(group), matrix.shape[0])
                    matrix[row, column * WIDTH : (column + 1) * WIDTH] = 0.0
            self.masks[name] = (matrix != 0).float()


def test_losses_and_weights_of_every_step_are_those_of_the_paper(tmp_path: Path) -> None:
    model = bert(3)
    paper = Paper(model)
    recorder = trained(tmp_path, model)
    assert len(recorder.after) == len(recorder.losses) == STEPS
    for step in range(STEPS):
        expected = paper.step(step, recorder.batches[step])
        assert recorder.losses[step] == pytest.approx(expected, rel=1e-4), f"step {step}"
        for name, weight in recorder.after[step].items():
            torch.testing.assert_close(
                weight, paper.weights[name].detach(), rtol=1e-4, atol=1e-6,
                msg=lambda text, name=name, step=step: f"step {step}, {name}: {text}",
            )  # fmt: skip
    pruned = [(matrix == 0).float().mean().item() for matrix in paper.matrices.values()]
    assert pruned == pytest.approx([RATIO] * len(pruned))


def test_the_coefficients_are_renewed_while_the_penalty_acts(tmp_path: Path) -> None:
    # In the released code they are not in runs of up to four epochs.
    recorder = trained(tmp_path, bert(3))
    assert recorder.renewals == list(RENEWALS)


def test_embeddings_pooler_and_head_are_trained_and_neither_penalised_nor_pruned(tmp_path: Path) -> None:
    model = bert(3)
    before = weights_of(model)
    recorder = trained(tmp_path, model)
    after = recorder.after[-1]
    for name in ("bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight", "classifier.weight"):
        assert not torch.equal(before[name], after[name]) and bool((after[name] != 0).all())

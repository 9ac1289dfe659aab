"""Code of the user in place of ours: refused where it would lose a part of the training, let through where not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_sparse import SparseDistillTrainer
from hf_sparse.training.overrides import refuse_unsupported_steps
from tests.training.tiny import assert_same, bert, make_trainer, pad, pruned_zero, rows, sparse_config, weights_of

PLAIN = {"kd_weight": 0.0, "sparsity": 0.5}


class OwnLoss(SparseDistillTrainer):
    """A loss of its own, without the one of the class above: as most custom trainers are written."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class DoubledLoss(SparseDistillTrainer):
    """Adds to the loss of the class above."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (2 * loss, outputs) if return_outputs else 2 * loss


class OwnStep(SparseDistillTrainer):
    """A training step of its own, without the one of the class above."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = self.compute_loss(model.train(), self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


def build(kind: Any, folder: Path, **given: Any) -> Any:
    return kind(bert(), sparse_config(folder, **given), train_dataset=rows("classes", 16), data_collator=pad)


@pytest.mark.parametrize(("given", "lost"), [
    ({}, "leaves out the teacher"),
    ({"kd_weight": 0.0, "graft_start": 0.5}, "leaves out the teacher"),
    ({**PLAIN, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, "leaves out the shares of micro-"),
])  # fmt: skip
def test_a_loss_that_leaves_ours_out_is_refused_before_anything_moves(
    tmp_path: Path, given: dict[str, Any], lost: str
) -> None:
    trainer = build(OwnLoss, tmp_path, **given)
    before = weights_of(trainer.model)
    with pytest.raises(RuntimeError, match=rf"OwnLoss.compute_loss does not call .* {lost}.*compute_loss_func"):
        trainer.train()
    assert_same(before, weights_of(trainer.model))


def test_a_loss_of_its_own_is_fine_where_it_loses_nothing(tmp_path: Path) -> None:
    own, ours = (build(kind, tmp_path, **PLAIN) for kind in (OwnLoss, SparseDistillTrainer))
    for trainer in (own, ours):
        trainer.train()
    assert pruned_zero(own)
    assert_same(weights_of(own.model), weights_of(ours.model))
    trainer = build(DoubledLoss, tmp_path, sparsity=0.5, gradient_accumulation_steps=2)
    trainer.train()
    assert pruned_zero(trainer)


@pytest.mark.parametrize("given", [{"sparsity": 0.5}, {"sparsity": 0.0, "penalty_weight": 1e-2}])
def test_a_training_step_that_leaves_ours_out_is_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"OwnStep.training_step does not call super\(\).training_step"):
        build(OwnStep, tmp_path, **given).train()


def test_a_training_step_of_its_own_is_fine_where_nothing_is_pruned(tmp_path: Path) -> None:
    trainer = build(OwnStep, tmp_path, sparsity=0.0)
    trainer.train()
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_inside_the_backward_are_refused(tmp_path: Path, optim: str) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), optim=optim)
    with pytest.raises(ValueError, match=f"optim='{optim}' is not supported: it moves weights while"):
        refuse_unsupported_steps(trainer)


class TwoSets(torch.optim.SGD):
    """Holds other weights for evaluation, as schedule-free optimizers do."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def test_optimizers_with_weights_of_their_own_for_evaluation_are_refused(tmp_path: Path) -> None:
    model = bert()
    trainer = make_trainer(
        model, tmp_path, rows("classes", 8), sparsity=0.5,
        extra={"optimizers": (TwoSets(model.parameters(), lr=0.1), None)},
    )  # fmt: skip
    with pytest.raises(ValueError, match="TwoSets is not supported: it holds one set of weights for training"):
        trainer.train()


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(bert().parameters(), lr=0.1)
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), extra={"optimizers": (optimizer, None)})
    with pytest.raises(ValueError, match="the SGD holds none of the parameters of the model"):
        trainer.train()


def test_a_restart_that_would_not_reach_a_given_schedule_is_refused(tmp_path: Path) -> None:
    for given in (True, False):
        model = bert()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0) if given else None
        trainer = make_trainer(model, tmp_path, rows("classes", 8), sparsity=0.5, lr_restart=0.5,
                               extra={"optimizers": (optimizer, schedule)})  # fmt: skip
        if given:
            with pytest.raises(ValueError, match="lr_restart=0.5 does not reach a schedule that is given"):
                trainer.train()
        else:
            trainer.train()
            assert pruned_zero(trainer)

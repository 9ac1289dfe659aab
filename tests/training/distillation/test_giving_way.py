"""`hidden_weight` by default: 1 where hidden states can be compared, told and 0 where not; refused if given."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

import hf_sparse
from tests.training.tiny import assert_same, bert, make_trainer, pad, rows, sparse_config, weights_of

RUN = {"sparsity": 0.5, "sparsity_end": 0.4, "max_steps": 4, "logging_strategy": "steps", "logging_steps": 1,
       "save_format": "dense"}  # fmt: skip


class Silent(nn.Module):
    """A model that is not of transformers: its forward takes what it knows, and nothing else."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.inner = bert(seed)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any = None) -> dict[str, Any]:
        found = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        return {"loss": found.loss, "logits": found.logits}


class Deaf(BertForSequenceClassification):
    """A model of transformers whose forward swallows the wish for hidden states."""

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any = None, **ignored: Any) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def deaf(seed: int = 0) -> Any:
    model = bert(seed)
    model.__class__ = Deaf
    return model


def compressed() -> Any:
    trained = bert(5)
    masks = hf_sparse.BlockMasks.for_model(trained, (4, 1))
    masks.choose(0.5)
    masks.apply_()
    return hf_sparse.compress(trained, masks.state_dict())


def run(folder: Path, model: Any, teacher: Any = None, **given: Any) -> tuple[Any, dict[str, float]]:
    trainer = make_trainer(model, folder, rows("classes", 16), teacher, **{**RUN, **given})
    trainer.train()
    # Of the last step, before which blocks were removed: until then a copy is what the student is.
    return trainer, next(logs for logs in reversed(trainer.state.log_history) if "loss" in logs)


@pytest.mark.parametrize("teacher", [None, lambda: bert(5)], ids=["a copy", "given"])
def test_hidden_states_are_compared_unless_told_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, teacher: Any
) -> None:
    trainer, logged = run(tmp_path, bert(0), teacher and teacher())
    assert trainer.args.hidden_weight == 1.0
    assert logged["loss_hidden"] > 0.0
    terms = 0.5 * logged["loss_task"] + 0.5 * logged["loss_kd"] + logged["loss_hidden"]
    assert logged["loss"] == pytest.approx(terms, rel=1e-5)
    assert "hidden_weight" not in caplog.text
    _, without = run(tmp_path / "off", bert(0), teacher and teacher(), hidden_weight=0.0)
    assert "loss_hidden" not in without


@pytest.mark.parametrize(
    ("student", "teacher", "reason"),
    [
        (bert, lambda: bert(5, num_hidden_layers=4), r"model and teacher have \[2\] and \[4\] layers; layer_map says"),
        (bert, compressed, "the teacher is compressed"),
        (Silent, None, "the model, a Silent, does not take output_hidden_states"),
        (bert, lambda: Silent(5), "the teacher, a Silent, does not take output_hidden_states"),
        (deaf, None, "the model returns no hidden states"),
        (bert, lambda: deaf(5), "the teacher returns no hidden states"),
    ],
)
def test_where_they_cannot_be_compared_it_says_so_and_trains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, student: Any, teacher: Any, reason: str
) -> None:
    with caplog.at_level(logging.WARNING):
        trainer, logged = run(tmp_path, student(), teacher and teacher(), save_strategy="no")
    assert trainer.args.hidden_weight == 0.0 and "loss_hidden" not in logged and logged["loss_kd"] > 0.0
    told = [record.getMessage() for record in caplog.records if "hidden_weight is not given" in record.getMessage()]
    assert len(told) == 1
    assert re.search(reason, told[0])
    # By name it is never dropped.
    with pytest.raises((ValueError, TypeError), match="hidden_weight|hidden_states"):
        run(tmp_path / "given", student(), teacher and teacher(), save_strategy="no", hidden_weight=1.0, kd_weight=0.5)


def test_widths_are_bridged_only_if_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, _ = run(tmp_path, bert(0), bert(5, hidden_size=24))
    assert trainer.args.hidden_weight == 0.0 and trainer.distiller.projections is None
    assert "model and teacher are of another width; hidden_weight, if given, learns a projection" in caplog.text
    trainer, logged = run(tmp_path / "given", bert(0), bert(5, hidden_size=24), hidden_weight=1.0)
    assert trainer.distiller.projections is not None and logged["loss_hidden"] > 0.0


def test_a_map_of_layers_asks_for_them(tmp_path: Path) -> None:
    trainer, logged = run(tmp_path, bert(0), bert(5, num_hidden_layers=4), layer_map="uniform")
    assert trainer.args.hidden_weight == 1.0 and logged["loss_hidden"] > 0.0


def test_a_map_for_attention_alone_lets_them_give_way(tmp_path: Path) -> None:
    wide = {"hidden_size": 24, "num_hidden_layers": 4}
    trainer, logged = run(tmp_path, bert(0), bert(5, **wide), layer_map="uniform", attention_weight=1.0)
    assert trainer.args.hidden_weight == 0.0 and trainer.distiller.projections is None
    assert logged["loss_attention"] > 0.0 and "loss_hidden" not in logged


def test_settings_that_gave_way_once_are_settled_anew_for_other_models(tmp_path: Path) -> None:
    config = sparse_config(tmp_path, **RUN)
    data: Any = {"train_dataset": rows("classes", 8), "data_collator": pad}
    for teacher, expected in ((bert(5, num_hidden_layers=4), 0.0), (bert(5), 1.0), (Silent(5), 0.0)):
        hf_sparse.SparseDistillTrainer(bert(0), config, teacher_model=teacher, **data)
        assert config.hidden_weight == expected
    config.hidden_weight = 0.3
    hf_sparse.SparseDistillTrainer(bert(0), config, teacher_model=bert(5), **data)
    assert config.hidden_weight == 0.3


@pytest.mark.parametrize("student", [deaf, bert])
def test_resumed_it_goes_on_as_it_was(tmp_path: Path, student: Any) -> None:
    given = {"save_strategy": "steps", "save_steps": 2}
    teacher = None if student is deaf else bert(5, num_hidden_layers=4)
    whole, _ = run(tmp_path / "run", student(), teacher, **given)
    trainer = make_trainer(student(), tmp_path / "run", rows("classes", 16), teacher, **{**RUN, **given})
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert trainer.args.hidden_weight == 0.0
    assert_same(weights_of(trainer.student), weights_of(whole.student))
    for weights in weights_of(trainer.student).values():
        assert torch.isfinite(weights).all()

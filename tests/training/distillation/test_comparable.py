"""Hidden states where nobody has said so: compared where models can be, told and left out where not."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

import hf_sparse
from hf_sparse import SparseDistillConfig
from hf_sparse.hub.card import facts_from_folder
from hf_sparse.training.distillation.comparable import why_not_alike
from hf_sparse.training.distillation.teacher import check_depths
from tests.training.families import family_batch, family_model, family_rows
from tests.training.tiny import (
    assert_same,
    bert,
    llama,
    make_trainer,
    pad,
    rows,
    sparse_config,
    t5,
    weights_of,
)

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
    """Takes the wish for hidden states, and returns none."""

    def forward(
        self, input_ids: Any, attention_mask: Any, labels: Any = None, output_hidden_states: Any = None
    ) -> SequenceClassifierOutput:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


class Strict(BertForSequenceClassification):
    """Hands on what it does not know to what does not know it either."""

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any = None, **more: Any) -> Any:
        return self.know(input_ids, attention_mask, labels, **more)

    def know(self, input_ids: Any, attention_mask: Any, labels: Any) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def as_a(kind: type, seed: int = 0) -> Any:
    model = bert(seed)
    model.__class__ = kind
    return model


def cut(seed: int = 0) -> Any:
    """Half of the layers taken out by hand, of which the config knows nothing."""
    model = bert(seed, num_hidden_layers=4)
    model.bert.encoder.layer = nn.ModuleList(model.bert.encoder.layer[:2])
    return model


def skipping() -> Any:
    model = bert()
    model.config.layerdrop = 0.1
    return model


def compressed() -> Any:
    trained = bert(5)
    masks = hf_sparse.BlockMasks.for_model(trained, (4, 1))
    masks.choose(0.5)
    masks.apply_()
    return hf_sparse.compress(trained, masks.state_dict())


def run(
    folder: Path, model: Any, teacher: Any = None, data: Any = None, extra: Any = None, **given: Any
) -> tuple[Any, dict[str, float]]:
    data = rows("classes", 16) if data is None else data
    trainer = make_trainer(model, folder, data, teacher, extra, **{**RUN, **given})
    trainer.train()
    # Of the last step, before which blocks were removed: until then a copy is what the student is.
    return trainer, next(logs for logs in reversed(trainer.state.log_history) if "loss" in logs)


@pytest.mark.parametrize("teacher", [None, lambda: bert(5)], ids=["a copy", "given"])
def test_hidden_states_are_compared_unless_told_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, teacher: Any
) -> None:
    trainer, logged = run(tmp_path, bert(0), teacher and teacher())
    assert trainer.args.hidden_weight is None and trainer.distiller.hidden_weight == 1.0
    assert logged["loss_hidden"] > 0.0
    terms = 0.5 * logged["loss_task"] + 0.5 * logged["loss_kd"] + logged["loss_hidden"]
    assert logged["loss"] == pytest.approx(terms, rel=1e-5)
    assert "hidden states are not compared" not in caplog.text
    trainer.save_model(tmp_path / "final")
    assert facts_from_folder(tmp_path / "final").recipe["hidden_weight"] == 1.0
    _, without = run(tmp_path / "off", bert(0), teacher and teacher(), hidden_weight=0.0)
    assert "loss_hidden" not in without


@pytest.mark.parametrize(
    ("student", "teacher", "reason"),
    [
        (bert, lambda: bert(5, num_hidden_layers=4), "the model has [2] layers and the teacher [4], and no layer_map"),
        (bert, lambda: bert(5, hidden_size=24), "model and teacher are of different widths"),
        (bert, compressed, "the teacher is compressed"),
        (skipping, None, "layers are skipped at random (layerdrop=0.1)"),
        (bert, lambda: Silent(5), "the teacher is a Silent, the model a BertForSequenceClassification"),
        (lambda: as_a(Deaf), None, "they are not returned"),
        (lambda: as_a(Strict), None, "the forward of Strict does not name output_hidden_states"),
        (cut, lambda: bert(5, num_hidden_layers=4), "the model returns 3 of them and the teacher 5"),
    ],
)  # fmt: skip
def test_where_they_cannot_be_compared_it_says_so_and_trains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, student: Any, teacher: Any, reason: str
) -> None:
    with caplog.at_level(logging.WARNING):
        trainer, logged = run(tmp_path, student(), teacher and teacher())
    assert trainer.distiller.projections is None
    assert not logged.get("loss_hidden") and logged["loss_kd"] > 0.0
    trainer.save_model(tmp_path / "final")
    assert "hidden_weight" not in facts_from_folder(tmp_path / "final").recipe
    told = [record.getMessage() for record in caplog.records if "hidden states are not" in record.getMessage()]
    assert len(told) == 1 and reason in told[0]
    # What was asked for is never dropped.
    if "widths" in reason or "skipped" in reason:
        trainer, logged = run(tmp_path / "asked", student(), teacher and teacher(), hidden_weight=1.0)
        assert (trainer.distiller.projections is None) == ("skipped" in reason) and logged["loss_hidden"] > 0.0
    else:
        # What a forward does with **kwargs is not known before it is called: Python says it.
        kind = TypeError if "Strict" in reason else ValueError
        with pytest.raises(kind, match="hidden_weight=|hidden states|output_hidden_states"):
            run(tmp_path / "asked", student(), teacher and teacher(), hidden_weight=1.0)


OTHERS = {
    "a language model": (llama, lambda: rows("lm", 16), pad),
    "an encoder-decoder": (t5, lambda: rows("seq2seq", 16), pad),
    "tagging": (lambda seed: bert(seed, "TokenClassification"), lambda: rows("tagging", 16), pad),
    "images": (lambda seed: family_model("vit", seed), lambda: family_rows("vit"), family_batch),
    "text and images": (lambda seed: family_model("clip", seed), lambda: family_rows("clip"), family_batch),
    "not of transformers": (Silent, lambda: rows("classes", 16), pad),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_in_models_that_do_not_classify_text_they_are_compared_if_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    make, data, collator = OTHERS[kind]
    given = {"data": data(), "extra": {"data_collator": collator}, "block_height": 4}
    trainer, logged = run(tmp_path, make(0), **given)
    assert trainer.distiller.hidden_weight == 0.0 and "loss_hidden" not in logged and logged["loss_kd"] > 0.0
    # It is the rule there, and nothing to be told.
    assert "hidden states" not in caplog.text
    if kind != "not of transformers":
        _, logged = run(tmp_path / "asked", make(0), **given, hidden_weight=1.0)
        assert logged["loss_hidden"] > 0.0
        return
    for field, flag in (("hidden_weight", "output_hidden_states"), ("attention_weight", "output_attentions")):
        with pytest.raises(ValueError, match=rf"{field}=1\.0 asks .* the forward of Silent does not take {flag}"):
            run(tmp_path / "asked", make(0), **given, **{field: 1.0})


def test_of_a_decorated_forward_the_decorator_counts() -> None:
    model = Silent()
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args: Any, output_hidden_states: bool = False, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    config = SparseDistillConfig(output_dir="out", use_cpu=True, hidden_weight=1.0)
    with pytest.raises(ValueError, match="the forward of Silent does not take output_hidden_states"):
        check_depths(model, model, config, 1.0)
    model.forward = forward  # type: ignore[method-assign]
    check_depths(model, model, config, 1.0)


def test_a_batch_whose_states_do_not_fit_is_trained_without_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Padding(BertForSequenceClassification):
        """Pads odd lengths inside, as block-sparse attention does, and returns states of that length."""

        def forward(
            self, input_ids: Any, attention_mask: Any, labels: Any = None, output_hidden_states: Any = None
        ) -> Any:
            odd = input_ids.shape[1] % 2
            input_ids, attention_mask = (nn.functional.pad(x, (0, odd)) for x in (input_ids, attention_mask))
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, labels=labels,
                output_hidden_states=output_hidden_states,
            )  # fmt: skip

    def lengths(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = 10 + samples[0]["labels"] % 2
        return {key: nn.functional.pad(x, (0, length - x.shape[1])) if x.ndim == 2 else x
                for key, x in pad(samples).items()}  # fmt: skip

    data = rows("classes", 16)
    for i, row in enumerate(data):
        row["labels"] = i // 8
    trainer = make_trainer(as_a(Padding), tmp_path, data, as_a(Padding, 5), {"data_collator": lengths},
                           **{**RUN, "train_sampling_strategy": "sequential"})  # fmt: skip
    trainer.train()
    steps = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert [logs["loss_hidden"] > 0.0 for logs in steps] == [True, False, True, False]
    assert caplog.text.count("hidden states are not compared, unless hidden_weight is given: no mask fits them") == 1


def test_with_model_init_it_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {"model_init": lambda: bert(0)}
    run(tmp_path, None, bert(5, num_hidden_layers=4), extra=extra)
    assert caplog.text.count("no layer_map pairs them") == 1


def states(*shapes: tuple[int, ...]) -> dict[str, Any]:
    return {"hidden_states": tuple(torch.zeros(shape) for shape in shapes)}


@pytest.mark.parametrize(
    ("student", "teacher", "mask", "reason"),
    [
        (states((2, 3, 4), (2, 3, 4)), states((2, 3, 4), (2, 3, 4)), (2, 3), None),
        (states((4, 3, 4)), states((4, 3, 4)), (2, 2, 3), None),
        (states((2, 3, 4), (2, 2, 8)), states((2, 3, 4), (2, 2, 8)), (2, 3), "not tensors of one shape"),
        (states((2, 3, 4)), states((2, 3, 8)), (2, 3), "not tensors of one shape"),
        (states((2, 4, 3, 3)), states((2, 4, 3, 3)), (2, 3), "not tensors of one shape"),
        ({"hidden_states": torch.zeros(2, 3, 4)}, states((2, 3, 4)), (2, 3), "not tensors of one shape"),
        ({"hidden_states": ((torch.zeros(2, 3, 4),),)}, states((2, 3, 4)), (2, 3), "not tensors of one shape"),
        (states((2, 3, 4)), states((2, 3, 4)), (2, 12), "no mask fits them"),
        (states((4, 6, 4)), states((4, 6, 4)), (2, 12), "no mask fits them"),
        (states((2, 3, 4)), states((2, 3, 4)), None, "no mask fits them"),
        (states((2, 3, 4)), {"encoder_hidden_states": states((2, 3, 4))["hidden_states"]}, (2, 3), "not returned"),
    ],
)
def test_outputs_of_other_kinds_are_not_compared(student: Any, teacher: Any, mask: Any, reason: str | None) -> None:
    inputs = {} if mask is None else {"attention_mask": torch.ones(mask)}
    found = why_not_alike(student, teacher, inputs, mapped=False)
    assert found is None if reason is None else reason in found


def test_a_map_of_layers_asks_for_them(tmp_path: Path) -> None:
    trainer, logged = run(tmp_path, bert(0), bert(5, num_hidden_layers=4), layer_map="uniform")
    assert trainer.distiller.hidden_weight == 1.0 and logged["loss_hidden"] > 0.0


def test_a_map_for_attention_alone_leaves_them_open(tmp_path: Path) -> None:
    wide = {"hidden_size": 24, "num_hidden_layers": 4}
    trainer, logged = run(tmp_path, bert(0), bert(5, **wide), layer_map="uniform", attention_weight=1.0)
    assert trainer.distiller.hidden_weight == 0.0 and trainer.distiller.projections is None
    assert logged["loss_attention"] > 0.0 and "loss_hidden" not in logged


def test_one_config_serves_several_trainers(tmp_path: Path) -> None:
    config = sparse_config(tmp_path, **RUN)
    data: Any = {"train_dataset": rows("classes", 8), "data_collator": pad}
    for given, teacher, expected in (
        ({}, bert(5, num_hidden_layers=4), 0.0), ({}, bert(5), 1.0), ({"hidden_weight": 0.3}, bert(5), 0.3),
        ({"hidden_weight": 0.0}, bert(5), 0.0), ({"hidden_weight": None, "kd_weight": 0.0}, None, 0.0),
    ):  # fmt: skip
        for name, value in given.items():
            setattr(config, name, value)
        trainer = hf_sparse.SparseDistillTrainer(bert(0), config, teacher_model=teacher, **data)
        assert trainer.distiller.hidden_weight == expected and trainer.teacher_model is teacher
    config.hidden_weight = 1.0
    with pytest.raises(ValueError, match=r"hidden_weight=1\.0 compares layer by layer"):
        hf_sparse.SparseDistillTrainer(bert(0), config, teacher_model=bert(5, num_hidden_layers=4), **data)


@pytest.mark.parametrize("student", [lambda: as_a(Deaf), bert], ids=["not returned", "another depth"])
def test_resumed_it_goes_on_as_it_was(tmp_path: Path, student: Any) -> None:
    given = {"save_strategy": "steps", "save_steps": 2}
    teacher = None if isinstance(student(), Deaf) else bert(5, num_hidden_layers=4)
    whole, _ = run(tmp_path / "run", student(), teacher, **given)
    trainer = make_trainer(student(), tmp_path / "run", rows("classes", 16), teacher, **{**RUN, **given})
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert not any(logs.get("loss_hidden") for logs in trainer.state.log_history)
    assert_same(weights_of(trainer.student), weights_of(whole.student))
    other = make_trainer(
        student(), tmp_path / "run", rows("classes", 16), teacher, **{**RUN, **given, "hidden_weight": 0.0}
    )
    with pytest.raises(ValueError, match=r"hidden_weight was None, in this run it is 0\.0"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))

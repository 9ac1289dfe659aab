"""`SparseDistillSeq2SeqTrainer`: a swap for `Seq2SeqTrainer`, generation included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_sparse import SparseDistillConfig, SparseDistillSeq2SeqConfig, SparseDistillSeq2SeqTrainer
from tests.training.tiny import arguments, pad, pruned_zero, rows, t5

DATA = rows("seq2seq", 8)
GENERATION = {"predict_with_generate": True, "generation_max_length": 7, "generation_num_beams": 2}


def talking(seed: int) -> Any:
    """A tiny T5 that never ends or pads what it generates."""
    model = t5(seed)
    model.generation_config.suppress_tokens = [0, 1]
    return model


def make(folder: Path, model: Any, args: Any = None, **given: Any) -> SparseDistillSeq2SeqTrainer:
    args = args or SparseDistillSeq2SeqConfig(**arguments(folder, **{**GENERATION, **given}))
    return SparseDistillSeq2SeqTrainer(model, args, train_dataset=DATA, eval_dataset=DATA, data_collator=pad)


def generated(model: Any, count: int = 8) -> np.ndarray[Any, Any]:
    inputs = {key: value for key, value in pad(DATA[:count]).items() if key != "labels"}
    found = model.eval().generate(**inputs, max_length=7, num_beams=2)
    # Seq2SeqTrainer pads to the length of the model's own generation config.
    return torch.nn.functional.pad(found, (0, 20 - found.shape[1])).numpy()


def test_predictions_are_what_the_student_generates(tmp_path: Path) -> None:
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"tokens": float((prediction.predictions != 0).sum())}

    model, teacher = talking(0), talking(5)
    args = SparseDistillSeq2SeqConfig(**arguments(tmp_path, **GENERATION, sparsity=0.5, graft_start=0.5))
    trainer = SparseDistillSeq2SeqTrainer(
        model, args, train_dataset=DATA, eval_dataset=DATA, data_collator=pad, compute_metrics=metrics,
        teacher_model=teacher,
    )  # fmt: skip
    trainer.train()
    assert pruned_zero(trainer)
    found = trainer.evaluate()
    assert found["eval_tokens"] == 8 * 6
    assert np.array_equal(seen[-1].predictions, generated(model))
    with torch.no_grad():
        assert found["eval_loss"] == pytest.approx(model(**pad(DATA)).loss.item(), rel=1e-6)
    shorter = trainer.predict(DATA, max_length=5).predictions
    assert (shorter[:, 5:] == 0).all() and (shorter[:, 1:5] != 0).all()
    assert trainer.evaluate_teacher()["teacher_tokens"] == 8 * 6
    assert np.array_equal(seen[-1].predictions, generated(teacher)), "the teacher generates for itself"
    assert not np.array_equal(generated(teacher), generated(model))
    trainer.save_model(tmp_path / "final")
    assert np.array_equal(generated(type(model).from_pretrained(tmp_path / "final")), generated(model))


def test_with_everything_off_it_is_the_plain_trainer(tmp_path: Path) -> None:
    off = {"sparsity": 0.0, "kd_weight": 0.0}
    mine = make(tmp_path / "mine", talking(0), **off)
    plain_args = {
        key: value for key, value in arguments(tmp_path / "plain", **GENERATION).items() if "block" not in key
    }
    plain = Seq2SeqTrainer(talking(0), Seq2SeqTrainingArguments(**plain_args), train_dataset=DATA, eval_dataset=DATA,
                           data_collator=pad)  # fmt: skip
    for trainer in (mine, plain):
        trainer.train()
    for (name, weight), other in zip(mine.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(weight, other), name
    assert np.array_equal(mine.predict(DATA).predictions, plain.predict(DATA).predictions)


def test_arguments_of_either_kind_are_taken_over(tmp_path: Path) -> None:
    plain = Seq2SeqTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **GENERATION)
    args = make(tmp_path, t5(0), plain).args
    assert isinstance(args, SparseDistillSeq2SeqConfig)
    assert (args.predict_with_generate, args.generation_max_length, args.sparsity) == (True, 7, 0.8)
    sparse = SparseDistillConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", sparsity=0.25)
    args = make(tmp_path, t5(0), sparse).args
    assert isinstance(args, SparseDistillSeq2SeqConfig)
    assert (args.predict_with_generate, args.sparsity) == (False, 0.25)
    assert isinstance(SparseDistillSeq2SeqTrainer(t5(0), train_dataset=DATA).args, SparseDistillSeq2SeqConfig)


def test_the_command_line_takes_both_sets_of_fields(tmp_path: Path) -> None:
    line = [f"--output_dir={tmp_path}", "--use_cpu", "--predict_with_generate", "--preset=hybrid", "--sparsity=0.5"]
    (args,) = HfArgumentParser(SparseDistillSeq2SeqConfig).parse_args_into_dataclasses(line)
    assert (args.predict_with_generate, args.feed_forward, args.sparsity) == (True, "units", 0.5)
    assert args.to_dict()["feed_forward"] == "units"


def test_a_generation_config_is_used(tmp_path: Path) -> None:
    settings = GenerationConfig(max_length=4, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    given = {"generation_config": settings, "generation_max_length": None, "generation_num_beams": None}
    trainer = make(tmp_path, t5(0), **given)
    assert trainer.predict(DATA).predictions.shape[1] == 4

"""Tasks beyond those of `test_distill.py`: images, embeddings, image and text, speech; all terms in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from hf_sparse.training.distillation.teacher import load_teacher
from tests.training.families import FAMILIES, family_batch, family_model, family_rows
from tests.training.tiny import SMALL, VOCAB, gradients_of, make_trainer, pad, pruned_zero, rows, stirred

ONE_STEP = {"sparsity": 0.0, "hidden_weight": 0.5, "max_steps": 1, "logging_strategy": "steps", "logging_steps": 1}


def without_dropout(model: Any) -> Any:
    """Whatever a family calls it, in modules and in numbers that functions are called with."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def logged_step(folder: Path, student: Any, teacher: Any, data: Any, **given: Any) -> dict[str, float]:
    trainer = make_trainer(student, folder, data, teacher, extra={"data_collator": family_batch}, **ONE_STEP, **given)
    trainer.train()
    return trainer.state.log_history[0]


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """T^2 KL at T = 2 over the last dimension, written out."""
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    return 4 * (p * (p / q).log()).sum(-1)


def relative(student: torch.Tensor, teacher: torch.Tensor) -> float:
    return ((student - teacher).square().sum(-1) / teacher.square().sum(-1)).mean().item()


def apart(student: Any, teacher: Any, real: Any = None) -> float:
    """Squared distance over the squared size of the teacher's, a mean over samples, summed over layers."""
    total = 0.0
    for mine, theirs in zip(student, teacher, strict=True):
        for i in range(len(mine)):
            kept = slice(None) if real is None else real[i].bool()
            error = (mine[i][kept] - theirs[i][kept]).square().sum() / theirs[i][kept].square().sum()
            total += error.item() / len(mine)
    return total


def both(name: str, **asked: Any) -> tuple[Any, Any, Any, Any, Any]:
    """Two models of a family without dropout, a batch, and what they return for it."""
    data = family_rows(name)
    models = [without_dropout(family_model(name, seed)) for seed in (0, 5)]
    batch = family_batch(data)
    with torch.no_grad():
        outputs = [model.eval()(**batch, output_hidden_states=True, **asked) for model in models]
    return models[0], models[1], data, outputs[0], outputs[1]


def test_image_classification(tmp_path: Path) -> None:
    student, teacher, data, mine, theirs = both("vit")
    found = logged_step(tmp_path, student, teacher, data)
    assert found["loss_kd"] == pytest.approx(divergence(mine.logits, theirs.logits).mean().item(), rel=1e-4)
    assert found["loss_hidden"] == pytest.approx(apart(mine.hidden_states, theirs.hidden_states), rel=1e-4)
    labels = torch.tensor([row["labels"] for row in data])
    assert found["loss_task"] == pytest.approx(torch.nn.functional.cross_entropy(mine.logits, labels).item(), rel=1e-4)
    parts = 0.5 * found["loss_task"] + 0.5 * found["loss_kd"] + 0.5 * found["loss_hidden"]
    assert found["loss"] == pytest.approx(parts, rel=1e-5)


def test_image_and_text(tmp_path: Path) -> None:
    student, teacher, data, mine, theirs = both("clip")
    found = logged_step(tmp_path, student, teacher, data)
    expected = [relative(mine[name], theirs[name]) for name in ("image_embeds", "text_embeds")]
    assert found["loss_kd"] == pytest.approx(sum(expected) / 2, rel=1e-4)
    mask = family_batch(data)["attention_mask"]
    text = apart(mine.text_model_output.hidden_states, theirs.text_model_output.hidden_states, mask)
    image = apart(mine.vision_model_output.hidden_states, theirs.vision_model_output.hidden_states)
    assert found["loss_hidden"] == pytest.approx(text + image, rel=1e-4)
    assert found["loss_task"] == pytest.approx(mine.loss.item(), rel=1e-4)


def test_speech_to_text(tmp_path: Path) -> None:
    student, teacher, data, mine, theirs = both("whisper")
    found = logged_step(tmp_path, student, teacher, data)
    counts = family_batch(data)["labels"] != -100
    kd = divergence(mine.logits, theirs.logits)
    assert found["loss_kd"] == pytest.approx(kd[counts].mean().item(), rel=1e-4)
    encoder = apart(mine.encoder_hidden_states, theirs.encoder_hidden_states)
    decoder = apart(mine.decoder_hidden_states, theirs.decoder_hidden_states, counts)
    assert found["loss_hidden"] == pytest.approx(encoder + decoder, rel=1e-4)
    assert found["loss_task"] == pytest.approx(mine.loss.item(), rel=1e-4)


def sentences(count: int = 8) -> list[dict[str, Any]]:
    return [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows("lm", count)]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_sentence_embeddings_are_the_target(tmp_path: Path, pooling: str) -> None:
    data, (student, teacher) = sentences(), (encoder(0), encoder(5))
    batch = pad(data)
    with torch.no_grad():
        mine, theirs = (model.eval()(**batch, output_hidden_states=True) for model in (student, teacher))
    picked = []
    for states in (mine.last_hidden_state, theirs.last_hidden_state):
        real = [states[i][batch["attention_mask"][i].bool()] for i in range(8)]
        picked.append(torch.stack([{"mean": x.mean(0), "cls": x[0], "last": x[-1]}[pooling] for x in real]))
    found = logged_step(tmp_path, student, teacher, data, task_weight=0.0, embedding_pooling=pooling)
    assert found["loss_kd"] == pytest.approx(relative(*picked), rel=1e-4)
    hidden = apart(mine.hidden_states, theirs.hidden_states, batch["attention_mask"])
    assert found["loss_hidden"] == pytest.approx(hidden, rel=1e-4)
    assert found["loss"] == pytest.approx(0.5 * found["loss_kd"] + 0.5 * hidden, rel=1e-4)


def encoder(seed: int) -> Any:
    torch.manual_seed(seed)
    config = tf.MPNetConfig(vocab_size=VOCAB, **SMALL, max_position_embeddings=40, pad_token_id=0,
                            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    return stirred(tf.MPNetModel(config))


def test_an_encoder_is_pruned_evaluated_and_loaded_again(tmp_path: Path) -> None:
    data, model = sentences(), encoder(0)
    trainer = make_trainer(model, tmp_path / "run", data, encoder(5), sparsity=0.5, task_weight=0.0, graft_start=0.5,
                           extra={"eval_dataset": data})  # fmt: skip
    trainer.train()
    assert pruned_zero(trainer)
    assert trainer.predict(data).predictions[0].shape[0] == 8
    trainer.save_model(tmp_path / "final")
    loaded = tf.AutoModel.from_pretrained(tmp_path / "final")
    with torch.no_grad():
        expected, found = (m.eval()(**pad(data)).last_hidden_state for m in (model, loaded))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_embeddings_do_not_depend_on_the_split(tmp_path: Path) -> None:
    def run(per_device: int, accumulate: int) -> dict[str, torch.Tensor]:
        return gradients_of(make_trainer(
            encoder(0), tmp_path, sentences(8), encoder(5), task_weight=0.0, max_steps=1, max_grad_norm=0.0,
            per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulate,
        ))[0]  # fmt: skip

    whole, parts = run(8, 1), run(2, 4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=2e-4, atol=2e-6)


def test_a_model_without_a_loss_says_what_it_needs(tmp_path: Path) -> None:
    trainer = make_trainer(encoder(0), tmp_path, sentences(), encoder(5))
    with pytest.raises(ValueError, match="MPNetModel returns no loss for these inputs, .* set task_weight=0 to learn"):
        trainer.train()

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return outputs["last_hidden_state"].square().mean()

    make_trainer(encoder(0), tmp_path, sentences(), encoder(5), extra={"compute_loss_func": loss}).train()


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_teacher_of_every_family_is_loaded_from_its_path(tmp_path: Path, name: str) -> None:
    student = family_model(name)
    family_model(name, 5).save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, student)
    assert type(teacher) is type(student)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())

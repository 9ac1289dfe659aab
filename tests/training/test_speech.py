"""Speech: masks of samples become masks of frames, CTC's labels stand at no frame, sums stay sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

from hf_sparse.training.distillation.predictions import FRAMES, prediction_unit
from hf_sparse.training.speech import is_ctc, seen_by_losses, task_unit
from tests.training.families import family_batch, family_model, family_rows
from tests.training.test_trainer_invariance import assert_close
from tests.training.tiny import gradients_of, make_trainer

LENGTHS = [120, 90, 60, 120, 75, 100, 50, 110]


def recordings(count: int = 8) -> list[dict[str, Any]]:
    """Waveforms of several lengths, padded to one, with labels of several lengths."""
    made = family_rows("wav2vec2", count)
    for i, row in enumerate(made):
        length = LENGTHS[i % 8]
        row["attention_mask"] = (torch.arange(120) < length).long()
        row["input_values"] = row["input_values"] * row["attention_mask"]
        row["labels"] = row["labels"][: 1 + i % 3]
    return made


def frames_of(samples: int) -> int:
    """Frames behind convolutions of kernels 10 and 3 with strides 5 and 2."""
    return ((samples - 10) // 5 + 1 - 3) // 2 + 1


def wav2vec2(seed: int, reduction: str = "mean") -> Any:
    model = family_model("wav2vec2", seed)
    model.config.ctc_loss_reduction = reduction
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout"):
        setattr(model.config, name, 0.0)
    for layer in model.wav2vec2.encoder.layers:
        layer.attention.dropout = 0.0
    return model


def speech_to_text(seed: int) -> Any:
    """Speech2Text: convolutions shorten what the encoder reads, and a decoder answers in tokens."""
    torch.manual_seed(seed)
    config = Speech2TextConfig(
        vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, max_source_positions=64, max_target_positions=32,
        input_feat_per_channel=8, conv_channels=16, num_conv_layers=2, dropout=0.0, init_std=0.5,
    )  # fmt: skip
    return Speech2TextForConditionalGeneration(config)


def logged_step(folder: Path, student: Any, teacher: Any, data: Any, collator: Any) -> dict[str, float]:
    trainer = make_trainer(
        student, folder, data, teacher, extra={"data_collator": collator}, sparsity=0.0, hidden_weight=1.0,
        max_steps=1, logging_strategy="steps", logging_steps=1,
    )  # fmt: skip
    trainer.train()
    return trainer.state.log_history[0]


def stacked(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def test_where_a_decoder_answers_frames_count_for_the_encoder_alone(tmp_path: Path) -> None:
    lengths = (40, 24, 40, 32, 20, 40, 28, 36)
    data = [
        {"input_features": torch.randn(40, 8) * (torch.arange(40) < length)[:, None],
         "attention_mask": (torch.arange(40) < length).long(), "labels": torch.randint(3, 40, (6,))}
        for length in lengths
    ]  # fmt: skip
    student, teacher, batch = speech_to_text(0), speech_to_text(5), stacked(data)
    with torch.no_grad():
        mine, theirs = (m.eval()(**batch, output_hidden_states=True) for m in (student, teacher))
    p, q = ((m.logits / 2.0).softmax(-1) for m in (theirs, mine))
    kd = 4.0 * (p * (p.log() - q.log())).sum(-1).mean().item()
    hidden = 0.0
    for i, length in enumerate(lengths):
        frames = -(-length // 4)  # two convolutions of stride 2
        for side, count in (("encoder", frames), ("decoder", 6)):
            for s, t in zip(*(m[f"{side}_hidden_states"] for m in (mine, theirs)), strict=True):
                s, t = s[i, :count], t[i, :count]
                hidden += ((s - t).square().sum() / t.square().sum()).item() / 8
    assert mine.encoder_hidden_states[-1].shape[1] == 10 != mine.logits.shape[1]
    logged = logged_step(tmp_path, student, teacher, data, stacked)
    assert logged["loss_kd"] == pytest.approx(kd, rel=1e-4)
    assert logged["loss_hidden"] == pytest.approx(hidden, rel=1e-4)


def test_losses_are_means_over_the_frames_of_each_recording(tmp_path: Path) -> None:
    data, (student, teacher) = recordings(), (wav2vec2(0), wav2vec2(5))
    batch = family_batch(data)
    with torch.no_grad():
        mine, theirs = (m.eval()(**batch, output_hidden_states=True) for m in (student, teacher))
    counts = [frames_of(length) for length in LENGTHS]
    assert max(counts) == mine.logits.shape[1] and min(counts) < max(counts)
    kd, hidden = [], [0.0] * 8
    for i, count in enumerate(counts):
        p, q = ((m.logits[i, :count] / 2.0).softmax(-1) for m in (theirs, mine))
        kd.append(4.0 * (p * (p.log() - q.log())).sum(-1).mean().item())
        for s, t in zip(mine.hidden_states, theirs.hidden_states, strict=True):
            hidden[i] += ((s[i, :count] - t[i, :count]).square().sum() / t[i, :count].square().sum()).item()
    logged = logged_step(tmp_path, student, teacher, data, family_batch)
    assert logged["loss_kd"] == pytest.approx(sum(kd) / 8, rel=1e-4)
    assert logged["loss_hidden"] == pytest.approx(sum(hidden) / 8, rel=1e-4)
    assert logged["loss_task"] == pytest.approx(mine.loss.item(), rel=1e-4)


def ctc(reduction: str, folder: Path, per_device: int, accumulate: int) -> Any:
    """A trainer over 2 steps of 8 recordings each, split as asked."""
    return make_trainer(
        wav2vec2(0, reduction), folder, recordings(16), wav2vec2(5, reduction), hidden_weight=0.3, max_steps=2,
        optim="sgd", learning_rate=1e-3, max_grad_norm=0.0, extra={"data_collator": family_batch},
        importance="magnitude", per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulate,
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_do_not_depend_on_the_split(tmp_path: Path, reduction: str) -> None:
    whole, parts = (gradients_of(ctc(reduction, tmp_path, *split)) for split in ((8, 1), (2, 4)))
    for step, (first, second) in enumerate(zip(whole, parts, strict=True)):
        assert_close(first, second, f"step {step}")


def test_units_of_the_task_loss() -> None:
    assert task_unit(wav2vec2(0, "mean")) == "samples"
    assert task_unit(wav2vec2(0, "sum")) == "sum"
    assert task_unit(family_model("whisper")) == "items"
    assert not is_ctc(family_model("whisper"))


def test_labels_that_happen_to_be_as_many_as_frames_are_not_taken_for_theirs() -> None:
    batch, model = family_batch(recordings()), wav2vec2(0)
    outputs = model(**batch)
    batch["labels"] = torch.ones(outputs.logits.shape[:2], dtype=torch.long)
    seen = seen_by_losses(model, batch, outputs)
    assert "labels" not in seen and "labels" in batch
    assert seen[FRAMES].sum(1).tolist() == [frames_of(length) for length in LENGTHS]
    assert prediction_unit(outputs, seen) == "samples"


def test_models_that_read_tokens_see_their_inputs() -> None:
    inputs = {"input_ids": torch.ones(1, 2), "attention_mask": torch.ones(1, 2)}
    assert seen_by_losses(family_model("bert"), inputs, {}) is inputs

"""Mistakes that were found by attacking the trainer, one test each."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from hf_sparse import SparseDistillTrainer, graft, report
from hf_sparse.core.structure.targets import find_targets
from hf_sparse.training.distillation.distill import attention_loss, hidden_loss
from hf_sparse.training.distillation.graft import graft_sites
from hf_sparse.training.distillation.layerwise import compared_layers
from hf_sparse.training.pruning.pruner import Pruner
from hf_sparse.training.support import predicts_next
from tests.training.tiny import (
    SMALL,
    bert,
    llama,
    make_trainer,
    pad,
    pruned_zero,
    rows,
    sparse_config,
    stirred,
    weights_of,
)


def gpt2() -> tf.GPT2LMHeadModel:
    torch.manual_seed(0)
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16))


def test_older_causal_models_predict_the_next_token() -> None:
    assert predicts_next(gpt2()) and predicts_next(llama())
    assert not predicts_next(bert())


def test_grafting_refuses_another_attention_implementation() -> None:
    student, teacher = llama(), copy.deepcopy(llama())
    student.set_attn_implementation("sdpa")
    teacher.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="student uses 'sdpa', the teacher 'eager'"), graft(student, teacher, [False]):
        pass


def test_a_given_teacher_takes_over_the_attention_of_the_student(tmp_path: Path) -> None:
    student, teacher = llama(seed=0), llama(seed=1)
    student.set_attn_implementation("sdpa")
    teacher.set_attn_implementation("eager")
    trainer = make_trainer(student, tmp_path, rows("lm", 8), teacher=teacher, graft_start=0.1)
    assert trainer.teacher_model.config._attn_implementation == "sdpa"
    assert graft_sites(student, trainer.teacher_model)


def test_the_card_tells_the_format_of_the_file(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path / "run", rows("classes", 8), sparsity=0.8)
    trainer.save_model(tmp_path / "early")
    assert json.loads((tmp_path / "early" / "hf_sparse_card.json").read_text())["save_format"] == "dense"
    assert "quantization_config" not in json.loads((tmp_path / "early" / "config.json").read_text())


def test_resuming_a_finished_run_takes_no_further_step(tmp_path: Path) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    first = make_trainer(bert(), tmp_path, rows("classes", 13), sparsity=0.5, **settings)
    first.train()
    again = make_trainer(bert(), tmp_path, rows("classes", 13), sparsity=0.5, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    for name, weight in weights_of(first.model).items():
        assert torch.equal(weight, weights_of(again.model)[name]), name


def test_linears_that_torch_reads_by_itself_are_no_targets() -> None:
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2)})
    with pytest.raises(ValueError, match="no linear layer that could be pruned inside encoder.layers"):
        find_targets(model)
    with pytest.raises(ValueError, match="encoder.layers.0.linear1, .* nn.TransformerEncoderLayer reads by itself"):
        find_targets(model, target_modules=r"encoder\..*linear.")


def test_frozen_targets_are_refused(tmp_path: Path) -> None:
    model = bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"6 target layer\(s\) are frozen .* bert.encoder.layer.0"):
        Pruner(model, sparse_config(tmp_path, sparsity=0.5))
    config = sparse_config(tmp_path, sparsity=0.5, exclude_modules=r".*layer\.0\..*")
    assert all(".layer.1." in name or ".layer.2." in name for name in Pruner(model, config).masks.targets)


def test_a_wrong_backend_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", "cuda")
    with pytest.raises(ValueError, match="HF_SPARSE_BACKEND='cuda' is not a backend: use one of auto"):
        Pruner(bert(), sparse_config(tmp_path, sparsity=0.5))


def test_a_run_that_diverged_says_so(tmp_path: Path) -> None:
    trainer: SparseDistillTrainer = make_trainer(bert(), tmp_path, rows("classes", 8), sparsity=0.5)
    with torch.no_grad():
        trainer.model.bert.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="training diverged: bert.encoder.layer.0.output.dense holds NaN"):
        trainer.pruner.check_target()


def test_tags_given_for_the_card_are_in_it(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), sparsity=0.5, max_steps=2)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(tags=["pruned", "mine"], language="en")
    header = (tmp_path / "README.md").read_text().split("---")[1]
    assert "- mine" in header and header.count("- pruned") == 1


def test_a_teacher_of_another_dtype_is_refused_where_its_layers_are_grafted(tmp_path: Path) -> None:
    teacher = bert(1).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"graft_start=0.5 hands .* in torch.float32, to .* in torch.bfloat16"):
        make_trainer(bert(), tmp_path, rows("classes", 8), teacher, graft_start=0.5)
    make_trainer(bert(), tmp_path, rows("classes", 8), teacher, sparsity=0.5).train()


def test_a_teacher_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"teacher_model='.*nowhere' cannot be loaded with AutoModelForSequenceClass"):
        make_trainer(bert(), tmp_path, rows("classes", 8), tmp_path / "nowhere")


def test_a_compressed_teacher_gives_logits_and_no_layers(tmp_path: Path) -> None:
    teacher = make_trainer(bert(), tmp_path / "teacher", rows("classes", 8), sparsity=0.5)
    teacher.train()
    teacher.save_model()
    make_trainer(bert(), tmp_path, rows("classes", 8), tmp_path / "teacher", sparsity=0.5).train()
    for given in ({"hidden_weight": 1.0}, {"graft_start": 0.5}):
        with pytest.raises(ValueError, match=r"teacher_model is compressed, .* load it with hf_sparse.load_dense"):
            make_trainer(bert(), tmp_path, rows("classes", 8), tmp_path / "teacher", **given)


def test_a_schedule_that_knows_no_projections_is_refused(tmp_path: Path) -> None:
    for schedule in (True, False):
        model = bert()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        given = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0) if schedule else None
        trainer = make_trainer(model, tmp_path, rows("classes", 8), bert(5, hidden_size=24), sparsity=0.5,
                               hidden_weight=1.0, extra={"optimizers": (optimizer, given)})  # fmt: skip
        if schedule:
            with pytest.raises(ValueError, match=r"optimizers=\(optimizer, schedule\) holds a schedule for the model"):
                trainer.train()
        else:
            before = weights_of(trainer.distiller.projections)
            trainer.train()
            assert any((before[n] != w).any() for n, w in weights_of(trainer.distiller.projections).items())


def accuracy(predicted: tf.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def test_several_data_sets_are_evaluated_and_all_of_them_are_in_the_card(tmp_path: Path) -> None:
    sets = {"easy": rows("classes", 6, seed=2), "hard": rows("classes", 7, seed=3)}
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), sparsity=0.5, eval_strategy="steps", eval_steps=2,
                           extra={"eval_dataset": sets, "compute_metrics": accuracy})  # fmt: skip
    trainer.train()
    teacher = trainer.evaluate_teacher()
    trainer.save_model()
    found = {entry["type"]: entry for entry in json.loads((tmp_path / "hf_sparse_card.json").read_text())["metrics"]}
    assert sorted(found) == ["easy_accuracy", "hard_accuracy"]
    for name in sets:
        last = [logs[f"eval_{name}_accuracy"] for logs in trainer.state.log_history if f"eval_{name}_accuracy" in logs]
        assert found[f"{name}_accuracy"]["value"] == last[-1]
        alone = trainer.evaluate_teacher(sets[name])["teacher_accuracy"]
        assert found[f"{name}_accuracy"]["dense_value"] == alone == teacher[f"teacher_{name}_accuracy"]


def test_a_teacher_without_data_to_be_evaluated_on(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), sparsity=0.5)
    with pytest.raises(ValueError, match="no data to evaluate the teacher on: give eval_dataset"):
        trainer.evaluate_teacher()


def test_a_list_of_labels_for_each_image_is_distilled_all_the_same(tmp_path: Path) -> None:
    config = tf.YolosConfig(**SMALL, image_size=[16, 16], patch_size=8, num_detection_tokens=3, num_labels=3)
    data = [
        {"pixel_values": torch.randn(3, 16, 16), "labels": {"class_labels": torch.tensor([i % 3]),
                                                            "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}}
        for i in range(8)
    ]  # fmt: skip

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "pixel_values": torch.stack([x["pixel_values"] for x in batch]),
            "labels": [x["labels"] for x in batch],
        }

    trainer = make_trainer(yolos(config, 0), tmp_path, data, yolos(config, 1), sparsity=0.5,
                           extra={"data_collator": collate}, remove_unused_columns=False, hidden_weight=1.0,
                           logging_strategy="steps", logging_steps=1)  # fmt: skip
    trainer.train()
    assert pruned_zero(trainer)
    assert all(logs["loss_kd"] > 0 for logs in trainer.state.log_history if "loss" in logs)


def yolos(config: tf.YolosConfig, seed: int) -> tf.YolosForObjectDetection:
    torch.manual_seed(seed)
    return stirred(tf.YolosForObjectDetection(config))


def bart_classifier(seed: int) -> tf.BartForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "dropout": 0.0,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 40,
             "max_position_embeddings": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
             "num_labels": 3, "attn_implementation": "eager"}  # fmt: skip
    return tf.BartForSequenceClassification(tf.BartConfig(**sizes)).eval()


def test_padding_counts_in_no_layer_of_an_encoder_decoder_that_classifies() -> None:
    student, teacher = bart_classifier(0), bart_classifier(1)
    ids = torch.tensor([[5, 6, 7, 2]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([1])}
    padded = {"input_ids": torch.cat([ids, torch.zeros_like(ids)], 1), "labels": batch["labels"],
              "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]])}  # fmt: skip
    losses = []
    for inputs in (batch, padded):
        asked = {**inputs, "output_hidden_states": True, "output_attentions": True}
        with torch.no_grad():
            outputs = student(**asked), teacher(**asked)
        for kind, loss in (("hidden_states", hidden_loss), ("attentions", attention_loss)):
            sides = compared_layers(*outputs, inputs, kind, "hidden_weight")
            assert [side.name for side in sides] == ["encoder", "decoder"]
            losses.append([loss(side.student, side.teacher, side.mask).item() for side in sides])
    assert losses[2] == pytest.approx(losses[0], rel=1e-4) and losses[3] == pytest.approx(losses[1], rel=1e-4)


def test_linears_that_their_module_reads_without_calling_are_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tf.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4,
                            pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    model = stirred(tf.MambaForCausalLM(config), scale=0.02)
    with pytest.raises(
        ValueError, match=r"MambaMixer reads the weight of backbone.layers.0.mixer.dt_proj .* exclude_modules="
    ):
        make_trainer(model, tmp_path, rows("lm", 8), sparsity=0.5)
    assert make_trainer(model, tmp_path, rows("lm", 8), sparsity=0.5, save_format="dense").pruner.masks.targets
    trainer = make_trainer(model, tmp_path, rows("lm", 8), sparsity=0.5, exclude_modules=".*(dt_proj)")
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([rows("lm", 1)[0]["input_ids"]])
    loaded = tf.MambaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected, found = trainer.model.eval()(ids).logits, loaded(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_plain_run_after_the_pruning_is_told_from_it(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path / "sparse", rows("classes", 8), sparsity=0.5)
    trainer.train()
    model = trainer.model
    assert (report(model).sparsity, report(model).stale_masks) == (0.5, ())
    args = tf.TrainingArguments(
        str(tmp_path / "plain"), learning_rate=1e-2, max_steps=2, use_cpu=True, report_to="none", save_strategy="no"
    )
    tf.Trainer(model, args, train_dataset=rows("classes", 8), data_collator=pad).train()
    found = report(model)
    assert found.sparsity < 0.01 and len(found.stale_masks) == 12 and "reported as dense" in str(found)

"""The options of `Trainer` that people bring along work here as they do there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_sparse import SparseDistillConfig, SparseDistillTrainer
from tests.training.scenarios import model_for
from tests.training.tiny import (
    CHECKPOINTING,
    Watch,
    arguments,
    assert_same,
    bert,
    gradients_of,
    llama,
    make_trainer,
    pad,
    pad_to_10,
    pruned_zero,
    rows,
    weights_of,
)

ALL_LOSSES = {"hidden_weight": 0.5, "attention_weight": 1.0, "graft_start": 0.5, "graft_end": 1.0}


def plain_arguments(folder: Path, **given: Any) -> TrainingArguments:
    settings = arguments(folder, **given)
    del settings["block_height"]
    return TrainingArguments(**settings)


def test_changing_the_class_name_alone_works(tmp_path: Path) -> None:
    data = rows("classes", 16)

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    given: dict[str, Any] = {
        "train_dataset": data,
        "eval_dataset": data,
        "data_collator": pad,
        "compute_metrics": metrics,
    }
    for trainer_class in (Trainer, SparseDistillTrainer):
        trainer = trainer_class(model=bert(), args=plain_arguments(tmp_path, max_steps=6), **given)
        trainer.train()
        trainer.save_model()
        assert 0.0 <= trainer.evaluate()["eval_accuracy"] <= 1.0
    assert isinstance(trainer.args, SparseDistillConfig)
    assert trainer.pruner.masks.sparsity == pytest.approx(0.8, abs=0.03)
    assert (tmp_path / "model.safetensors").is_file()


def test_arguments_may_be_positional_as_in_trainer(tmp_path: Path) -> None:
    data = rows("classes", 8)
    trainer = SparseDistillTrainer(bert(), SparseDistillConfig(**arguments(tmp_path, max_steps=1)), pad, data, data)
    trainer.train()
    assert "eval_loss" in trainer.evaluate()


def test_without_arguments_there_are_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    trainer = SparseDistillTrainer(bert())
    assert isinstance(trainer.args, SparseDistillConfig)
    assert trainer.args.sparsity == 0.8


def test_the_default_teacher_is_a_frozen_copy_taken_when_training_starts(tmp_path: Path) -> None:
    model = bert()
    trainer = make_trainer(model, tmp_path, rows("classes", 8), sparsity=0.5, max_steps=2)
    assert trainer.teacher_model is None
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    at_start = weights_of(model)
    trainer.train()
    teacher = trainer.teacher_model
    assert_same(at_start, weights_of(teacher))
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in model.parameters()}
    assert not any(hasattr(module, "block_mask") for module in teacher.modules())
    assert list(model.state_dict()) == list(bert().state_dict()), "the teacher is no part of the student"
    assert len({id(p) for group in trainer.optimizer.param_groups for p in group["params"]}) == len(at_start)


@pytest.mark.parametrize(
    "given", [{"max_steps": 3}, {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}]
)
def test_model_init(tmp_path: Path, given: dict[str, int]) -> None:
    made: list[Any] = []

    def init() -> Any:
        made.append(bert())
        return made[-1]

    trainer = SparseDistillTrainer(
        args=SparseDistillConfig(**arguments(tmp_path, sparsity=0.5, **ALL_LOSSES, **given)), model_init=init,
        data_collator=pad, train_dataset=rows("classes", 16),
    )  # fmt: skip
    trainer.train()
    assert trainer.model is made[-1]
    assert (
        trainer.pruner.masks.targets["bert.encoder.layer.0.output.dense"]
        is made[-1].bert.encoder.layer[0].output.dense
    )
    assert_same(weights_of(bert()), weights_of(trainer.teacher_model))
    assert pruned_zero(trainer)
    first = weights_of(trainer.model)
    trainer.train()
    assert_same(first, weights_of(trainer.model))


def test_model_init_with_a_given_teacher(tmp_path: Path) -> None:
    teacher = bert(5)
    trainer = SparseDistillTrainer(
        args=SparseDistillConfig(**arguments(tmp_path, sparsity=0.5, max_steps=1)), model_init=lambda: bert(),
        data_collator=pad, train_dataset=rows("classes", 8), teacher_model=teacher,
    )  # fmt: skip
    trainer.train()
    assert trainer.teacher_model is teacher


def mean_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    """The mean over what it is given."""
    return F.cross_entropy(outputs.logits.flatten(0, -2), labels.flatten(), label_smoothing=0.2)


def sum_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    """As the docs of transformers ask for: a sum over the count of the whole step."""
    logits = outputs.logits.flatten(0, -2)
    return F.cross_entropy(logits, labels.flatten(), label_smoothing=0.2, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("function", [mean_loss, sum_loss])
@pytest.mark.parametrize("task", ["classes", "tagging"])
def test_compute_loss_func(tmp_path: Path, function: Any, task: str) -> None:
    def run(per_device: int, accumulate: int) -> tuple[Any, dict[str, torch.Tensor]]:
        trainer = make_trainer(
            model_for(task, 0), tmp_path, rows(task, 8), sparsity=0.0, kd_weight=0.0, max_steps=1, optim="sgd",
            max_grad_norm=0.0, per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulate,
            extra={"compute_loss_func": function, "eval_dataset": rows(task, 8)}, per_device_eval_batch_size=8,
        )  # fmt: skip
        gradient = gradients_of(trainer)[0]
        return trainer, gradient

    inputs, plain = pad(rows(task, 8)), model_for(task, 0)
    mean_loss(plain(**inputs), inputs["labels"]).backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    for split in ((8, 1), (2, 4)):
        trainer, gradient = run(*split)
        assert list(gradient) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(gradient[name], value, rtol=2e-4, atol=2e-6)
    with torch.no_grad():
        loss = mean_loss(trainer.model.eval()(**inputs), inputs["labels"]).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("task", ["classes", "tagging", "lm"])
def test_label_smoothing(tmp_path: Path, task: str) -> None:
    inputs, plain = pad(rows(task, 8)), model_for(task, 0)
    logits, labels = plain(**{k: v for k, v in inputs.items() if k != "labels"}).logits, inputs["labels"]
    if task == "lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    kept = labels != -100
    log_probs = logits.log_softmax(-1)[kept]
    own = -log_probs.gather(-1, labels[kept][:, None]).squeeze(-1)
    expected = (0.9 * own - 0.1 * log_probs.mean(-1)).mean()
    for split in ((8, 1), (2, 4)):
        trainer = make_trainer(
            model_for(task, 0), tmp_path, rows(task, 8), model_for(task, 5), sparsity=0.0, label_smoothing_factor=0.1,
            max_steps=1, per_device_train_batch_size=split[0], gradient_accumulation_steps=split[1],
            logging_strategy="steps", logging_steps=1,
        )  # fmt: skip
        trainer.train()
        logged = trainer.state.log_history[0]
        assert logged["loss_task"] == pytest.approx(expected.item(), rel=1e-4)
        assert logged["loss_kd"] > 0, "the labels are still there for the distillation"


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        yield from rows("classes", 24)


def test_an_iterable_dataset(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, Stream(), sparsity=0.5, max_steps=7, **ALL_LOSSES,
                           per_device_train_batch_size=4, gradient_accumulation_steps=2)  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 7
    assert pruned_zero(trainer)


@pytest.mark.parametrize("make", [bert, llama])
def test_activation_checkpointing_with_grafting_gives_the_same_gradients(tmp_path: Path, make: Any) -> None:
    task = "lm" if make is llama else "classes"

    def run(checkpointing: bool) -> list[dict[str, torch.Tensor]]:
        trainer = make_trainer(make(0), tmp_path, rows(task, 16), make(5), sparsity=0.5, max_steps=3, **ALL_LOSSES,
                               **{CHECKPOINTING: checkpointing}, optim="sgd", max_grad_norm=0.0)  # fmt: skip
        gradients = gradients_of(trainer)
        assert bool(getattr(trainer.model, f"is_{CHECKPOINTING}")) == checkpointing
        return gradients

    for first, second in zip(run(False), run(True), strict=True):
        assert list(first) == list(second)
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [bert, llama])
def test_bf16_autocast(tmp_path: Path, make: Any) -> None:
    task = "lm" if make is llama else "classes"
    trainer = make_trainer(make(0), tmp_path / "run", rows(task, 16), make(5), sparsity=0.5, max_steps=4, bf16=True,
                           penalty_weight=1e-3, **ALL_LOSSES, logging_strategy="steps", logging_steps=1)  # fmt: skip
    seen: list[torch.dtype] = []
    trainer.teacher_model.register_forward_hook(lambda m, i, out: seen.append(out.logits.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}, "the teacher runs under autocast as the student does"
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert pruned_zero(trainer)
    assert all(torch.tensor(e["loss"]).isfinite() for e in trainer.state.log_history if "loss" in e)
    trainer.save_model(tmp_path / "final")
    loaded = type(trainer.model).from_pretrained(tmp_path / "final").eval()
    fresh = make(0).eval()
    fresh.load_state_dict(trainer.model.state_dict())
    inputs = pad(rows(task, 8))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, fresh(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_a_model_that_a_bf16_trainer_has_wrapped_before_gets_a_teacher_of_its_own(tmp_path: Path) -> None:
    data, model = rows("classes", 16), bert()
    Trainer(model, plain_arguments(tmp_path, max_steps=2, bf16=True), pad, data).train()
    trainer = make_trainer(model, tmp_path, data, sparsity=0.5, max_steps=2, bf16=True)
    dense = weights_of(model)
    trainer.train()
    fresh = bert().eval()
    fresh.load_state_dict(dense)
    inputs = pad(data[:4])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, found = fresh(**inputs).logits, trainer.teacher_model(**inputs).logits
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        assert not torch.equal(found, trainer.model.eval()(**inputs).logits)


def test_torch_compile_with_grafting(tmp_path: Path) -> None:
    def run(**given: Any) -> Any:
        student, teacher = (bert(seed, num_hidden_layers=1) for seed in (0, 5))
        trainer = make_trainer(student, tmp_path, rows("classes", 16), teacher, sparsity=0.5, max_steps=2, optim="sgd",
                               hidden_weight=0.5, graft_start=0.5, graft_end=1.0, extra={"data_collator": pad_to_10},
                               **given)  # fmt: skip
        trainer.train()
        return trainer

    plain, compiled = run(), run(torch_compile=True, torch_compile_backend="aot_eager")
    assert compiled.student is compiled.model
    for name, weight in weights_of(plain.model).items():
        torch.testing.assert_close(compiled.model.get_parameter(name).detach(), weight, rtol=1e-4, atol=1e-6)
    compiled.save_model(tmp_path / "final")
    assert type(plain.model).from_pretrained(tmp_path / "final").config.quantization_config
    torch._dynamo.reset()


def test_a_compiler_sees_one_graph_beside_hidden_states(tmp_path: Path) -> None:
    def run(**given: Any) -> Any:
        trainer = make_trainer(bert(0, num_hidden_layers=1), tmp_path, rows("classes", 16), sparsity=0.5, max_steps=2,
                               optim="sgd", extra={"data_collator": pad_to_10}, **given)  # fmt: skip
        trainer.train()
        assert trainer.distiller.hidden_weight == 1.0
        return trainer

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = run(), run(torch_compile=True, torch_compile_backend="aot_eager")
    # Hooks that record what layers return are installed before it looks.
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    for name, weight in weights_of(plain.model).items():
        torch.testing.assert_close(compiled.model.get_parameter(name).detach(), weight, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_a_user_may_call_compute_loss_before_training(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), bert(5), sparsity=0.5, **ALL_LOSSES)
    loss, outputs = trainer.compute_loss(trainer.model.train(), pad(rows("classes", 8)), return_outputs=True)
    loss.backward()
    assert outputs.logits.shape == (8, 3)
    assert trainer.model.classifier.weight.grad.abs().sum() > 0


def test_an_optimizer_of_the_user(tmp_path: Path) -> None:
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = make_trainer(model, tmp_path, rows("classes", 8), sparsity=0.5, max_steps=4, penalty_weight=1e-3,
                           penalty_form="proximal", extra={"optimizers": (optimizer, schedule)})  # fmt: skip
    trainer.train()
    assert pruned_zero(trainer)


def test_frozen_layers_stay_as_they_are_until_they_are_pruned(tmp_path: Path) -> None:
    model = bert()
    for parameter in model.bert.embeddings.parameters():
        parameter.requires_grad_(False)
    before = weights_of(model.bert.embeddings)
    make_trainer(model, tmp_path, rows("classes", 8), sparsity=0.5, max_steps=3, **ALL_LOSSES).train()
    assert_same(before, weights_of(model.bert.embeddings))


def test_evaluation_during_training_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    def run(**given: Any) -> dict[str, torch.Tensor]:
        model = bert()
        trainer = make_trainer(model, tmp_path, rows("classes", 16), sparsity=0.5, max_steps=4, **ALL_LOSSES,
                               extra={"eval_dataset": rows("classes", 4)}, **given)  # fmt: skip
        trainer.train()
        return weights_of(model)

    assert_same(run(), run(eval_strategy="steps", eval_steps=1))


def test_a_batch_of_another_mapping_type(tmp_path: Path) -> None:
    from transformers import BatchEncoding

    trainer = make_trainer(bert(), tmp_path, rows("classes", 16), sparsity=0.5, max_steps=2, **ALL_LOSSES,
                           per_device_train_batch_size=4, gradient_accumulation_steps=2,
                           extra={"data_collator": lambda batch: BatchEncoding(pad(batch))})  # fmt: skip
    trainer.train()
    assert pruned_zero(trainer)


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    def run(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(torch.seed())
        trainer = make_trainer(bert(hidden_dropout_prob=0.1), tmp_path, rows("classes", 16), sparsity=0.5, max_steps=3,
                               seed=seed, **ALL_LOSSES)  # fmt: skip
        trainer.train()
        return weights_of(trainer.model)

    assert_same(run(3), run(3))
    assert not torch.equal(run(3)["classifier.weight"], run(4)["classifier.weight"])


def test_tags_of_the_model(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8))
    assert {"hf_sparse", "block-sparse", "pruned"} <= set(trainer.model.model_tags)


def test_a_plain_module_is_pruned_and_saved_dense(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
            self.head = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            for layer in self.layers:
                x = layer(x)
            logits = self.head(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    data = [{"x": torch.randn(8), "labels": i % 2} for i in range(16)]
    trainer = make_trainer(Net(), tmp_path, data, sparsity=0.5, kd_weight=0.0, save_format="dense", max_steps=3,
                           extra={"data_collator": None}, save_strategy="steps", save_steps=3)  # fmt: skip
    trainer.train()
    assert pruned_zero(trainer)
    trainer.save_model(tmp_path / "final")
    assert (tmp_path / "final" / "model.safetensors").is_file()
    assert (tmp_path / "checkpoint-3" / "sparsity_state.safetensors").is_file()


def test_a_second_run_with_more_steps_keeps_the_masks(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), sparsity=0.5, max_steps=3)
    trainer.train()
    masks: dict[str, torch.Tensor] = trainer.pruner.masks.state_dict()
    trainer.args.max_steps = 5
    kept: list[bool] = []
    trainer.add_callback(Watch(on_step_end=lambda state: kept.append(pruned_zero(trainer))))
    trainer.train()
    assert kept == [True] * 5
    assert_same(masks, trainer.pruner.masks.state_dict())


def test_weights_in_bf16_stay_in_bf16(tmp_path: Path) -> None:
    model = bert().to(torch.bfloat16)
    trainer = make_trainer(model, tmp_path / "run", rows("classes", 8), sparsity=0.5, max_steps=3, penalty_weight=1e-3,
                           **ALL_LOSSES)  # fmt: skip
    trainer.train()
    assert pruned_zero(trainer)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    trainer.save_model(tmp_path / "final")
    loaded = type(model).from_pretrained(tmp_path / "final", dtype="auto")
    assert loaded.bert.encoder.layer[0].output.dense.weight.dtype == torch.bfloat16

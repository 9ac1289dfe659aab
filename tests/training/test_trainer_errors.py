"""What a trainer refuses at construction: before a step is trained, by name, with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig
from torch import nn
from transformers import TrainingArguments

from hf_sparse import SparseDistillTrainer, compress
from hf_sparse.training.support import refuse_unsupported_engine
from tests.training.tiny import assert_same, bert, llama, make_trainer, pad, rows, sparse_config, t5, weights_of


def build(folder: Path, model: Any = None, teacher: Any = None, **given: Any) -> Any:
    return make_trainer(bert() if model is None else model, folder, rows("classes", 8), teacher, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_modules": ".*nothing.*"}, r"target_modules='\.\*nothing\.\*' matches none of the 14 linear layers"),
        ({"target_modules": "query"}, r"the whole name has to match.*bert\.encoder\.layer\.0\.attention\.self\.query"),
        ({"exclude_modules": ".*nothing.*"}, r"exclude_modules='\.\*nothing\.\*' matches none of the 12 target"),
        ({"exclude_modules": ".*"}, r"exclude_modules='\.\*' leaves no layer to prune"),
        ({"block_height": 5}, r"bert\.encoder\.layer\.0\.attention\.self\.query: block_height=5 does not divide"),
        ({"block_width": 32}, r"query: block_width=32 does not divide the 16 input columns.*block_overrides.*exclude"),
        ({"block_overrides": '{".*nothing": [4, 1]}'}, r"block_overrides pattern '\.\*nothing' matches none of the"),
        (
            {"block_overrides": '{".*query": [4, 1], ".*layer\\\\.0.*": [2, 1]}'},
            r"block_overrides give bert\.encoder\.layer\.0\.attention\.self\.query more than one shape",
        ),
        ({"block_overrides": '{".*output.*": [3, 1]}'}, r"output\.dense: block_height=3 does not divide"),
        ({"block_height": 16, "block_width": 16}, r"sparsity=0\.8 would remove all of .*: it has 1 block"),
        (
            {"sparsity": 0.9999, "sparsity_scope": "global"},
            r"sparsity=0\.9999 would remove all 1024 blocks of the 12 target layers",
        ),
    ],
)  # fmt: skip
def test_layers_and_blocks(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **given)


def test_a_tied_layer_cannot_be_a_target(tmp_path: Path) -> None:
    model = bert(kind="MaskedLM")
    with pytest.raises(ValueError, match=r"cls\.predictions\.decoder, whose weight is shared with another module"):
        build(tmp_path, model, target_modules=r".*(decoder|query)")


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=rf"output_dir='{folder}' cannot be written: (File exists|Not a directory)"):
            build(folder)


def test_the_check_of_the_output_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    build(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("teacher", "given", "message"),
    [
        (lambda: bert(5, num_labels=4), {}, r"kd_weight=0\.5 needs the same labels: num_labels is 3 .* 4 "),
        (lambda: bert(5, vocab_size=50), {}, r"teacher_model needs the same tokenizer.*vocab_size is 40 .* and 50"),
        (
            lambda: bert(5, num_hidden_layers=3), {"hidden_weight": 1.0},
            r"hidden_weight=1\.0 compares layer by layer, but the model has 2 layers and the teacher 3: say with",
        ),
        (
            lambda: bert(5, num_hidden_layers=3), {"hidden_weight": 1.0, "layer_map": "[0, 1, 2]"},
            r"layer_map has 3 entries, the model 2 layers: give one per layer",
        ),
        (
            lambda: bert(5, num_hidden_layers=3), {"hidden_weight": 1.0, "layer_map": "[0, 3]"},
            r"layer_map names teacher layer 3, the teacher has layers 0 to 2",
        ),
        (lambda: t5(5), {"hidden_weight": 1.0, "kd_weight": 0.0}, r"has 1 stack\(s\) of layers and the teacher 2"),
        (
            lambda: bert(5, num_hidden_layers=3), {"attention_weight": 1.0},
            r"attention_weight=1\.0 compares layer by layer",
        ),
        (
            lambda: bert(5, num_attention_heads=4), {"attention_weight": 2.0},
            r"attention_weight=2\.0 needs as many attention heads: num_attention_heads is 2 .* 4",
        ),
        (
            lambda: bert(5, num_hidden_layers=3), {"graft_start": 0.5},
            r"grafting needs as many layers: bert\.encoder\.layer has 2 in the student and 3 in the teacher",
        ),
        (
            lambda: bert(5, hidden_size=32), {"graft_start": 0.5},
            r"bert\.encoder\.layer\.0 is a BertLayer with norms of \[16\] .* BertLayer with norms of \[32\]",
        ),
        (
            lambda: bert(5, label2id={"a": 0, "b": 1, "c": 2}, id2label={0: "a", 1: "b", 2: "c"}), {},
            r"teacher_model orders the labels as \{'a': 0",
        ),
        (lambda: 7, {}, r"teacher_model=7 must be a model, a path or a repo id, or None"),
    ],
)  # fmt: skip
def test_a_teacher_that_does_not_fit(tmp_path: Path, teacher: Any, given: dict[str, Any], message: str) -> None:
    student = (
        bert(label2id={"b": 0, "a": 1, "c": 2}, id2label={0: "b", 1: "a", 2: "c"}) if "orders" in message else None
    )
    with pytest.raises((ValueError, TypeError), match=message):
        build(tmp_path, student, teacher(), **given)


def test_a_smaller_teacher_is_fine_for_logits_alone(tmp_path: Path) -> None:
    trainer = build(tmp_path, teacher=bert(5, hidden_size=32, num_hidden_layers=1), sparsity=0.5, max_steps=1)
    trainer.train()


def test_grafting_wants_the_same_architecture(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"same stacks of layers: the student has \['bert\.encoder\.layer'\], the teacher"
    ):
        build(tmp_path, teacher=llama(5), kd_weight=0.0, graft_start=0.5)


def test_the_student_cannot_be_its_own_teacher(tmp_path: Path) -> None:
    model = bert()
    with pytest.raises(ValueError, match="teacher_model shares parameters with the model being trained"):
        build(tmp_path, model, model)
    other = bert()
    other.bert.encoder = model.bert.encoder
    with pytest.raises(ValueError, match="teacher_model shares parameters"):
        build(tmp_path, model, other)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_teacher_from_a_path_gets_the_students_head(tmp_path: Path) -> None:
    teacher = bert(5)
    teacher.save_pretrained(tmp_path / "teacher")
    for path in (str(tmp_path / "teacher"), tmp_path / "teacher"):
        trainer = build(tmp_path / "out", teacher=path)
        assert type(trainer.teacher_model) is type(teacher)
        assert_same(weights_of(teacher), weights_of(trainer.teacher_model))
        assert not trainer.teacher_model.training
        assert not any(parameter.requires_grad for parameter in trainer.teacher_model.parameters())


def test_a_teacher_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no-such-teacher"):
        build(tmp_path, teacher=str(tmp_path / "no-such-teacher"))


def test_a_teacher_that_no_setting_uses_is_not_held_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build(tmp_path, teacher=bert(5), kd_weight=0.0)
    assert trainer.teacher_model is None
    assert "teacher_model is not used: kd_weight, hidden_weight and attention_weight do not ask for one" in caplog.text


@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        (
            {"deepspeed": {"zero_optimization": {"stage": 2}}},
            {},
            r"deepspeed=.*is not supported: ZeRO.*FSDP2",
        ),
        (
            {"fsdp": True, "fsdp_config": {"version": 1}},
            {},
            r"FSDP version 1 is not supported: it flattens weights.*fsdp_version: 2",
        ),
        ({"fsdp": True, "fsdp_config": {"xla": True}}, {}, r"FSDP version 2 on XLA is not supported"),
        ({"_n_gpu": 2}, {}, r"2 GPUs in one process.*nn\.DataParallel.*CUDA_VISIBLE_DEVICES=0"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, r"FSDP version 1 is not supported"),
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, r"FSDP version 1 is not supported"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, r"deepspeed.* is not supported"),
        (
            {"parallelism_config": ParallelismConfig(tp_size=2)},
            {},
            r"parallelism_config with tp_size=2 is not supported: .*dp_shard_size",
        ),
        (
            {},
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "4"},
            r"parallelism_config with cp_size=4 is not supported",
        ),
    ],
)
def test_engines_that_shard_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, environment: dict, message: str
) -> None:
    args = sparse_config(tmp_path)
    for name, value in changes.items():
        setattr(args, name, value)
    # `accelerate launch` turns an engine on through the environment alone.
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        refuse_unsupported_engine(args)
    with pytest.raises(ValueError, match=message):
        SparseDistillTrainer(bert(), args, pad, rows("classes", 8))


def test_models_that_cannot_be_pruned_as_they_are(tmp_path: Path) -> None:
    model = bert()
    model.peft_config = {}
    with pytest.raises(ValueError, match=r"holds PEFT adapters.*merge_and_unload"):
        build(tmp_path, model)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))

        def forward(self, x: Any) -> Any:
            return x

    with pytest.raises(
        ValueError, match=r"save_format='compressed' needs a PreTrainedModel .* Plain: use save_format"
    ):
        build(tmp_path, Plain())
    with pytest.raises(ValueError, match=r"Linear has no nn\.ModuleList of repeated layers.*target_modules"):
        build(tmp_path, nn.Linear(4, 4), save_format="dense")
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Linear or Conv1D layer"):
        build(tmp_path, nn.Sequential(nn.LayerNorm(4)), save_format="dense")
    with pytest.raises(ValueError, match=r"Plain has no stack of repeated layers to graft|returns|stack"):
        build(tmp_path, nn.Sequential(nn.Linear(4, 4)), save_format="dense", sparsity=0.0, graft_start=0.5)


def test_a_compressed_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = bert()
    masks = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and "encoder" in name:
            masks[name] = torch.zeros(module.weight.shape[0] // 4, module.weight.shape[1], dtype=torch.bool)
            masks[name][0] = True
            nn.init.zeros_(module.weight)
    compress(model, masks)
    with pytest.raises(ValueError, match="decompress"):
        build(tmp_path, model)


def test_arguments_of_another_class(tmp_path: Path) -> None:
    from dataclasses import dataclass

    @dataclass
    class Mine(TrainingArguments):
        my_field: int = 3

    with pytest.raises(TypeError, match="Mine has fields that SparseDistillConfig does not know: my_field"):
        SparseDistillTrainer(bert(), Mine(output_dir=str(tmp_path), use_cpu=True))


@pytest.mark.parametrize(("weight", "kind"), [("hidden_weight", "hidden_states"), ("attention_weight", "attentions")])
def test_a_model_that_does_not_return_what_a_loss_needs(tmp_path: Path, weight: str, kind: str) -> None:
    model = bert()
    original = model.forward

    def forward(input_ids: Any, attention_mask: Any, labels: Any, **recorded: Any) -> Any:
        return original(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    model.forward = forward
    trainer = build(tmp_path, model, bert(5), **{weight: 1.0}, extra={"data_collator": pad})
    with pytest.raises(ValueError, match=f"{weight} needs {kind}.*set {weight}=0"):
        trainer.train()


def test_a_batch_without_tensors(tmp_path: Path) -> None:
    from hf_sparse.training.share import count_units

    with pytest.raises(ValueError, match=r"the batch holds no tensor, only \['text'\]"):
        count_units({"text": ["a"]}, shifted=False)


def test_fsdp2_of_an_old_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = sparse_config(tmp_path)
    args.fsdp = True
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.7.0"))
    refuse_unsupported_engine(args)
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.6.0+cu124"))
    with pytest.raises(ValueError, match=r"FSDP2 with torch 2\.6\.0\+cu124 is not supported: .*torch 2\.7"):
        refuse_unsupported_engine(args)

"""`SparseDistillConfig`: every field, every refusal, presets, the command line, JSON and YAML."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_sparse import SparseDistillConfig
from hf_sparse.training.presets import PRESETS
from tests.training.tiny import CHECKPOINTING

QUIET = {"output_dir": "out", "use_cpu": True, "report_to": "none"}

DEFAULTS = {
    "block_height": 8, "block_width": 1, "block_overrides": None, "feed_forward": "blocks", "target_modules": None,
    "exclude_modules": None, "sparsity": 0.8, "sparsity_scope": "auto", "layer_share": 0.1,
    "sparsity_schedule": "cubic",
    "sparsity_start": 0.0, "sparsity_end": 0.6, "mask_updates": 100, "importance": "fisher", "penalty_form": "loss",
    "penalty_reweights": 4, "penalty_epsilon": 1e-3, "task_weight": 0.5, "kd_weight": 0.5, "kd_temperature": 2.0,
    "embedding_pooling": "mean", "layer_map": None,
    "hidden_weight": None, "hidden_form": "relative", "attention_weight": 0.0,
    "graft_start": 1.0, "graft_hold": 0.0, "graft_end": 0.8,
    "lr_restart": 0.0, "reset_optimizer": False, "train_only_layers": False, "preset": None,
    "save_format": "compressed",
}  # fmt: skip

# A value that differs from the default, for every field, as one would type it.
OTHERS = {
    "block_height": 16, "block_width": -1, "block_overrides": '{".*query": [4, 4]}', "feed_forward": "units",
    "target_modules": ".*dense", "exclude_modules": ".*output.*", "sparsity": 0.5, "sparsity_scope": "global",
    "layer_share": 0.75, "sparsity_schedule": "linear", "sparsity_start": 0.1, "sparsity_end": 0.7, "mask_updates": 7,
    "importance": "magnitude", "penalty_weight": 0.25,
    "penalty_form": "proximal", "penalty_reweights": 2, "penalty_epsilon": 0.01, "task_weight": 0.75,
    "kd_weight": 0.25, "kd_temperature": 4.0, "embedding_pooling": "cls", "layer_map": "uniform",
    "hidden_weight": 1.5, "hidden_form": "mse", "attention_weight": 2.5, "graft_start": 0.5,
    "graft_hold": 0.25, "graft_end": 0.75, "lr_restart": 0.6, "reset_optimizer": True, "train_only_layers": True,
    "preset": "spd", "save_format": "dense",
}  # fmt: skip


def config(**given: Any) -> SparseDistillConfig:
    return SparseDistillConfig(**{**QUIET, **given})


def own_fields() -> list[str]:
    inherited = {spec.name for spec in dataclasses.fields(TrainingArguments)}
    return [spec.name for spec in dataclasses.fields(SparseDistillConfig) if spec.name not in inherited]


def test_defaults() -> None:
    found = config()
    assert {name: getattr(found, name) for name in DEFAULTS} == DEFAULTS
    assert set(own_fields()) == {*DEFAULTS, "penalty_weight"}
    assert set(own_fields()) == set(OTHERS), "these tests try every field"


def test_every_field_has_a_help_text_that_tells_the_default() -> None:
    for spec in dataclasses.fields(SparseDistillConfig):
        if spec.name in OTHERS:
            assert spec.metadata["help"].rstrip().endswith((".", ".%(default).0s")), spec.name
            if "default" in spec.metadata:
                assert f"Default: {spec.metadata['default']}." in spec.metadata["help"]


def test_help_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        HfArgumentParser(SparseDistillConfig).parse_args_into_dataclasses(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    for name in own_fields():
        assert f"--{name}" in words
    for text in ("Output rows per block; -1 = all of them. Default: 8.", "0 = prune nothing. Default: 0.8.",
                 'Default: cubic.', "Default: compressed."):  # fmt: skip
        assert text in words
    for spec in dataclasses.fields(SparseDistillConfig):
        if "default" in spec.metadata:
            help_text = " ".join(spec.metadata["help"].replace("%(default).0s", "").split())
            after = words[words.index(help_text) + len(help_text) :][:20]
            assert "(default" not in after, f"{spec.name}: {after}"


def test_command_line_sets_every_field() -> None:
    line = [f"--{key}={value}" for key, value in {"output_dir": "out", "report_to": "none", **OTHERS}.items()]
    (found,) = HfArgumentParser(SparseDistillConfig).parse_args_into_dataclasses([*line, "--use_cpu"])
    assert {name: getattr(found, name) for name in OTHERS} == OTHERS


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_json_and_yaml_files_set_every_field(tmp_path: Path, kind: str) -> None:
    import yaml

    file = tmp_path / f"config.{kind}"
    given = {**QUIET, **OTHERS}
    file.write_text(json.dumps(given) if kind == "json" else yaml.safe_dump(given))
    parser = HfArgumentParser(SparseDistillConfig)
    (found,) = parser.parse_json_file(str(file)) if kind == "json" else parser.parse_yaml_file(str(file))
    assert {name: getattr(found, name) for name in OTHERS} == OTHERS
    # And back: what a config writes makes an equal one.
    again = SparseDistillConfig(
        **{name: value for name, value in found.to_dict().items() if name in {**QUIET, **OTHERS}}
    )
    assert {name: getattr(again, name) for name in OTHERS} == OTHERS


def test_a_config_turns_into_json() -> None:
    assert json.loads(config().to_json_string())["sparsity"] == 0.8


def test_a_layer_map_may_be_a_list_in_a_file() -> None:
    assert config(layer_map=[1, None], hidden_weight=1.0).teacher_layers == [1, None]
    assert config(layer_map="[1, null]", hidden_weight=1.0).teacher_layers == [1, None]
    assert config().teacher_layers is None


def test_a_layer_map_may_name_sides() -> None:
    by_side = {"encoder": [1, None], "decoder": "uniform"}
    for given in (by_side, json.dumps(by_side)):
        found = config(layer_map=given, hidden_weight=1.0)
        assert found.teacher_layers == by_side
        assert json.loads(found.to_json_string())["layer_map"] == given
    line = ["--output_dir=out", "--use_cpu", "--hidden_weight=1", f"--layer_map={json.dumps(by_side)}"]
    (found,) = HfArgumentParser(SparseDistillConfig).parse_args_into_dataclasses(line)
    assert found.teacher_layers == by_side


def test_overrides_may_be_an_object_in_a_file() -> None:
    assert config(block_overrides={".*query": [4, 1]}).shape_overrides == {".*query": (4, 1)}
    assert config(block_overrides='{".*query": [4, -1]}').shape_overrides == {".*query": (4, -1)}
    assert config().shape_overrides == {}


@pytest.mark.parametrize("given", [{"sparsity_scope": "layer"}, {"importance": "magnitude"}, {"preset": "hybrid"}])
def test_a_share_of_no_budget_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"layer_share=0\.5 has no effect where each layer has a budget of its own"):
        config(layer_share=0.5, **given)


@pytest.mark.parametrize(("given", "scope"), [
    ({}, "global"),
    ({"importance": "magnitude"}, "layer"),
    ({"importance": "activation"}, "layer"),
    ({"feed_forward": "units"}, "layer"),
    ({"preset": "hybrid"}, "layer"),
    ({"preset": "spd"}, "layer"),
    ({"preset": "block_structured"}, "layer"),
    ({"importance": "magnitude", "sparsity_scope": "global"}, "global"),
    ({"sparsity_scope": "layer"}, "layer"),
])  # fmt: skip
def test_layers_share_a_budget_where_scores_compare_them(given: dict[str, Any], scope: str) -> None:
    assert config(**given).budget_scope == scope


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sparsity", 1.0, r"sparsity=1\.0 must be a number in \[0, 1\)"),
        ("sparsity", -0.1, r"sparsity=-0\.1 must be a number in \[0, 1\)"),
        ("sparsity", 80, r"sparsity=80 must be a number in \[0, 1\)"),
        ("sparsity", float("nan"), r"sparsity=nan"),
        ("sparsity", "0.8", r"sparsity='0\.8' must be a number"),
        ("sparsity", True, r"sparsity=True must be a number"),
        ("block_height", 0, r"block_height=0 is not a block size: use a positive integer, or -1"),
        ("block_height", 2.0, r"block_height=2\.0 is not a block size"),
        ("block_width", -2, r"block_width=-2 is not a block size"),
        ("block_width", True, r"block_width=True is not a block size"),
        ("lr_restart", 1.0, r"lr_restart=1\.0 must be a number in \[0, 1\)"),
        ("reset_optimizer", True, r"reset_optimizer=True has no effect with lr_restart=0"),
        ("feed_forward", "rows", r"feed_forward='rows' is not known: use one of \['blocks', 'units'\]"),
        ("embedding_pooling", "max", r"embedding_pooling='max' is not known: use one of \['mean', 'cls', 'last'\]"),
        ("layer_map", "[1, 2", r"layer_map='\[1, 2' must be \"uniform\" or a JSON list with one entry per layer"),
        ("layer_map", "[]", r"layer_map='\[\]' must be"),
        ("layer_map", "[null]", r"layer_map='\[null\]' must be"),
        ("layer_map", "[-1]", r"layer_map='\[-1\]' must be"),
        ("layer_map", "[true]", r"layer_map='\[true\]' must be"),
        ("layer_map", '{"0": 1}', r"layer_map=.* must be"),
        ("layer_map", "last", r"layer_map='last' must be"),
        ("layer_map", "{}", r"layer_map='\{\}' must be"),
        ("layer_map", '{"encoder": [1], "dekoder": [1]}', r"must be .*; sides are encoder, decoder, text, vis"),
        ("layer_map", '{"encoder": 1, "decoder": [1]}', r"layer_map=.* must be"),
        ("layer_map", '{"encoder": [null], "decoder": [null]}', r"layer_map=.* must be"),
        ("sparsity_scope", "model", r"sparsity_scope='model' is not known: use one of \['auto', 'layer', 'global'\]"),
        ("sparsity_schedule", "cosine", r"sparsity_schedule='cosine'.*'cubic', 'linear', 'one_shot'"),
        ("importance", "random", r"importance='random' is not known: use one of .*'magnitude'"),
        ("penalty_form", "l1", r"penalty_form='l1'.*'loss', 'proximal'"),
        ("save_format", "zip", r"save_format='zip'.*'compressed', 'dense'"),
        ("preset", "bert", r"preset='bert' is not known: use one of \['block_structured', 'hybrid', 'spd'\], or None"),
        ("layer_share", 1.5, r"layer_share=1\.5 must be a number in \[0, 1\]"),
        ("sparsity_start", -0.5, r"sparsity_start=-0\.5 must be a number in \[0, 1\]"),
        ("sparsity_end", 1.5, r"sparsity_end=1\.5 must be a number in \[0, 1\]"),
        ("graft_start", 2, r"graft_start=2 must be a number in \[0, 1\]"),
        ("graft_hold", -1, r"graft_hold=-1 must be"),
        ("graft_end", 1.01, r"graft_end=1\.01 must be"),
        ("penalty_weight", -1e-4, r"penalty_weight=-0\.0001 must be a number in \[0, inf\)"),
        ("penalty_weight", float("inf"), r"penalty_weight=inf"),
        ("task_weight", -1.0, r"task_weight=-1\.0"),
        ("kd_weight", "half", r"kd_weight='half'"),
        ("hidden_weight", -1.0, r"hidden_weight=-1\.0"),
        ("attention_weight", float("nan"), r"attention_weight=nan"),
        ("kd_temperature", 0.0, r"kd_temperature=0\.0 must be a number in \(0, inf\)"),
        ("penalty_epsilon", 0, r"penalty_epsilon=0 must be a number in \(0, inf\)"),
        ("mask_updates", 0, r"mask_updates=0 must be an integer of at least 1"),
        ("mask_updates", 1.5, r"mask_updates=1\.5 must be an integer of at least 1"),
        ("penalty_reweights", -1, r"penalty_reweights=-1 must be an integer of at least 0"),
        ("target_modules", "(", r"target_modules='\(' is not a regular expression: missing \)"),
        ("exclude_modules", "[", r"exclude_modules='\[' is not a regular expression"),
        ("block_overrides", "{", r"block_overrides='\{' is not JSON"),
        ("block_overrides", "[1, 2]", r"block_overrides='\[1, 2\]' must map regular expressions to \[height, width\]"),
        ("block_overrides", '{"a": 4}', r"must map regular expressions to \[height, width\]"),
        ("block_overrides", '{"a": [4]}', r"must map regular expressions"),
        ("block_overrides", '{"a": [4, 1.5]}', r"must map regular expressions"),
        ("block_overrides", '{"a": [4, true]}', r"must map regular expressions"),
        ("block_overrides", '{"a": [4, 0]}', r"block_overrides.*\[4, 0\]"),
        ("block_overrides", '{"a": [4, -3]}', r"block_overrides.*\[4, -3\]"),
        ("block_overrides", '{"(": [4, 1]}', r"block_overrides='\(' is not a regular expression"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**{field: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity_start": 0.7}, r"sparsity_start=0\.7 lies after sparsity_end=0\.6"),
        ({"graft_hold": 0.9}, r"graft_hold=0\.9 lies after graft_end=0\.8"),
        (
            {"layer_map": "uniform", "hidden_weight": 0},
            r"layer_map='uniform' has no effect with hidden_weight=0 and attention_weight=0",
        ),
        ({"sparsity_end": 0.0, "penalty_weight": 0.1}, r"sparsity_end=0\.0 leaves no step for penalty_weight"),
        (
            {"task_weight": 0.0, "kd_weight": 0.0},
            r"task_weight, kd_weight, hidden_weight and attention_weight are all 0",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"sparsity": 0.0}, {"sparsity": 0.999}, {"sparsity": 0}, {"sparsity_start": 0.6}, {"sparsity_end": 1},
        {"block_height": -1, "block_width": -1}, {"graft_start": 0}, {"penalty_reweights": 0}, {"mask_updates": 1},
        {"sparsity_start": 0.0, "sparsity_end": 0.0, "penalty_weight": 0.0}, {"task_weight": 0.0}, {"kd_weight": 0},
    ],
)  # fmt: skip
def test_edges_of_what_is_allowed(given: dict[str, Any]) -> None:
    found = config(**given)
    assert {name: getattr(found, name) for name in given} == given


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_fill_the_fields_that_are_not_given(preset: str) -> None:
    found = config(preset=preset)
    expected = {**DEFAULTS, **PRESETS[preset], "preset": preset}
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("field", sorted(name for name in DEFAULTS if DEFAULTS[name] is not None))
def test_a_given_value_overrides_a_preset_even_when_it_is_the_default(preset: str, field: str) -> None:
    value = DEFAULTS[field]
    assert getattr(config(preset=preset, **{field: value, **_companions(preset, field)}), field) == value


def _companions(preset: str, field: str) -> dict[str, Any]:
    # Fields whose default would come to lie after another one of the preset, or leave it without effect.
    if (preset, field) == ("block_structured", "lr_restart"):
        return {"reset_optimizer": False}
    return {"graft_hold": 0.0} if (preset, field) == ("spd", "graft_end") else {}


def test_a_preset_on_the_command_line_is_overridden_by_the_default_typed_out() -> None:
    line = ["--output_dir=out", "--preset=spd", "--sparsity=0.8", "--use_cpu", "--report_to=none"]
    (found,) = HfArgumentParser(SparseDistillConfig).parse_args_into_dataclasses(line)
    assert (found.sparsity, found.block_height) == (0.8, 1)


def test_without_a_teacher_the_task_loss_has_its_full_weight_unless_given() -> None:
    assert config(kd_weight=0.0).task_weight == 1.0
    assert config(kd_weight=0.0, task_weight=0.5).task_weight == 0.5
    assert config().task_weight == 0.5
    assert config(kd_weight=0.0, graft_start=0.5).task_weight == 0.5


@pytest.mark.parametrize(
    ("given", "weight", "decided"),
    [
        ({}, 1.0, False),
        ({"kd_weight": 0.0}, 0.0, False),
        ({"hidden_weight": 1.0}, 1.0, True),
        ({"hidden_weight": 0.0}, 0.0, True),
        ({"kd_weight": 0.0, "hidden_weight": 1.0}, 1.0, True),
        ({"layer_map": "uniform"}, 1.0, True),
        ({"layer_map": "uniform", "kd_weight": 0.0}, 1.0, True),
        ({"layer_map": "uniform", "attention_weight": 1.0}, 1.0, False),
        ({"layer_map": "uniform", "attention_weight": 1.0, "kd_weight": 0.0}, 0.0, False),
        ({"preset": "spd"}, 1.0, True),
        ({"preset": "block_structured", "kd_weight": 0.5}, 0.0, True),
    ],
)
def test_hidden_states_go_with_the_logits_unless_given(given: dict[str, Any], weight: float, decided: bool) -> None:
    found = config(**given)
    again = dataclasses.replace(found)
    for either in (found, again, pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert (either.wanted_hidden_weight, either.hidden_is_decided) == (weight, decided)
    # Whatever changes it later, a search or a script, it follows.
    found.hidden_weight, found.layer_map, found.kd_weight = None, None, 0.0
    assert (found.wanted_hidden_weight, found.hidden_is_decided) == (0.0, False)


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ({}, True),
        ({"kd_weight": 0.0}, False),
        ({"kd_weight": 0.0, "hidden_weight": 1.0}, True),
        ({"kd_weight": 0.0, "attention_weight": 1.0}, True),
        ({"kd_weight": 0.0, "graft_start": 0.9}, True),
    ],
)
def test_a_teacher_is_needed_for_any_of_four_settings(given: dict[str, Any], needed: bool) -> None:
    assert config(**given).needs_teacher is needed


def test_grafting_tells_ddp_to_look_for_unused_parameters() -> None:
    assert config(graft_start=0.5).ddp_find_unused_parameters is True
    assert config(graft_start=0.5, ddp_find_unused_parameters=False).ddp_find_unused_parameters is False
    assert config().ddp_find_unused_parameters is None


def test_replacing_a_field_keeps_the_others() -> None:
    found = dataclasses.replace(config(preset="spd", hidden_weight=0.5), sparsity=0.6)
    assert (found.sparsity, found.hidden_weight, found.graft_start, found.task_weight) == (0.6, 0.5, 0.3, 0.0)


PLAIN = {
    "output_dir": "out", "use_cpu": True, "report_to": "none", "learning_rate": 3e-4, "weight_decay": 0.1,
    "adam_beta1": 0.8, "max_grad_norm": 0.3, "num_train_epochs": 7.0, "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 0.4}, "warmup_steps": 5, "logging_steps": 3, "eval_strategy": "steps",
    "eval_steps": 4, "save_strategy": "steps", "save_steps": 8, "save_total_limit": 2, "seed": 5, "data_seed": 6,
    "bf16": True, "optim": "adafactor", "optim_args": "scale_parameter=False", "hub_token": "hf_secret",
    "hub_model_id": "me/model", "hub_strategy": "every_save", "metric_for_best_model": "accuracy",
    "load_best_model_at_end": True, "label_smoothing_factor": 0.1, "gradient_accumulation_steps": 4,
    "per_device_train_batch_size": 3, "per_device_eval_batch_size": 9, "dataloader_num_workers": 0,
    "remove_unused_columns": False, "label_names": ["labels"], "run_name": "mine", "disable_tqdm": True,
    "ddp_find_unused_parameters": False, "accelerator_config": {"split_batches": True}, "greater_is_better": True,
    CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False},
}  # fmt: skip


def test_plain_arguments_are_taken_over_field_by_field() -> None:
    plain = TrainingArguments(**PLAIN)
    found = SparseDistillConfig.from_training_arguments(plain)
    assert isinstance(found, SparseDistillConfig)
    for spec in dataclasses.fields(TrainingArguments):
        if spec.name not in ("_n_gpu",):
            mine, theirs = getattr(found, spec.name), getattr(plain, spec.name)
            assert str(mine) == str(theirs), spec.name
    assert found.hub_token == "hf_secret"
    assert {name: getattr(found, name) for name in DEFAULTS} == DEFAULTS


def test_arguments_with_fields_of_their_own_are_refused_by_name() -> None:
    given = Seq2SeqTrainingArguments(output_dir="out", use_cpu=True, report_to="none")
    with pytest.raises(TypeError, match=r"Seq2SeqTrainingArguments has fields .* predict_with_generate"):
        SparseDistillConfig.from_training_arguments(given)

    @dataclass
    class Mine(TrainingArguments):
        my_field: int = 3

    with pytest.raises(TypeError, match="Mine has fields that SparseDistillConfig does not know: my_field"):
        SparseDistillConfig.from_training_arguments(Mine(output_dir="out", use_cpu=True))


def test_a_subclass_without_fields_of_its_own_is_taken_over() -> None:
    class Mine(TrainingArguments):
        pass

    assert SparseDistillConfig.from_training_arguments(Mine(output_dir="out", use_cpu=True, seed=9)).seed == 9


def test_a_subclass_of_the_config_may_add_fields() -> None:
    @dataclass
    class Mine(SparseDistillConfig):
        my_field: int = 3

    assert Mine(**QUIET, sparsity=0.5).my_field == 3

"""Facts: JSON there and back, and every wrong one refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_sparse import FormatError, SparseDistillConfig
from hf_sparse.core.report import LayerReport
from hf_sparse.hub.facts import CardFacts, CostFacts, DataFacts, LatencyFacts, MetricFacts, read_facts, recipe_facts

LAYER = LayerReport(name="encoder.0.q", shape=(16, 8), block_shape=(8, 1), kept_blocks=3, total_blocks=16,
                    bytes=98, dense_bytes=512)  # fmt: skip

FULL = CardFacts(
    name="tiny-80",
    save_format="compressed",
    repo_id="tester/tiny-80",
    base_model="tester/tiny",
    license="apache-2.0",
    language="en",
    task="text-classification",
    auto_class="AutoModelForSequenceClassification",
    teacher="the dense model, fine-tuned by the same script",
    data=DataFacts(name="Toy Set", hub_id="tester/toy", config="plain", train_split="train", eval_split="validation",
                   train_rows=4000, eval_rows=500, note="Made up | for tests."),
    recipe={"sparsity": 0.75, "block_overrides": '{".*query": [16, 16]}', "learning_rate": 1e-4},
    block_shape=(8, -1),
    sparsity_asked=0.75,
    sparsity_reached=0.7512,
    layers=(LAYER,),
    metrics=(MetricFacts(type="accuracy", value=0.9125, dense_value=0.92),
             MetricFacts(type="f1", value=0.5, name="F1 (macro)")),
    eval_command="python eval.py | tee log",
    file_bytes=1_000_000,
    dense_file_bytes=2_500_000,
    latency=(LatencyFacts(batch=1, length=128, ms=3.217, dense_ms=12.0, engine="cpu", dense_engine="torch eager",
                          dtype="float32", threads=2, hardware="a box", command="hf-sparse bench x"),
             LatencyFacts(batch=8, length=16, ms=30.0, engine="cpu", hardware="a box", command="hf-sparse bench x"),
             LatencyFacts(batch=8, length=16, ms=0.25, engine="gpu", hardware="a card", command="hf-sparse bench y")),
    cost=CostFacts(steps=1234, seconds=99.6, hardware="a box", note="Without the teacher."),
    seed=0,
    versions={"torch": "2.13.0", "hf_sparse": "0.1.0"},
    limits=("English only.", "Never shown a <script>."),
    history=({"step": 10, "loss": 1.5, "sparsity": 0.25, "eval_accuracy": 0.5},
             {"step": 20, "loss": 0.75, "sparsity": 0.75, "eval_accuracy": 0.9125}),
)  # fmt: skip


def test_json_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    file.write_text(FULL.to_json(), encoding="utf-8")
    assert read_facts(file) == FULL


def test_absent_facts_are_left_out_of_the_json() -> None:
    facts = CardFacts(name="x", save_format="dense", seed=0, sparsity_reached=0.0)
    assert facts.to_dict() == {"name": "x", "save_format": "dense", "seed": 0, "sparsity_reached": 0.0}
    assert CardFacts.from_dict(facts.to_dict()) == facts


def test_layers_of_a_report_are_taken_as_they_are() -> None:
    layer = {**json.loads(FULL.to_json())["layers"][0], "sparsity": 0.8125}
    assert CardFacts.from_dict({"name": "x", "save_format": "dense", "layers": [layer]}).layers == (LAYER,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "3"}, "seed='3' must be int"),
        ({"seed": True}, "seed=True must be int"),
        ({"name": None}, "name=None must be str"),
        ({"colour": "red"}, "colour is unknown: expected one of"),
        ({"save_format": "zip"}, "save_format='zip' must be one of"),
        ({"block_shape": [8]}, r"block_shape=\[8\] must be a list of 2"),
        ({"block_shape": [8, 1.5]}, r"block_shape\[1\]=1.5 must be int"),
        ({"sparsity_reached": 1.0}, r"sparsity_reached=1.0 must be in \[0, 1\)"),
        ({"sparsity_asked": -0.1}, r"sparsity_asked=-0.1 must be in \[0, 1\)"),
        ({"sparsity_asked": float("nan")}, "sparsity_asked=nan must be finite"),
        ({"metrics": {"accuracy": 1.0}}, "metrics=.* must be a list"),
        ({"metrics": [{"type": "accuracy"}]}, r"metrics\[0\] is incomplete: .*'value'"),
        ({"metrics": [{"type": "accuracy", "value": float("inf")}]}, r"metrics\[0\]\.value=inf must be finite"),
        ({"metrics": [3]}, r"metrics\[0\] must be a JSON object, found int"),
        ({"cost": {"steps": 1, "seconds": "2", "hardware": "x"}}, r"cost\.seconds='2' must be float"),
        ({"versions": {"torch": 2}}, r"versions\.torch=2 must be str"),
        ({"versions": []}, r"versions=\[\] must be a JSON object"),
        ({"recipe": {"x": {1, 2}}}, r"recipe\.x=.* must be plain JSON"),
        ({"name": "\ud800"}, "name='.ud800' is no text"),
        ({"layers": [{**vars(LAYER), "total_blocks": 0, "kept_blocks": 0}]}, r"layers\[0\] .*total_blocks=0"),
        ({"layers": [{**vars(LAYER), "kept_blocks": 17}]}, r"layers\[0\] .*kept_blocks=17 must be from 0 to"),
        ({"layers": ["q"]}, r"layers\[0\] must be a JSON object, found str"),
        ({"limits": "none"}, "limits='none' must be a list"),
        ({"file_bytes": 0}, "file_bytes=0 must be above 0"),
        (
            {"latency": [{"batch": 1, "length": 8, "ms": 0, "engine": "cpu", "hardware": "x", "command": "y"}]},
            r"latency\[0\]\.ms=0 must be above 0",
        ),
        ({"history": [{"step": 1}, {"loss": 0.5}]}, r"history\[1\] has no step"),
        ({"history": [{"step": 1, "loss": float("nan")}]}, r"history\[0\]\.loss=nan must be finite"),
        (
            {"pictures": [{"file": "../x.png", "alt": "a"}]},
            r"pictures\[0\]\.file='\.\./x\.png' must be the plain name",
        ),
        ({"auto_class": "Auto Model"}, "auto_class='Auto Model' must be the name of a class"),
    ],
)
def test_a_wrong_fact_is_named(changes: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        CardFacts.from_dict({"name": "x", "save_format": "dense", **changes})


def test_facts_that_are_no_object() -> None:
    with pytest.raises(FormatError, match="the file must be a JSON object, found list"):
        CardFacts.from_dict([])  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="the file is incomplete: .*'name'"):
        CardFacts.from_dict({"save_format": "dense"})


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"card\.json is missing"):
        read_facts(tmp_path / "card.json")
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(FormatError, match=r"card\.json is not JSON"):
        read_facts(tmp_path / "card.json")
    (tmp_path / "card.json").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match=r"card\.json is not JSON"):
        read_facts(tmp_path / "card.json")
    (tmp_path / "card.json").write_text('{"name": 3}')
    with pytest.raises(FormatError, match=r"card\.json: name=3 must be str"):
        read_facts(tmp_path / "card.json")


def test_wrong_facts_made_in_python_do_not_reach_a_card() -> None:
    with pytest.raises(FormatError, match="seed='0' must be int"):
        CardFacts.from_dict(replace(FULL, seed="0").to_dict())  # type: ignore[arg-type]


def test_recipe_tells_what_differs_and_no_secret(tmp_path: Path) -> None:
    config = SparseDistillConfig(
        output_dir=str(tmp_path), use_cpu=True, hub_token="hf_secret", run_name="mine", sparsity=0.9,
        learning_rate=1e-4, lr_scheduler_type="cosine", block_height=8,
    )  # fmt: skip
    assert recipe_facts(config) == {"learning_rate": 1e-4, "lr_scheduler_type": "cosine", "sparsity": 0.9}


def test_recipe_tells_what_a_preset_set(tmp_path: Path) -> None:
    recipe = recipe_facts(SparseDistillConfig(output_dir=str(tmp_path), use_cpu=True, preset="spd"))
    assert recipe["preset"] == "spd"
    assert recipe["block_height"] == 1


def test_recipe_of_something_else() -> None:
    with pytest.raises(TypeError):
        recipe_facts(SimpleNamespace(sparsity=0.9))

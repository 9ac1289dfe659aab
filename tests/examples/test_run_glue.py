"""run_glue.py: every way in (files, columns, labels, configs) and out (metrics, table, card), resume, two ranks."""

import json
import logging
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import common
import glue_data
import numpy as np
import pytest
import run_glue
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from safetensors.torch import load_file
from tiny_task import make_rows, write_csv, write_model
from transformers import AutoConfig, AutoModelForSequenceClassification

import hf_sparse
from hf_sparse import SparseDistillTrainer
from hf_sparse.hub.card import facts_from_folder
from tests.examples.conftest import EXAMPLES

ROOT = EXAMPLES.parent
QUIET = "--use_cpu --disable_tqdm true --save_strategy no".split()
SHORT = [*QUIET, *"--do_train --do_eval --num_train_epochs 1 --per_device_train_batch_size 16 --seed 3".split()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "encoder")
    write_model(folder / "classifier", with_head=True)
    for seed, split in enumerate(("train", "validation", "test")):
        write_csv(folder / f"{split}.csv", 64, seed)
    return folder


@pytest.fixture
def base(made: Path) -> list[str]:
    data = [f"--{split}_file={made / split}.csv" for split in ("train", "validation", "test")]
    return [f"--model_name_or_path={made / 'classifier'}", *data]


def results(folder: Path) -> dict[str, float]:
    return json.loads((folder / "all_results.json").read_text())


# The whole run


def test_smoke_does_everything_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_glue.main(["--smoke", "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true"])
    out = capsys.readouterr().out
    measured, report = results(tmp_path / "out"), hf_sparse.report(tmp_path / "out")
    assert report.sparsity == pytest.approx(0.8, abs=0.005)
    assert str(report) in out
    table = dict(re.findall(r"^(commonest answer|dense|pruned|pruned against dense) {2,}(.*)$", out, re.M))
    assert table["commonest answer"].split()[0] == f"{measured['floor_accuracy']:.4f}"
    assert table["dense"].split() == [f"{measured['dense_accuracy']:.4f}", f"{report.dense_bytes / 1e6:.2f}", "MB"]
    assert table["pruned"].split() == [f"{measured['eval_accuracy']:.4f}", f"{report.bytes / 1e6:.2f}", "MB"]
    assert measured["dense_accuracy"] > 0.9 and measured["eval_accuracy"] > 0.9 > measured["floor_accuracy"]
    predicted = (tmp_path / "out/predict_results_test.txt").read_text().splitlines()
    assert len(predicted) == 129 and {line.split("\t")[1] for line in predicted[1:]} == {"bad", "good"}
    assert (tmp_path / "out/trainer_state.json").is_file()


def test_predictions_stand_in_the_order_of_the_rows(made: Path, tmp_path: Path) -> None:
    given = [f"--model_name_or_path={made / 'classifier'}", f"--test_file={made / 'test.csv'}", *QUIET, "--do_predict"]
    texts = []
    for strategy in ("random", "group_by_length"):
        options = ["--train_sampling_strategy", strategy, "--output_dir", str(tmp_path / strategy)]
        run_glue.main([*given, *options, "--per_device_eval_batch_size", "4"])
        texts.append((tmp_path / strategy / "predict_results_test.txt").read_text())
    assert texts[0] == texts[1] and len(set(texts[0].split())) > 60


def test_the_card_holds_both_scores_and_the_data(made: Path, base: list[str], tmp_path: Path) -> None:
    run_glue.main([*base, *SHORT, "--output_dir", str(tmp_path)])
    facts, measured = facts_from_folder(tmp_path), results(tmp_path)
    (metric,) = facts.metrics
    assert (metric.type, metric.value) == ("accuracy", measured["eval_accuracy"])
    assert metric.dense_value == measured["dense_accuracy"]
    assert facts.data.name == "train.csv" and facts.task == "text-classification"


def test_the_saved_model_measures_the_same_on_its_own(base: list[str], tmp_path: Path) -> None:
    run_glue.main([*base, *SHORT, "--output_dir", str(tmp_path / "out")])
    again = ["--model_name_or_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "again")]
    run_glue.main([*base, *QUIET, *again, "--do_eval"])
    first, second = results(tmp_path / "out"), results(tmp_path / "again")
    assert second["eval_accuracy"] == first["eval_accuracy"]
    assert second["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-5)


def test_a_run_goes_on_from_its_last_checkpoint(
    made: Path, base: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "examples")
    steps = ["--model_name_or_path", str(made / "encoder"), "--finetune_epochs", "1", "--save_strategy", "steps"]
    steps += ["--save_steps", "2", "--output_dir", str(tmp_path / "run")]
    run_glue.main([*base, *SHORT, *steps])
    straight = load_file(tmp_path / "run/model.safetensors")
    assert "Fine-tuning" in caplog.text and "Going on" not in caplog.text
    # As if it had been killed after step 2 of 4.
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    (tmp_path / "run/model.safetensors").unlink()
    caplog.clear()
    run_glue.main([*base, *SHORT, *steps])
    resumed = load_file(tmp_path / "run/model.safetensors")
    assert "Fine-tuning" not in caplog.text and "checkpoint-2; to begin anew" in caplog.text
    assert straight.keys() == resumed.keys() and all((straight[key] == resumed[key]).all() for key in straight)


def test_a_run_can_begin_anew_beside_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "checkpoint-7").mkdir()
    args = SimpleNamespace(do_train=True, output_dir=str(tmp_path), resume_from_checkpoint=None)
    assert common.find_checkpoint(args) == str(tmp_path / "checkpoint-7")
    for asked, expected in (("true", str(tmp_path / "checkpoint-7")), ("false", None), ("elsewhere", "elsewhere")):
        args.resume_from_checkpoint = asked
        assert common.find_checkpoint(args) == expected
    args.resume_from_checkpoint, args.output_dir = "true", str(tmp_path / "new")
    with pytest.raises(ValueError, match=r"output_dir='.*new' holds no checkpoint"):
        common.find_checkpoint(args)


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_training_from_files(made: Path, tmp_path: Path, kind: str) -> None:
    for seed, split in enumerate(("train", "validation")):
        data = Dataset.from_list([{"idx": i, **row} for i, row in enumerate(make_rows(48, seed))])
        getattr(data, f"to_{kind}")(tmp_path / f"{split}.{kind}")
    files = [f"--{split}_file={tmp_path / split}.{kind}" for split in ("train", "validation")]
    run_glue.main([f"--model_name_or_path={made / 'classifier'}", *files, *SHORT, f"--output_dir={tmp_path / 'out'}"])
    assert {"dense_accuracy", "eval_accuracy", "floor_accuracy"} <= results(tmp_path / "out").keys()
    assert AutoConfig.from_pretrained(tmp_path / "out").id2label == {0: "bad", 1: "good"}
    assert hf_sparse.report(tmp_path / "out").sparsity == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_one_file_holds_all_arguments(made: Path, base: list[str], tmp_path: Path, kind: str) -> None:
    given = dict(text.removeprefix("--").split("=") for text in base)
    given |= {"output_dir": str(tmp_path), "do_eval": True, "use_cpu": True, "sparsity": 0.5, "max_eval_samples": 5}
    file = tmp_path / f"arguments.{kind}"
    file.write_text(json.dumps(given) if kind == "json" else yaml.safe_dump(given))
    model_args, data_args, args = run_glue.parse_arguments([str(file)], tmp_path)
    assert model_args.model_name_or_path == str(made / "classifier")
    assert (data_args.max_eval_samples, args.sparsity, args.do_train) == (5, 0.5, False)


def test_a_score_is_learned_as_a_regression(made: Path, tmp_path: Path) -> None:
    rows = [{"sentence": row["sentence"], "label": len(row["sentence"]) / 50} for row in make_rows(64, 0)]
    Dataset.from_list(rows).to_csv(tmp_path / "train.csv")
    files = [f"--{split}_file={tmp_path / 'train.csv'}" for split in ("train", "validation", "test")]
    model = [f"--model_name_or_path={made / 'encoder'}", "--finetune_epochs=1", "--do_predict"]
    run_glue.main([*model, *files, *SHORT, f"--output_dir={tmp_path / 'out'}"])
    assert {"dense_pearson", "eval_pearson", "eval_spearmanr"} <= results(tmp_path / "out").keys()
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.num_labels, config.problem_type) == (1, "regression")
    float((tmp_path / "out/predict_results_test.txt").read_text().splitlines()[1].split("\t")[1])


def test_the_models_own_order_of_labels_is_kept(made: Path, base: list[str], tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(made / "classifier")
    model.config.label2id, model.config.id2label = {"good": 0, "bad": 1}, {0: "good", 1: "bad"}
    shutil.copytree(made / "classifier", tmp_path / "swapped")
    model.save_pretrained(tmp_path / "swapped")
    scores = []
    for folder in (made / "classifier", tmp_path / "swapped"):
        out = tmp_path / f"out-{folder.name}"
        run_glue.main([*base, *QUIET, "--do_eval", f"--model_name_or_path={folder}", f"--output_dir={out}"])
        scores.append(results(out)["eval_accuracy"])
    # The same logits, read the other way round.
    assert scores[0] + scores[1] == pytest.approx(1.0)


def test_foreign_label_names_are_replaced_with_a_warning(
    made: Path, base: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(made / "classifier")
    model.config.label2id, model.config.id2label = {"down": 0, "up": 1}, {0: "down", 1: "up"}
    model.save_pretrained(tmp_path)
    load = run_glue.ClassifierLoader(run_glue.ModelArguments(), {"a": "bad", "b": "good"})
    assert load(str(tmp_path)).config.id2label == {0: "bad", 1: "good"} and not load.new
    assert "calls its labels ['down', 'up'], the data ['bad', 'good']" in caplog.text


def test_a_given_teacher_is_what_is_measured_as_dense(made: Path, base: list[str], tmp_path: Path) -> None:
    teach = [
        "--model_name_or_path",
        str(made / "encoder"),
        "--finetune_epochs",
        "2",
        "--finetune_learning_rate",
        "1e-2",
    ]
    run_glue.main([*base, *SHORT, *teach, f"--output_dir={tmp_path / 'first'}"])
    teacher = ["--teacher_model_name_or_path", str(tmp_path / "first/_dense")]
    run_glue.main([*base, *SHORT, *teacher, f"--output_dir={tmp_path / 'second'}"])
    first, second = results(tmp_path / "first"), results(tmp_path / "second")
    assert second["dense_loss"] == pytest.approx(first["dense_loss"])
    assert facts_from_folder(tmp_path / "second").teacher.endswith("dense")


def test_without_distillation_the_model_itself_is_measured_as_dense(base: list[str], tmp_path: Path) -> None:
    run_glue.main([*base, *SHORT, "--kd_weight", "0", "--output_dir", str(tmp_path)])
    assert results(tmp_path)["dense_accuracy"] <= 1.0


def test_both_splits_of_mnli_are_measured_and_the_card_shows_both(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["entailment", "neutral", "contradiction"]
    features = Features({"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=names)})
    splits = {
        split: Dataset.from_dict(
            {"premise": ["witty"] * 24, "hypothesis": ["dull"] * 24, "label": [label] * 24}, features=features
        )
        for split, label in (("train", 0), ("validation_matched", 0), ("validation_mismatched", 1))
    }
    asked = []
    monkeypatch.setattr(glue_data, "load_dataset", lambda *path, **_: asked.append(path) or DatasetDict(splits))
    monkeypatch.setitem(sys.modules, "evaluate", None)
    hub = ["--task_name", "mnli", "--model_name_or_path", str(made / "encoder"), "--finetune_epochs", "1"]
    run_glue.main([*hub, *SHORT, "--finetune_learning_rate", "1e-2", "--output_dir", str(tmp_path)])
    assert asked == [("nyu-mll/glue", "mnli")]
    assert (results(tmp_path)["eval_accuracy"], results(tmp_path)["eval_mm_accuracy"]) == (1.0, 0.0)
    metrics = {metric.type: metric.value for metric in facts_from_folder(tmp_path).metrics}
    assert metrics == {"accuracy": 1.0, "mm_accuracy": 0.0}
    assert facts_from_folder(tmp_path).data.config == "mnli"


def test_publishing_says_what_was_trained_on(base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []
    monkeypatch.setattr(SparseDistillTrainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(SparseDistillTrainer, "push_to_hub", lambda self, **card: pushed.append(card))
    run_glue.main([*base, *SHORT, "--push_to_hub", "--output_dir", str(tmp_path)])
    assert pushed[-1]["dataset"] == "train.csv" and pushed[-1]["tasks"] == "text-classification"


@pytest.mark.dist
def test_two_processes_train_one_model(made: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    command = [sys.executable, *launch.split(), "--dynamo_backend", "no", "--main_process_port", str(port)]
    script = [str(EXAMPLES / "run_glue.py"), "--smoke", "--disable_tqdm", "true", f"--output_dir={tmp_path / 'out'}"]
    done = subprocess.run(
        [*command, *script, f"--cache_dir={tmp_path / 'cache'}"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es)" in done.stderr
    assert done.stdout.count("pruned against dense") == 1
    assert results(tmp_path / "out")["eval_accuracy"] > 0.9
    assert hf_sparse.report(tmp_path / "out").sparsity == pytest.approx(0.8, abs=0.005)


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--do_eval"], "model_name_or_path is missing"),
        (["--model_name_or_path=m", "--do_eval"], "there is no data: give --task_name"),
        (["--model_name_or_path=m", "--task_name=sst3", "--do_eval"], "task_name='sst3' is not known: use one of"),
        (["--model_name_or_path=m", "--task_name=sst2"], "there is nothing to do: give --do_train"),
        (
            ["--model_name_or_path=m", "--train_file=x.txt", "--do_train"],
            r"train_file='x.txt' cannot be read: .* must end in one of",
        ),
        (["--model_name_or_path=m", "--train_file={made}/train.csv", "--do_eval"], "validation_file is missing"),
        (["--smoke", "--max_predict_samples=0"], "max_predict_samples=0 must be at least 1; leave it out"),
    ],
)
def test_arguments_that_cannot_work_are_refused(
    made: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    given = [text.format(made=made) for text in arguments]
    with pytest.raises(ValueError, match=message):
        run_glue.parse_arguments([*given, f"--output_dir={tmp_path}", "--use_cpu"], tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"validation_file='nowhere.csv' does not exist"):
        run_glue.main(["--model_name_or_path=m", "--validation_file=nowhere.csv", "--do_eval", "--use_cpu"])


def test_a_model_without_a_trained_head_is_refused_as_teacher(made: Path, base: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"encoder has no trained head for this task .* --finetune_epochs"):
        run_glue.main([*base, *SHORT, f"--model_name_or_path={made / 'encoder'}", f"--output_dir={tmp_path}"])


def test_what_does_not_fit_is_refused_before_fine_tuning(
    made: Path, base: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "examples")
    dense = [f"--model_name_or_path={made / 'encoder'}", "--finetune_epochs=1", f"--output_dir={tmp_path}"]
    with pytest.raises(ValueError, match="7"):
        run_glue.main([*base, *SHORT, *dense, "--block_height=7"])
    assert "Fine-tuning" not in caplog.text


def test_a_head_is_learned_also_where_pruning_freezes_it(made: Path, base: list[str], tmp_path: Path) -> None:
    dense = [f"--model_name_or_path={made / 'encoder'}", "--finetune_epochs=1", f"--output_dir={tmp_path}"]
    run_glue.main([*base, *SHORT, *dense, "--train_only_layers", "true", "--finetune_learning_rate=1e-2"])
    heads = [load_file(folder / "model.safetensors") for folder in (tmp_path / "_dense", tmp_path)]
    # Trained biases are zero no more, and stay what they are while the layers alone are trained.
    assert heads[0]["classifier.bias"].abs().max() > 0
    assert (heads[0]["classifier.bias"] == heads[1]["classifier.bias"]).all()


def test_a_revision_is_that_of_the_model_to_prune_alone() -> None:
    load = run_glue.ClassifierLoader(run_glue.ModelArguments(model_name_or_path="me/m", model_revision="v2"), None)
    assert load.where("me/m")["revision"] == "v2" and "revision" not in load.where("me/teacher")


def test_labels_that_were_never_learned_are_refused(made: Path, base: list[str], tmp_path: Path) -> None:
    Dataset.from_list([{"sentence": "witty", "label": "great"}]).to_csv(tmp_path / "odd.csv")
    with pytest.raises(ValueError, match=r"'label' of the validation data holds 'great', which is none of \['bad'"):
        run_glue.main([*base, *SHORT, f"--validation_file={tmp_path / 'odd.csv'}", f"--output_dir={tmp_path}"])


def test_help_lists_every_argument(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run_glue.parse_arguments(["--help"], tmp_path)
    out = capsys.readouterr().out
    assert all(f"--{name}" in out for name in ("finetune_epochs", "sentence2_key", "penalty_weight", "learning_rate"))


# Data


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "json", "jsonl"])
def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path, kind: str) -> None:
    rows = [{"sentence": 'NA, said "she', "label": 1}, {"sentence": "null", "label": 0}, {"sentence": "", "label": 1}]
    data, file = Dataset.from_list(rows), tmp_path / f"data.{kind}"
    if kind == "tsv":
        file.write_text("sentence\tlabel\n" + "".join(f"{row['sentence']}\t{row['label']}\n" for row in rows))
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        getattr(data, f"to_{kind}")(file)
    loaded = glue_data.load_splits({"train": str(file)}, None, str(tmp_path / "cache"))
    assert loaded["train"].to_list() == rows


def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    file.write_text("no parquet")
    with pytest.raises(ValueError, match=r"train_file='.*data.parquet' cannot be read: "):
        glue_data.load_splits({"train": str(file)}, None, str(tmp_path / "cache"))


def test_without_the_hub_a_task_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub")

    monkeypatch.setattr(glue_data, "load_dataset", unreachable)
    with pytest.raises(ConnectionError, match=r"reach 'nyu-mll/glue' .* give --train_file and --validation_file"):
        glue_data.load_splits({}, "sst2", None)


@pytest.mark.parametrize(
    ("columns", "task", "asked", "expected"),
    [
        (["sentence"], "sst2", (None, None), ["sentence"]),
        (["question", "sentence"], None, (None, None), ["question", "sentence"]),
        (["hypothesis", "premise"], None, (None, None), ["premise", "hypothesis"]),
        (["question", "sentence"], "sst2", (None, None), ["sentence"]),
        (["review"], None, (None, None), ["review"]),
        (["a", "b"], None, ("b", None), ["b"]),
        (["a", "b"], "mnli", ("b", "a"), ["b", "a"]),
    ],
)
def test_text_columns_are_found(
    columns: list[str], task: str | None, asked: tuple[str | None, ...], expected: list[str]
) -> None:
    data = Dataset.from_dict({"idx": [1], **{name: ["text"] for name in columns}, "label": ["x"]})
    assert glue_data.find_text_columns(data, task, "label", asked) == expected


@pytest.mark.parametrize(
    ("columns", "asked", "message"),
    [
        (["a", "b"], (None, None), r"\['a', 'b', 'label'\] do not tell where the text is .* give --sentence1_key"),
        (["a"], ("c", None), r"column 'c' is no text: text is in \['a'\]"),
        (["a"], ("label", None), r"column 'label' is no text"),
    ],
)
def test_text_columns_that_cannot_be_told_are_refused(
    columns: list[str], asked: tuple[str | None, ...], message: str
) -> None:
    data = Dataset.from_dict({**{name: ["text"] for name in columns}, "label": [1]})
    with pytest.raises(ValueError, match=message):
        glue_data.find_text_columns(data, None, "label", asked)


@pytest.mark.parametrize(
    ("values", "task", "expected"),
    [
        ([1, 0, 1], "sst2", {0: "negative", 1: "positive"}),
        (["neutral", "entailment"], "mnli", dict(zip(*[("entailment", "neutral", "contradiction")] * 2, strict=True))),
        ([3, 1, 3], None, {1: "1", 3: "3"}),
        (["b", "a"], None, {"a": "a", "b": "b"}),
        ([0.5, 1.0], None, None),
        ([3, 5], "stsb", None),
    ],
)
def test_labels_are_found(values: list[object], task: str | None, expected: dict[object, str] | None) -> None:
    assert glue_data.find_labels(Dataset.from_dict({"label": values}), task, "label") == expected


def test_class_names_come_with_the_data() -> None:
    data = Dataset.from_dict({"y": [1]}, features=Features({"y": ClassLabel(names=["no", "yes"])}))
    assert glue_data.find_labels(data, None, "y") == {0: "no", 1: "yes"}


def test_labels_that_are_not_the_tasks_are_refused() -> None:
    data = Dataset.from_dict({"label": [0, 2]})
    with pytest.raises(ValueError, match=r"'label' holds \[0, 2\], but the labels of sst2 are \['negative'"):
        glue_data.find_labels(data, "sst2", "label")
    with pytest.raises(ValueError, match=r"label_key='y' is not among the columns \['label'\]"):
        glue_data.find_labels(data, "sst2", "y")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": ["a", None], "label": [0, 1]}, "column 'text' of the dev data has empty cells"),
        ({"text": ["a", "b"], "label": ["x", ""]}, "column 'label' of the dev data has empty cells"),
        ({"text": ["a", "b"], "label": [0.5, float("nan")]}, "column 'label' of the dev data has empty cells"),
        ({"text": ["a", "b"]}, r"the dev data has no column 'label', only \['text'\]"),
        ({"label": [0]}, r"the dev data has no column 'text', only \['label'\]"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(rows: dict[str, list[object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        glue_data.check_values("dev", Dataset.from_dict(rows), ["text"], ("label", None))


def test_a_label_column_of_names_becomes_ids_and_a_limit_takes_the_first_rows() -> None:
    data = Dataset.from_dict({"label": ["b", "a", "b"], "text": ["x y", "z", "x"], "other": [1, 2, 3]})
    rows = glue_data.tokenise(
        "train", data, ["text"], ("label", {"a": 0, "b": 1}), 2, False, lambda texts: {"n": [len(t) for t in texts]}
    )
    assert rows.to_list() == [{"n": 3, "label": 1}, {"n": 1, "label": 0}]


# Metrics


def test_metrics_are_what_their_definitions_say() -> None:
    true, predicted = np.array([1, 1, 1, 0, 0, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0, 0, 0])
    # 2 true positives, 1 false positive, 1 false negative, 4 true negatives.
    assert glue_data.METRICS["accuracy"](predicted, true) == 6 / 8
    assert glue_data.METRICS["f1"](predicted, true) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    matthews = (2 * 4 - 1 * 1) / np.sqrt(3 * 3 * 5 * 5)
    assert glue_data.METRICS["matthews_correlation"](predicted, true) == pytest.approx(matthews)
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 9.0])
    assert glue_data.METRICS["pearson"](x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert glue_data.METRICS["spearmanr"](x, y) == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_equal_values_share_a_rank() -> None:
    x, y = np.array([1.0, 2.0, 2.0, 5.0]), np.array([1.0, 2.0, 3.0, 4.0])
    assert glue_data.METRICS["spearmanr"](x, y) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])


def test_metrics_of_a_constant_are_zero() -> None:
    ones, mixed = np.ones(4, dtype=int), np.array([0, 1, 0, 1])
    assert glue_data.METRICS["matthews_correlation"](ones, mixed) == 0.0
    assert glue_data.METRICS["f1"](np.zeros(4, dtype=int), np.zeros(4, dtype=int)) == 0.0
    metric = glue_data.Metric("cola", regression=False, from_hub=False)
    assert metric.of_commonest_answer(np.array([1, 1, 0])) == {"matthews_correlation": 0.0}
    assert glue_data.Metric("sst2", False, False).of_commonest_answer(np.array([2, 2, 0])) == {"accuracy": 2 / 3}


def test_evaluate_is_taken_where_it_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*path: str) -> SimpleNamespace:
        assert path == ("glue", "mrpc")
        return SimpleNamespace(compute=lambda predictions, references: {"f1": float(predictions.sum())})

    monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=load, __version__="9"))
    metric = glue_data.Metric("mrpc", regression=False, from_hub=True)
    assert metric.source == "accuracy, f1, by evaluate 9"
    logits = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 2.0]])
    assert metric(SimpleNamespace(predictions=(logits, None), label_ids=np.zeros(3))) == {"f1": 2.0}


@pytest.mark.parametrize("error", [FileNotFoundError("no such module"), ImportError("scipy"), AttributeError("x")])
def test_a_metric_that_evaluate_cannot_load_is_computed_anyway(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(*_: str) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=load, __version__="9"))
    metric = glue_data.Metric("sst2", regression=False, from_hub=True)
    assert metric.source == f"accuracy, built in (evaluate cannot load its own: {type(error).__name__})"
    output = SimpleNamespace(predictions=np.eye(2), label_ids=np.array([0, 0]))
    assert metric(output) == {"accuracy": 0.5}


def test_files_ask_nothing_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "evaluate", None)
    assert glue_data.Metric("stsb", regression=True, from_hub=False).source == "pearson, spearmanr, built in"


# What docs/glue.md says


def test_every_launch_line_of_the_docs_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_glue, "check_source", lambda *_: None)
    text = (ROOT / "docs/glue.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^ {4}.*examples/run_glue\.py (.*)$", text, re.M)
    assert len(lines) >= 4
    for line in lines:
        arguments = line.split("#")[0].replace("...", "--model_name_or_path m --do_train").split()
        model_args, _, _ = run_glue.parse_arguments([*arguments, "--use_cpu"], tmp_path)
        assert model_args.model_name_or_path

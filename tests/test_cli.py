"""The command line: the same answers as the API, JSON and nothing else on stdout, errors without tracebacks."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from transformers.utils import logging as transformers_logging

import hf_sparse
from hf_sparse import SparseDistillConfig, plan_step
from hf_sparse.cli import app, main
from hf_sparse.core.blocks import expand_mask
from hf_sparse.core.structure.targets import find_targets, weight_view
from hf_sparse.hub.card import facts_from_folder, render_card, write_card
from hf_sparse.hub.facts import FACTS_FILE, CardFacts, LatencyFacts

TOKENS = torch.arange(6).reshape(2, 3)
COMMANDS = ("report", "plan", "compress", "decompress", "crop", "export", "bench", "card", "push", "env")


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Done]]:
    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["hf-sparse", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return Done(int(stopped.value.code or 0), *capsys.readouterr())

    verbosity = transformers_logging.get_verbosity()
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("COLUMNS", "200")
    yield run
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A dense folder with zero blocks of 8 x 1, a tokenizer file, and the leftovers of training."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                        vocab_size=40, num_labels=3, max_position_embeddings=32)  # fmt: skip
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for module in find_targets(model).values():
            weight = weight_view(module)
            mask = torch.rand(weight.shape[0] // 8, weight.shape[1]) < 0.25
            weight.masked_fill_(~expand_mask(mask, (8, 1)), 0.0)
    folder = tmp_path / "dense"
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("a b c")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"state")
    return folder


@pytest.fixture
def small(dense: Path, cli: Callable[..., Done]) -> Path:
    assert cli("compress", dense, dense.parent / "small").code == 0
    return dense.parent / "small"


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForSequenceClassification.from_pretrained(folder)(TOKENS).logits


def assert_refused(done: Done, message: str) -> None:
    assert done.code == 1
    assert done.out == ""
    assert re.search(message, done.err), done.err
    assert 1 <= len(done.err.strip().splitlines()) <= 3
    assert "Traceback" not in done.err


# --- report


def test_report(cli: Callable[..., Done], small: Path) -> None:
    assert json.loads(cli("report", small, "--json").out) == json.loads(json.dumps(hf_sparse.report(small).to_dict()))
    assert cli("report", small) == (0, f"{hf_sparse.report(small)}\n", "")


def test_report_of_a_dense_folder(cli: Callable[..., Done], dense: Path) -> None:
    assert json.loads(cli("report", dense, "--json").out)["sparsity"] == hf_sparse.report(dense).sparsity


@pytest.mark.parametrize("command", ["report", "bench", "card"])
def test_folders_that_hold_no_model(cli: Callable[..., Done], tmp_path: Path, command: str) -> None:
    assert_refused(cli(command, tmp_path / "nowhere"), "nowhere does not exist: expected the folder of a saved model")
    (tmp_path / "file").write_text("")
    assert_refused(cli(command, tmp_path / "file"), "file is a file: expected the folder")
    (tmp_path / "empty").mkdir()
    assert_refused(cli(command, tmp_path / "empty", "--json"), "holds no config.json|hf_sparse_card.json is missing")


@pytest.mark.parametrize("command", ["report", "decompress", "crop", "export", "bench"])
def test_damaged_weights(cli: Callable[..., Done], small: Path, command: str) -> None:
    weights = small / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    destination = [small.parent / "out"] if command in ("decompress", "crop", "export") else []
    assert_refused(cli(command, small, *destination), r"model\.safetensors is not a whole safetensors file")
    assert not (small.parent / "out").exists()


@pytest.mark.parametrize("command", ["report", "decompress", "crop", "export", "bench"])
def test_damaged_config(cli: Callable[..., Done], small: Path, command: str) -> None:
    destination = [small.parent / "out"] if command in ("decompress", "crop", "export") else []
    config = json.loads((small / "config.json").read_text())
    name = next(iter(config["quantization_config"]["modules"]))
    config["quantization_config"]["modules"][name]["kept"] += 1
    (small / "config.json").write_text(json.dumps(config))
    assert_refused(cli(command, small, *destination), re.escape(name))
    (small / "config.json").write_text("{")
    assert_refused(cli(command, small, *destination), r"config\.json is not JSON")
    assert not (small.parent / "out").exists()


# --- plan


def test_plan(cli: Callable[..., Done], tmp_path: Path) -> None:
    settings = {"sparsity": 0.9, "graft_start": 0.5, "penalty_weight": 1e-4, "mask_updates": 7, "max_steps": 40}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings))
    config = SparseDistillConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    steps = json.loads(cli("plan", file, "--json").out)
    assert steps == [asdict(plan_step(config, step, 40)) for step in range(40)]
    assert {"step", "sparsity", "graft_prob", "penalty_weight"} <= set(steps[0])
    assert json.loads(cli("plan", file, "--steps", 9, "--json").out) == [
        asdict(plan_step(config, step, 9)) for step in range(9)
    ]


def test_plan_as_a_table(cli: Callable[..., Done], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"max_steps": 10_000, "sparsity": 0.5, "sparsity_end": 0.25}))
    table = cli("plan", file).out
    shown = [line.split() for line in table.splitlines()[1:-1]]
    assert ["0", "0.00%"] == shown[0][:2]
    assert ["9,999", "50.00%"] == shown[-1][:2]
    assert any(row[:2] == ["2,500", "50.00%"] for row in shown)
    assert len(shown) < 30
    assert "100 mask updates, final sparsity 50.00% from step 2,500" in table


def test_plan_of_a_run_for_other_hardware(cli: Callable[..., Done], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"max_steps": 3, "bf16": True, "tf32": True, "output_dir": "out"}))
    assert len(json.loads(cli("plan", file, "--json").out)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"c\.json is not JSON"),
        ("[]", r"c\.json must hold an object, found a list"),
        ('{"sparsty": 0.5, "max_steps": 5}', "SparseDistillConfig has no field 'sparsty'"),
        ('{"model_type": "bert", "max_steps": 5}', r"c\.json is the config of a model \(it holds 'model_type'\)"),
        ('{"architectures": ["BertModel"]}', "fields of SparseDistillConfig; a model is named by --model"),
        ('{"sparsity": 1.5, "max_steps": 5}', r"sparsity=1.5 must be a number in \[0, 1\)"),
        ('{"sparsity": 0.5}', "no max_steps above 0.*pass --steps"),
        ('{"max_steps": "5"}', "no max_steps above 0"),
    ],
)
def test_plan_refuses(cli: Callable[..., Done], tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.json").write_text(text)
    assert_refused(cli("plan", tmp_path / "c.json", "--json"), message)


def test_plan_without_a_file(cli: Callable[..., Done], tmp_path: Path) -> None:
    assert_refused(cli("plan", tmp_path / "c.json"), r"c\.json is not a file")
    assert cli("plan", tmp_path / "c.json", "--steps", 0).code == 2


# --- compress and decompress


def test_compress_and_back(cli: Callable[..., Done], dense: Path, tmp_path: Path) -> None:
    before = sorted(dense.rglob("*"))
    done = cli("compress", dense, tmp_path / "small", "--json")
    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert told == {"path": str(tmp_path / "small"), **json.loads(cli("report", tmp_path / "small", "--json").out)}
    assert {tuple(layer["block_shape"]) for layer in told["layers"]} == {(8, 1)}
    assert told["sparsity"] == pytest.approx(hf_sparse.report(dense).sparsity)
    assert (tmp_path / "small" / "model.safetensors").stat().st_size < (dense / "model.safetensors").stat().st_size
    assert cli("decompress", tmp_path / "small", tmp_path / "back").code == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (dense, tmp_path / "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.allclose(logits(dense), logits(tmp_path / "small"), atol=1e-6)
    assert torch.equal(logits(dense), logits(tmp_path / "back"))
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    for folder in ("small", "back"):
        kept = {str(path.relative_to(tmp_path / folder)) for path in (tmp_path / folder).rglob("*") if path.is_file()}
        assert kept == {"config.json", "model.safetensors", "vocab.txt", "1_Pooling/config.json"}
        assert (tmp_path / folder / "vocab.txt").read_text() == "a b c"
    assert sorted(dense.rglob("*")) == before


def test_compress_takes_the_dtype_of_the_file(cli: Callable[..., Done], dense: Path, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(dense).to(torch.bfloat16).save_pretrained(dense)
    assert cli("compress", dense, tmp_path / "small").code == 0
    stored = load_file(tmp_path / "small" / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if not name.endswith("_block_mask")} == {torch.bfloat16}


def test_compress_with_another_block_shape(cli: Callable[..., Done], dense: Path, tmp_path: Path) -> None:
    told = json.loads(cli("compress", dense, tmp_path / "out", "--block-height", 4, "--json").out)
    assert {tuple(layer["block_shape"]) for layer in told["layers"]} == {(4, 1)}
    assert told["sparsity"] == pytest.approx(hf_sparse.report(dense).sparsity)


def test_compress_takes_the_recorded_block_shape(cli: Callable[..., Done], dense: Path, tmp_path: Path) -> None:
    write_card(dense, CardFacts(name="dense", save_format="dense", block_shape=(2, 1)))
    told = json.loads(cli("compress", dense, tmp_path / "out", "--json").out)
    assert {tuple(layer["block_shape"]) for layer in told["layers"]} == {(2, 1)}


def test_converting_brings_the_card_up_to_date(cli: Callable[..., Done], dense: Path, tmp_path: Path) -> None:
    times = LatencyFacts(batch=1, length=8, ms=1.0, engine="torch", hardware="a box", command="bench")
    facts = CardFacts(name="dense", save_format="dense", seed=3, file_bytes=7, latency=(times,))
    write_card(dense, facts)
    assert cli("compress", dense, tmp_path / "out").err == ""
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    expected = replace(facts, save_format="compressed", file_bytes=size, latency=())
    written = facts_from_folder(tmp_path / "out")
    assert [picture.file for picture in written.pictures] == ["masks.png"]
    expected = replace(expected, pictures=written.pictures)
    assert written == expected
    assert (tmp_path / "out" / "README.md").read_text() == render_card(expected)


def test_converting_keeps_a_card_edited_by_hand(cli: Callable[..., Done], dense: Path, tmp_path: Path) -> None:
    write_card(dense, CardFacts(name="dense", save_format="dense"))
    (dense / "README.md").write_text("# mine\n")
    assert "README.md was edited by hand" in cli("compress", dense, tmp_path / "out").err
    assert (tmp_path / "out" / "README.md").read_text() == "# mine\n"
    assert facts_from_folder(tmp_path / "out").save_format == "compressed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--block-height", 7), "block_height=7 does not divide the 16 output rows"),
        (("--block-width", 0), "block_width=0 is not a block size"),
        (("--block-height", 16, "--block-width", 16), "has no zero block of 16 x 16 to leave out"),
    ],
)
def test_compress_refuses_a_wrong_block_shape(
    cli: Callable[..., Done], dense: Path, tmp_path: Path, options: tuple, message: str
) -> None:
    assert_refused(cli("compress", dense, tmp_path / "out", *options), message)
    assert not (tmp_path / "out").exists()


def test_compress_where_a_block_shape_does_not_fit_all_layers(
    cli: Callable[..., Done], dense: Path, tmp_path: Path
) -> None:
    # 32 rows lie in the intermediate layers alone; the error names the options that help, and they do.
    refused = cli("compress", dense, tmp_path / "out", "--block-height", 32)
    assert_refused(refused, "32 does not divide the 16 .*block_overrides, or leave it out with exclude_modules")
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight[:, :5] = 0.0
    model.save_pretrained(dense)
    others = r".*(attention|output).*"
    told = json.loads(
        cli("compress", dense, tmp_path / "a", "--block-height", 32, "--exclude-modules", others, "--json").out
    )
    found = {(layer["name"].split(".")[-2], *layer["block_shape"]) for layer in told["layers"]}
    assert found == {("intermediate", 32, 1)}
    overrides = json.dumps({r".*intermediate\.dense": [32, 1]})
    told = json.loads(cli("compress", dense, tmp_path / "b", "--block-overrides", overrides, "--json").out)
    shapes = {layer["name"]: tuple(layer["block_shape"]) for layer in told["layers"]}
    assert shapes.pop("bert.encoder.layer.0.intermediate.dense") == (32, 1)
    assert shapes["bert.encoder.layer.0.attention.self.query"] == (8, 1)
    assert torch.allclose(logits(dense), logits(tmp_path / "b"), atol=1e-6)
    assert_refused(cli("compress", dense, tmp_path / "c", "--block-overrides", "32"), "block_overrides='32' must map")
    assert_refused(
        cli("compress", dense, tmp_path / "c", "--exclude-modules", "x"), "exclude_modules='x' matches none"
    )


@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_a_destination_that_holds_something(cli: Callable[..., Done], small: Path, command: str) -> None:
    source = small if command == "decompress" else small.parent / "dense"
    target = small.parent / "there"
    target.mkdir()
    (target / "model-00001-of-00002.safetensors").write_text("old")
    (target / "notes.txt").write_text("mine")
    assert_refused(cli(command, source, target), "there is not empty: .*--force")
    assert (target / "model-00001-of-00002.safetensors").read_text() == "old"
    assert_refused(cli(command, source, target / "notes.txt", "--force"), "notes.txt is a file: name a folder")
    assert_refused(cli(command, source, source, "--force"), "is the source itself")
    assert cli(command, source, target, "--force").code == 0
    assert not (target / "model-00001-of-00002.safetensors").exists()
    assert (target / "notes.txt").read_text() == "mine"
    assert torch.allclose(logits(target), logits(source), atol=1e-6)


def test_converting_what_is_converted_already(cli: Callable[..., Done], dense: Path, small: Path) -> None:
    assert_refused(cli("compress", small, dense.parent / "out"), "small is compressed already")
    assert_refused(cli("decompress", dense, dense.parent / "out"), "dense is dense already")


def test_converting_never_makes_up_weights(cli: Callable[..., Done], dense: Path, tmp_path: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    assert_refused(cli("compress", dense, tmp_path / "out"), "missing keys for BertForMaskedLM")
    (dense / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    assert_refused(cli("compress", dense, tmp_path / "out"), "unexpected keys for BertModel, such as classifier.bias")
    (dense / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    assert_refused(cli("compress", dense, tmp_path / "out"), "names no architecture of transformers")


# --- bench


def test_bench(cli: Callable[..., Done], small: Path, dense: Path) -> None:
    write_card(small, CardFacts(name="small", save_format="compressed"))
    options = ("--dense", dense, "--engines", "torch", "--batch", "1,2", "--length", "4,8", "--seconds", 0)
    told = json.loads(cli("bench", small, *options, "--record", "--json").out)
    assert [(row["engine"], row["batch"], row["length"]) for row in told["rows"]] == [
        (engine, batch, length) for batch in (1, 2) for length in (4, 8) for engine in ("dense", "hf_sparse")
    ]
    assert all(row["ms"] > 0 and row["max_error"] < 1e-4 for row in told["rows"])
    assert {"model", "command", "commit", "hardware", "versions", "rows"} <= set(told)
    assert shlex.split(told["command"])[:3] == ["hf-sparse", "bench", str(small)]
    recorded = facts_from_folder(small).latency
    assert [(row.batch, row.length, row.dense_ms, row.ms) for row in recorded] == [
        (first["batch"], first["length"], first["ms"], second["ms"])
        for first, second in zip(told["rows"][0::2], told["rows"][1::2], strict=True)
    ]
    assert str(small) not in recorded[0].command
    assert render_card(facts_from_folder(small)) == (small / "README.md").read_text()


def test_bench_as_a_table(cli: Callable[..., Done], small: Path) -> None:
    done = cli("bench", small, "--engines", "torch", "--batch", 2, "--length", 8, "--seconds", 0)
    for engine in ("torch", "hf_sparse"):
        cells = rf"^ *2 +8 +{engine} +\d+\.\d{{3}} +[\d.]+-[\d.]+ +[\d.]+x +[\d.]+x +\d\.\de[-+]\d+ *$"
        assert re.search(cells, done.out, re.MULTILINE), done.out
    assert re.search(r"^density .*, float32, \d+ threads, cpu; speed-ups over", done.out, re.MULTILINE)
    assert re.search(r"^compressed layers: \d+ by \w+", done.out, re.MULTILINE)
    assert re.search(r"^encoder bert.encoder: (not )?fused: ", done.out, re.MULTILINE)


def test_bench_with_every_option(cli: Callable[..., Done], small: Path, tmp_path: Path) -> None:
    before, file = torch.get_num_threads(), tmp_path / "out.json"
    options = ("--batch", 1, "--length", "4,8", "--seconds", 0, "--dtype", "bfloat16", "--threads", 1, "--out", file)
    told = json.loads(cli("bench", small, *options, "--json").out)
    assert json.loads(file.read_text()) == told
    assert torch.get_num_threads() == before
    assert {(row["dtype"], row["threads"]) for row in told["rows"]} == {("bfloat16", 1)}
    assert told["not_measured"]["onnxruntime"] in (
        "onnxruntime is not installed",
        "it does not compute in bfloat16 on a CPU",
    )
    assert sum(told["backends"].values()) == 12 and list(told["encoders"]) == ["bert.encoder"]
    assert "--dtype bfloat16 --threads 1" in told["command"]
    engines = {row["engine"] for row in told["rows"]}
    assert {"dense", "hf_sparse"} <= engines and engines.isdisjoint(told["not_measured"])


def test_bench_names_what_is_not_installed(
    cli: Callable[..., Done], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    options = ("--engines", "openvino", "--batch", 1, "--length", 4, "--seconds", 0)
    assert "without openvino: openvino is not installed\n" in cli("bench", small, *options).out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", "1,x"), "--batch='1,x' must be positive whole numbers"),
        (("--engines", "torch,tensorrt"), "--engines='torch,tensorrt' holds 'tensorrt': use auto"),
        (("--out", "nowhere/out.json"), "--out nowhere/out.json must be a file in a folder that exists"),
        (("--length", "0"), "--length='0' must be positive whole numbers"),
        (("--length", "64"), "--length 64 is more than the 32 positions"),
        (("--record",), f"{FACTS_FILE} is missing"),
        (("--dense", "nowhere"), "nowhere does not exist"),
        (("--device", "cuda"), "--device cuda: torch finds no GPU here"),
        (("--device", "cpu", "--dtype", "float16"), "--dtype float16 is measured on a GPU"),
    ],
)
def test_bench_refuses(cli: Callable[..., Done], small: Path, options: tuple, message: str) -> None:
    assert_refused(cli("bench", small, "--seconds", 0, *options), message)
    assert cli("bench", small, "--dtype", "int8").code == 2


def test_bench_tells_no_speed_when_the_values_differ(
    cli: Callable[..., Done], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decompress = hf_sparse.decompress

    def broken(model: torch.nn.Module) -> torch.nn.Module:
        model = decompress(model)
        model.classifier.bias.data.add_(1.0)
        return model

    monkeypatch.setattr("hf_sparse.inference.compress.decompress", broken)
    options = ("--engines", "torch", "--seconds", 0, "--length", 8)
    assert_refused(cli("bench", small, *options), "no speed is told")


def test_bench_of_a_dense_model_needs_another(cli: Callable[..., Done], dense: Path) -> None:
    assert_refused(cli("bench", dense), "is dense: name the model to compare it with")


def test_bench_does_not_measure_what_it_could_not_record(cli: Callable[..., Done], small: Path) -> None:
    write_card(small, CardFacts(name="small", save_format="compressed"))
    (small / "README.md").write_text("# mine\n")
    assert_refused(cli("bench", small, "--record"), r"README\.md was edited by hand")


# --- card and push


def test_card(cli: Callable[..., Done], tmp_path: Path) -> None:
    card = write_card(tmp_path, CardFacts(name="tiny", save_format="dense"))
    card.unlink()
    assert json.loads(cli("card", tmp_path, "--json").out) == {"path": str(card)}
    assert card.read_text() == render_card(facts_from_folder(tmp_path))
    card.write_text("# mine\n")
    assert_refused(cli("card", tmp_path), r"README\.md was written or edited by hand.*--force")
    assert card.read_text() == "# mine\n"
    assert cli("card", tmp_path, "--force").code == 0
    assert card.read_text() == render_card(facts_from_folder(tmp_path))


def test_card_of_damaged_facts(cli: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / FACTS_FILE).write_text('{"name": "x", "save_format": "dense", "seed": "3"}')
    assert_refused(cli("card", tmp_path), f"{FACTS_FILE}: seed='3' must be int")


def test_push_hands_everything_on(cli: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def push_folder(*args: object, **kwargs: object) -> str:
        calls.append((args, kwargs))
        return "https://hub/me/x"

    monkeypatch.setattr("hf_sparse.hub.push.push_folder", push_folder)
    options = ("--private", "--revision", "v2", "--create-pr", "--token", "hf_x", "--message", "Hello")
    assert json.loads(cli("push", tmp_path, "me/x", *options, "--json").out) == {"url": "https://hub/me/x"}
    assert cli("push", tmp_path, "me/x").out == "https://hub/me/x\n"
    given = {"private": True, "revision": "v2", "create_pr": True, "token": "hf_x", "message": "Hello"}
    absent = {"private": False, "revision": None, "create_pr": False, "token": None, "message": None}
    assert calls == [((tmp_path, "me/x"), given), ((tmp_path, "me/x"), absent)]


def test_push_without_a_token(cli: Callable[..., Done], small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sparse.hub.push.get_token", lambda: None)
    assert_refused(cli("push", small, "me/x"), "There is no access token")
    assert_refused(cli("push", small.parent, "me/x"), "holds no config.json")


# --- env


def test_env(cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    monkeypatch.setenv("HF_SPARSE_BACKEND", "torch")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    told = json.loads(cli("env", "--json").out)
    assert told["versions"]["torch"] == torch.__version__
    assert told["versions"]["hf-sparse"] == hf_sparse.__version__
    assert told["hardware"]["threads"] == torch.get_num_threads()
    assert told["kernels"]["reference"]["available"] is True
    assert all(kernel["reason"] for kernel in told["kernels"].values())
    assert told["variables"]["HF_SPARSE_BACKEND"] == "torch"
    assert told["variables"]["PARALLELISM_CONFIG_TP_SIZE"] == "2"
    assert set(told["native"]) == {"library", "threads", "compiler", "used", "instruction_sets"}
    assert all(isa["reason"] for isa in told["native"]["instruction_sets"].values())
    assert {"onnx", "onnxruntime", "openvino"} <= set(told["versions"])
    text = cli("env").out
    assert re.search(r"^  portable +(not )?live: ", text, re.MULTILINE)
    assert re.search(r"^variables\n(  \w+ .*\n)*  HF_SPARSE_BACKEND +torch$", text, re.MULTILINE)
    assert "HF_SPARSE_ISA  " not in text
    assert re.search(r"^  reference +live: ", text, re.MULTILINE)
    assert re.search(rf"^  torch +{re.escape(torch.__version__)}$", text, re.MULTILINE)
    assert "hf_secret" not in text + json.dumps(told)


def test_every_variable_is_documented() -> None:
    root = Path(hf_sparse.__file__).parent
    table = (root.parent / "docs" / "environment.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`[A-Z].*?) \|", table, re.MULTILINE)
    documented = {name for cell in cells for name in re.findall(r"`([A-Z_*]+)`", cell)}
    sources = [p.read_text(encoding="utf-8") for p in root.rglob("*") if p.suffix in (".py", ".cpp", ".h", ".c")]
    used = {name for text in sources for name in re.findall(r"\bHF_SPARSE_[A-Z]+(?:_[A-Z]+)*\b", text)}
    read = {name for text in sources for name in re.findall(r"environ(?:\.get\(|\[)[\"']([A-Z_]+)[\"']", text)}
    from hf_sparse.cli.env import SIZES, VARIABLES

    assert (used | read) - documented == set()
    assert {*VARIABLES, SIZES} == documented - {"HF_TOKEN"}


# --- the frame


def test_help_names_an_example_for_every_command(cli: Callable[..., Done]) -> None:
    assert {command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)
    text = cli("--help").out
    for command in COMMANDS:
        assert command in text
        done = cli(command, "--help")
        assert done.code == 0
        assert f"Example: hf-sparse {command}" in done.out
        assert "--json" in done.out


def test_version(cli: Callable[..., Done]) -> None:
    assert cli("--version") == (0, f"{hf_sparse.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("report",),
        ("rport", "x"),
        ("report", "x", "--jsn"),
        ("compress", "x"),
        ("compress", "x", "y", "--block-height", "a"),
    ],
)
def test_wrong_usage_is_code_2(cli: Callable[..., Done], arguments: tuple) -> None:
    done = cli(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert "Traceback" not in done.err


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hf-sparse", "report", str(tmp_path), "--debug"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        main()


STUBBED = """
import sys, types
package = types.ModuleType("hf_sparse")
package.__path__ = [sys.argv.pop(1)]
sys.modules["hf_sparse"] = package
import hf_sparse.cli
try:
    hf_sparse.cli.main()
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""


def test_help_imports_nothing_heavy() -> None:
    root = str(Path(hf_sparse.__file__).parent)
    done = subprocess.run([sys.executable, "-c", STUBBED, root, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert not {"torch", "transformers", "huggingface_hub", "jinja2", "safetensors"} & set(done.stderr.split())


@pytest.mark.parametrize("debug", [False, True])
def test_a_bug_is_told_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], debug: bool
) -> None:
    def broken(folder: Path) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("hf_sparse.core.report.report", broken)
    monkeypatch.setattr(sys, "argv", ["hf-sparse", "report", str(tmp_path), *["--debug"] * debug])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(KeyError) as caught:
        main()
    # What Python does with an error that nobody caught, before it exits with code 1.
    sys.excepthook(caught.type, caught.value, caught.tb)
    done = capsys.readouterr()
    assert done.out == ""
    assert ("Traceback" in done.err) is debug
    assert "KeyError: 'surprise'" in done.err
    if not debug:
        assert len(done.err.splitlines()) == 2


def test_the_console_script(small: Path) -> None:
    script = Path(sys.executable).with_name("hf-sparse")
    command = [str(script)] if script.exists() else [sys.executable, "-c", "from hf_sparse.cli import main; main()"]
    done = subprocess.run([*command, "report", str(small), "--json"], capture_output=True, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout)["bytes"] == hf_sparse.report(small).bytes

"""Every line of Python of docs/neighbours.md runs, in its order, on tiny models; where its packages are installed."""

import contextlib
import json
import re
import sqlite3
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import hf_sparse
from hf_sparse import SparseDistillConfig, compress
from tests.inference import models
from tests.training.tiny import bert, make_trainer, pruned_zero, rows

DOCUMENT = Path(hf_sparse.__file__).parents[1] / "docs" / "neighbours.md"
WORDS = ["<pad>", "</s>", "<unk>", *(f"word{i}" for i in range(47))]


def blocks() -> dict[str, list[str]]:
    """{heading: its blocks of Python}."""
    sections = re.split(r"^#+ (.*)$", DOCUMENT.read_text(encoding="utf-8"), flags=re.M)[1:]
    return {
        title: re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        for title, text in zip(sections[::2], sections[1::2], strict=True)
    }


def needs(*packages: str) -> None:
    if missing := [name for name in packages if find_spec(name) is None]:
        pytest.skip(f"{missing} not installed")


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The variables of the document after its first block, in a folder with a compressed model."""
    monkeypatch.chdir(tmp_path)
    model, masks = models.pruned("bert")
    compress(model, masks=masks).save_pretrained("out/model")
    names: dict[str, Any] = {}
    run("Neighbours", names)
    return names


def run(title: str, names: dict[str, Any]) -> None:
    for block in blocks()[title]:
        exec(compile(block, f"{DOCUMENT.name}, {title}", "exec"), names)


def test_every_section_is_run_here() -> None:
    assert set(blocks()) == {
        "Neighbours", "PEFT: LoRA on a compressed model", "TRL: prune after SFT", "sentence-transformers",
        "Logging: TensorBoard, W&B, trackio", "Optuna", "Quantisation on top",
    }  # fmt: skip


def test_peft(names: dict[str, Any]) -> None:
    needs("peft")
    run("PEFT: LoRA on a compressed model", names)
    assert hf_sparse.report("out/merged").bytes == hf_sparse.report("out/model").bytes
    models.assert_same(models.outputs(names["again"], "bert"), models.outputs(names["merged"], "bert"))


def word_tokenizer() -> tf.PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=24
    )


def test_trl(names: dict[str, Any]) -> None:
    needs("trl")
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**models.TEXT, num_key_value_heads=1, pad_token_id=0, eos_token_id=1))
    model.save_pretrained("out/language-model")
    word_tokenizer().save_pretrained("out/language-model")
    text = [" ".join(f"word{(7 * i + j) % 47}" for j in range(8)) for i in range(32)]
    names["dialogues"] = Dataset.from_dict({"text": text})
    run("TRL: prune after SFT", names)
    assert pruned_zero(names["pruned"])
    assert hf_sparse.report("out/sft-pruned").sparsity == pytest.approx(0.5, abs=0.01)
    assert names["pruned"].state.log_history[-1]["train_loss"] > 0


def test_sentence_transformers(names: dict[str, Any]) -> None:
    needs("sentence_transformers")
    torch.manual_seed(0)
    encoder = tf.BertModel(tf.BertConfig(**models.TEXT))
    masks = models.prune(encoder)
    compress(encoder, masks=masks).save_pretrained("out/encoder")
    word_tokenizer().save_pretrained("out/encoder")
    kinds = ("Transformer", "Pooling")
    modules = [
        {"idx": i, "name": str(i), "path": ("", "1_Pooling")[i], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    Path("out/encoder/modules.json").write_text(json.dumps(modules))
    Path("out/encoder/1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    Path("out/encoder/1_Pooling/config.json").write_text(json.dumps(pooling))
    run("sentence-transformers", names)
    assert names["embeddings"].shape == (2, 16)
    inside = names["encoder"][0].auto_model
    assert hf_sparse.report(inside).sparsity == pytest.approx(hf_sparse.report("out/encoder").sparsity)


TERMS = ("sparsity", "graft_prob", "penalty", "loss_task", "loss_kd", "loss_hidden", "loss")


def logged(names: dict[str, Any], folder: Path, to: str, **given: Any) -> dict[str, list[float]]:
    """Train with the settings of the page, all that is logged going to one logger: what the run itself recorded."""
    names["SparseDistillConfig"] = SparseDistillConfig
    run("Logging: TensorBoard, W&B, trackio", names)
    keys = ("logging_strategy", "logging_steps", "max_steps")
    settings = {key: getattr(names["args"], key) for key in keys}
    trainer = make_trainer(bert(), folder, rows("classes", 8), sparsity=0.5, hidden_weight=0.1, graft_start=0.5,
                           penalty_weight=1e-4, report_to=[to], **{**settings, **given})  # fmt: skip
    trainer.train()
    return {term: [row[term] for row in trainer.state.log_history if term in row] for term in TERMS}


def test_tensorboard_holds_every_term(names: dict[str, Any], tmp_path: Path) -> None:
    needs("tensorboard")
    expected = logged(names, tmp_path / "logged", "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    assert {f"train/{term}" for term in TERMS} <= set(events.Tags()["scalars"])
    for term, values in expected.items():
        assert len(values) == 2 and [e.value for e in events.Scalars(f"train/{term}")] == pytest.approx(values), term
    assert "sparsity" in events.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of an offline run: a log as LevelDB writes it, in blocks of 32 KiB, after a header of 7 bytes."""
    assert content[:4] == b":W&B"
    at, record = 7, b""
    while at + 7 <= len(content):
        if (left := -at % 32768) and left < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield record
            record = b""


def test_wandb_holds_every_term(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("wandb")
    import wandb
    from wandb.proto import wandb_internal_pb2

    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    expected = logged(names, tmp_path / "logged", "wandb")
    wandb.finish()
    (file,) = tmp_path.rglob("*.wandb")
    rows_written, config = [], {}
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.history.item:
            items = record.history.item
            rows_written.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
        for update in (*record.config.update, *record.run.config.update):
            config["/".join(update.nested_key) or update.key] = json.loads(update.value_json)
    for term, values in expected.items():
        written = [row[f"train/{term}"] for row in rows_written if f"train/{term}" in row]
        assert len(values) == 2 and written == pytest.approx(values), term
    assert config["sparsity"] == 0.5 and config["block_height"] == 4


def test_trackio_holds_every_term(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    expected = logged(names, tmp_path / "logged", "trackio", project="pruning", run_name="one")
    (file,) = (tmp_path / "trackio").glob("*.db")
    with contextlib.closing(sqlite3.connect(file)) as database:
        rows_written = [json.loads(row[0]) for row in database.execute("SELECT metrics FROM metrics ORDER BY id")]
        configs = [json.loads(row[0]) for row in database.execute("SELECT config FROM configs")]
    for term, values in expected.items():
        written = [row[f"train/{term}"] for row in rows_written if f"train/{term}" in row]
        assert len(values) == 2 and written == pytest.approx(values), term
    assert configs[0]["sparsity"] == 0.5 and configs[0]["block_height"] == 4


def test_optuna_space(names: dict[str, Any]) -> None:
    needs("optuna")
    import optuna

    run("Optuna", names)
    found = names["space"](optuna.trial.FixedTrial({"learning_rate": 3e-4, "sparsity": 0.7}))
    assert SparseDistillConfig("out", **found).sparsity == 0.7


def test_quantisation(names: dict[str, Any]) -> None:
    needs("onnx", "onnxruntime")
    import onnxruntime

    run("Quantisation on top", names)
    small, half = hf_sparse.report("out/model"), hf_sparse.report("out/half")
    assert half.bytes < 0.55 * small.bytes and half.sparsity == small.sparsity
    session = onnxruntime.InferenceSession("out/onnx/model_int8.onnx")
    given = {**models.inputs("bert")}
    given |= {i.name: torch.ones_like(given["input_ids"]) for i in session.get_inputs() if i.name not in given}
    given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    found = session.run(None, {i.name: given[i.name].numpy() for i in session.get_inputs()})[0]
    expected = models.outputs(names["model"], "bert")
    assert (torch.from_numpy(found) - expected).abs().max() < 0.1 * expected.abs().max()

"""Contract 7: checkpoints are ordinary dense ones; the final save alone is compressed, and no kill can spoil it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_sparse import BlockSparseLinear, load_dense, report
from hf_sparse.core.bits import Bitmap
from hf_sparse.core.blocks import block_norms
from hf_sparse.training.checkpoints.saving import copy_to_cpu, save_final
from tests import forking
from tests.training.tiny import Watch, bert, make_trainer, pad, rows, weights_of

ROOT = Path(__file__).resolve().parents[2]


def trained(folder: Path, **changes: Any) -> Any:
    trainer = make_trainer(bert(), folder, rows("classes", 8), **{"sparsity": 0.75, "max_steps": 3, **changes})
    trainer.train()
    return trainer


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**pad(rows("classes", 8, seed=9))).logits


def in_a_fresh_process(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_checkpoint_is_an_ordinary_dense_one(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), sparsity=0.75, sparsity_end=1.0, max_steps=4,
                           penalty_weight=1e-3, save_strategy="steps", save_steps=2)  # fmt: skip
    at_2: dict[str, torch.Tensor] = {}
    trainer.add_callback(
        Watch(on_step_end=lambda state: at_2.update(weights_of(trainer.model) if state.global_step == 2 else {}))
    )
    trainer.train()
    for step in (2, 4):
        checkpoint = tmp_path / f"checkpoint-{step}"
        config = json.loads((checkpoint / "config.json").read_text())
        assert "quantization_config" not in config
        stored = load_file(checkpoint / "model.safetensors")
        assert set(stored) == set(bert().state_dict()), "the keys of the dense model and no other"
        assert (checkpoint / "sparsity_state.safetensors").is_file()
        loaded = AutoModelForSequenceClassification.from_pretrained(checkpoint)
        assert not any(isinstance(module, BlockSparseLinear) for module in loaded.modules())
    first = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(at_2[name], weight) for name, weight in weights_of(first).items())
    state = load_file(tmp_path / "checkpoint-4" / "sparsity_state.safetensors")
    name = "bert.encoder.layer.0.output.dense"
    assert torch.equal(state[f"{name}.mask"], trainer.pruner.masks.masks[name])
    assert torch.equal(state[f"{name}.coef"], trainer.pruner.coefs[name])


def test_a_plain_trainer_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    data = rows("classes", 8)
    make_trainer(bert(), tmp_path, data, sparsity=0.5, max_steps=2, save_strategy="steps", save_steps=1).train()
    args = TrainingArguments(output_dir=str(tmp_path / "plain"), use_cpu=True, max_steps=3, disable_tqdm=True,
                             save_strategy="no", per_device_train_batch_size=8)  # fmt: skip
    plain = Trainer(bert(), args, pad, data)
    plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert plain.state.global_step == 3


def test_the_final_save_is_compressed_and_equal(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run")
    trainer.save_model(tmp_path / "final")
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "hf_sparse"
    assert config["quantization_config"]["format_version"] == 1
    trainer.model.save_pretrained(tmp_path / "dense")
    small, dense = ((tmp_path / f / "model.safetensors").stat().st_size for f in ("final", "dense"))
    stored = load_file(tmp_path / "final" / "model.safetensors")
    for name, mask in trainer.pruner.masks.masks.items():
        assert stored[f"{name}.weight"].shape == (int(mask.sum()), 4, 1)
    pruned = sum(int((~mask).sum()) * 4 * 4 for mask in trainer.pruner.masks.masks.values())
    bitmaps = sum(-(-mask.numel() // 8) for mask in trainer.pruner.masks.masks.values())
    assert small < dense - pruned + bitmaps + 4096, "4096 for the longer header"
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=1e-5, atol=1e-6)
    back = load_dense(AutoModelForSequenceClassification, tmp_path / "final")
    assert all(torch.equal(weight, back.get_parameter(name)) for name, weight in weights_of(trainer.model).items())
    assert torch.equal(logits(back), logits(trainer.model))
    assert report(tmp_path / "final").sparsity == pytest.approx(trainer.pruner.masks.sparsity)


def test_saving_leaves_the_model_in_training_alone(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run")
    before, modules = weights_of(trainer.model), [type(m) for m in trainer.model.modules()]
    trainer.save_model(tmp_path / "final")
    assert [type(m) for m in trainer.model.modules()] == modules
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer.model).items())
    assert getattr(trainer.model.config, "quantization_config", None) is None
    trainer.args.max_steps = 4
    trainer.train()


def test_save_format_dense_loads_without_hf_sparse(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", save_format="dense")
    trainer.save_model(tmp_path / "final")
    torch.save(logits(trainer.model), tmp_path / "logits.pt")
    torch.save(pad(rows("classes", 8, seed=9)), tmp_path / "inputs.pt")
    code = """
        import sys, torch
        from transformers import AutoModelForSequenceClassification
        model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1] + "/final").eval()
        with torch.no_grad():
            found = model(**torch.load(sys.argv[1] + "/inputs.pt")).logits
        print(torch.equal(found, torch.load(sys.argv[1] + "/logits.pt")), "hf_sparse" in sys.modules)
    """
    assert in_a_fresh_process(code, str(tmp_path)).split()[-2:] == ["True", "False"]
    stored = load_file(tmp_path / "final" / "model.safetensors")
    name = "bert.encoder.layer.0.intermediate.dense"
    zero = block_norms(stored[f"{name}.weight"], (4, 1)) == 0
    assert torch.equal(zero, ~trainer.pruner.masks.masks[name])


def test_saving_before_and_in_the_middle_of_pruning(tmp_path: Path) -> None:
    trainer = make_trainer(bert(), tmp_path / "run", rows("classes", 8), sparsity=0.75, sparsity_end=1.0, max_steps=4)
    trainer.save_model(tmp_path / "before")
    untouched = AutoModelForSequenceClassification.from_pretrained(tmp_path / "before")
    assert all(torch.equal(weight, untouched.get_parameter(name)) for name, weight in weights_of(bert()).items())

    def save(state: Any) -> None:
        if state.global_step == 3:
            trainer.save_model(tmp_path / "middle")
            logged.append(logits(trainer.model))
            trainer.model.train()

    logged: list[torch.Tensor] = []
    trainer.add_callback(Watch(on_step_end=save))
    trainer.train()
    middle = AutoModelForSequenceClassification.from_pretrained(tmp_path / "middle")
    torch.testing.assert_close(logits(middle), logged[0], rtol=1e-5, atol=1e-6)
    assert 0.0 < report(tmp_path / "middle").sparsity < 0.75


def test_saving_again_replaces_every_weight_file(tmp_path: Path) -> None:
    trainer, final = trained(tmp_path / "run"), tmp_path / "final"
    final.mkdir()
    for stale in ("pytorch_model.bin", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (final / stale).write_text("old")
    (final / "notes.txt").write_text("mine")
    trainer.save_model(final)
    trainer.save_model(final)
    names = {file.name for file in final.iterdir()}
    assert not names & {"pytorch_model.bin", "model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    assert {"model.safetensors", "config.json", "training_args.bin", "notes.txt"} <= names
    assert not any(name.startswith(".saving-") for name in names)
    assert torch.load(final / "training_args.bin", weights_only=False).sparsity == 0.75


def test_a_processing_class_is_saved_with_the_model(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    tokenizer = tf.BertTokenizer(str(tmp_path / "vocab.txt"))
    trainer = make_trainer(bert(), tmp_path / "run", rows("classes", 8), sparsity=0.5, max_steps=1, save_steps=1,
                           save_strategy="steps", extra={"processing_class": tokenizer})  # fmt: skip
    trainer.train()
    trainer.save_model(tmp_path / "final")
    for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-1"):
        assert (folder / "tokenizer_config.json").is_file()


def test_a_folder_of_the_user_named_like_a_checkpoint_is_a_final_save(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run")
    trainer.save_model(tmp_path / "checkpoint-best")
    assert "quantization_config" in json.loads((tmp_path / "checkpoint-best" / "config.json").read_text())


def test_tied_weights_stay_tied_in_the_copy_that_is_saved() -> None:
    torch.manual_seed(0)
    model = bert(kind="MaskedLM")
    model.bert.encoder.layer[0].output.dense.block_mask = Bitmap(torch.ones(4, 32, dtype=torch.bool))
    copied = copy_to_cpu(model)
    assert copied.cls.predictions.decoder.weight is copied.bert.embeddings.word_embeddings.weight
    assert copied.bert.embeddings.word_embeddings.weight is not model.bert.embeddings.word_embeddings.weight
    assert not hasattr(copied.bert.encoder.layer[0].output.dense, "block_mask")
    assert hasattr(model.bert.encoder.layer[0].output.dense, "block_mask")
    mine, theirs = model.state_dict(), copied.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def save_one(folder: str | Path, seed: int, pause: float) -> None:
    """Save a pruned model, and wait in the middle of it."""
    model, masks = bert(seed), {}
    for name, module in model.named_modules():
        if name.endswith("intermediate.dense"):
            masks[name] = torch.rand(8, 16) < 0.5
            with torch.no_grad():
                module.weight.mul_(masks[name].repeat_interleave(4, 0))

    def wait(staging: Path) -> None:
        (staging / "extra").write_text(str(seed))
        print("writing", flush=True)
        time.sleep(pause)

    save_final(model, folder, masks, wait)


def test_a_kill_in_the_middle_of_a_save_leaves_the_previous_one_whole(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    save_one(tmp_path, seed=0, pause=0)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    expected = logits(AutoModelForSequenceClassification.from_pretrained(tmp_path))
    log = tmp_path_factory.mktemp("killed") / "log"
    child = forking.start(log, save_one, tmp_path, 1, 60)
    try:
        while child.is_alive() and not (log.exists() and "writing" in log.read_text()):
            time.sleep(0.02)
    finally:
        child.kill()
        child.join()
    assert child.exitcode == -signal.SIGKILL, log.read_text()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)), expected)
    left = [file for file in tmp_path.iterdir() if file.name.startswith(".saving-")]
    assert len(left) == 1, "the killed save had begun to write"
    # The next save puts the new model in place and clears away what the killed one left.
    save_one(tmp_path, seed=1, pause=0)
    assert not torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)), expected)
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".saving-")]


def test_a_save_that_fails_leaves_the_previous_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, final = trained(tmp_path / "run"), tmp_path / "final"
    trainer.save_model(final)
    before = {file.name: file.read_bytes() for file in final.iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with torch.no_grad():
        trainer.model.classifier.weight.add_(1.0)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        trainer.save_model(final)
    assert {file.name: file.read_bytes() for file in final.iterdir()} == before

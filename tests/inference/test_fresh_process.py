"""What a user sees in a process of their own: with hf_sparse imported, and without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

from hf_sparse import compress
from tests.inference import models

ROOT = Path(__file__).parents[2]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(45))]

WITH = """
import torch, hf_sparse
from transformers import AutoModelForSequenceClassification, pipeline
model = AutoModelForSequenceClassification.from_pretrained({folder!r})
layers = [m for m in model.modules() if isinstance(m, hf_sparse.BlockSparseLinear)]
assert len(layers) == 12, layers
with torch.no_grad():
    logits = model(input_ids=torch.tensor([[2, 6, 7, 8, 3]])).logits
torch.save(logits, {out!r})
pipe = pipeline("text-classification", model={folder!r}, device="cpu")
assert any(isinstance(m, hf_sparse.BlockSparseLinear) for m in pipe.model.modules())
answer = pipe("w1 w2 w3")[0]
assert abs(answer["score"] - logits.softmax(-1).max().item()) < 1e-5, (answer, logits)
"""

WITHOUT = """
import sys
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline
for load in (
    lambda: AutoModelForSequenceClassification.from_pretrained({folder!r}),
    lambda: pipeline("text-classification", model={folder!r}, device="cpu"),
    lambda: AutoModelForCausalLM.from_pretrained({experts!r}),
):
    try:
        load()
    except Exception as error:
        print(type(error).__name__)
    else:
        print("LOADED")
assert "hf_sparse" not in sys.modules
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed BERT with a tokenizer."""
    path = tmp_path_factory.mktemp("fresh")
    model, masks = models.pruned("bert")
    compress(model, masks).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS))
    tf.BertTokenizerFast(vocab=str(path / "vocab.txt")).save_pretrained(path)
    return path


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_plain_from_pretrained_and_pipeline(folder: Path, tmp_path: Path) -> None:
    done = run(WITH.format(folder=str(folder), out=str(tmp_path / "logits.pt")))
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        expected = models.pruned("bert")[0](input_ids=torch.tensor([[2, 6, 7, 8, 3]])).logits
    models.assert_same(torch.load(tmp_path / "logits.pt"), expected)


def test_without_hf_sparse_it_raises(folder: Path) -> None:
    # Random layers in the place of the compressed ones would be the worst outcome: a model that runs and is wrong.
    experts = ROOT / "tests" / "golden" / "v2" / "mixtral"
    done = run(WITHOUT.format(folder=str(folder), experts=str(experts)))
    assert done.returncode == 0, done.stderr[-3000:]
    # The pipeline tries several classes and gathers their errors into one. The last are experts.
    assert done.stdout.split() == ["RuntimeError", "ValueError", "RuntimeError"]
    # The message names the way out: the word that leads to this package.
    assert "got hf_sparse" in done.stderr

"""A loopback Hub per test, and one small compressed model folder for all of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from hf_sparse import compress
from hf_sparse.core.blocks import expand_mask
from hf_sparse.core.structure.targets import find_targets, weight_view
from tests.hub.loopback_hub import LoopbackHub


def pruned_bert(seed: int) -> tuple[BertForSequenceClassification, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                        vocab_size=40, num_labels=3, max_position_embeddings=32)  # fmt: skip
    model, masks = BertForSequenceClassification(config).eval(), {}
    for name, module in find_targets(model).items():
        weight = weight_view(module)
        masks[name] = torch.rand(weight.shape[0] // 8, weight.shape[1]) < 0.3
        with torch.no_grad():
            weight.mul_(expand_mask(masks[name], (8, 1)))
    return model, masks


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        # The client reads HF_ENDPOINT once, when it is imported, and these constants at every call.
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        # transformers keeps one client per process, and with it the address of the server of an earlier test.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr("hf_sparse.hub.push.WAITS", (0.0, 0.0, 0.0))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
        yield server


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of 40 words, as small as the model."""
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(38))])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    model, masks = pruned_bert(seed=0)
    folder = tmp_path / "model"
    compress(model, masks).save_pretrained(folder)
    (folder / "README.md").write_text("# a card\n")
    (folder / "training_args.bin").write_bytes(b"pickle")
    for name in ("checkpoint-2", "_dense"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"dense")
    return folder

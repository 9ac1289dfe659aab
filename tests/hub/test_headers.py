"""Headers by ranges of bytes: the same report as of the files, for a small part of their bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_sparse import FormatError, compress, report
from hf_sparse.core.blocks import expand_mask
from hf_sparse.core.structure.targets import find_targets
from hf_sparse.hub.fetch import FetchError, fetch_model
from hf_sparse.hub.headers import fetch_headers
from hf_sparse.hub.html import render_report
from hf_sparse.hub.push import push_folder
from tests.hub.loopback_hub import WRITE_TOKEN, LoopbackHub
from tests.inference import models
from tests.mixtures import mixture

REPO = "tester/pruned"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three megabytes of weights in blocks of 8 x 1, at a quarter of their density."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=256, num_hidden_layers=3, num_attention_heads=4, intermediate_size=1024,
                        vocab_size=500, max_position_embeddings=64)  # fmt: skip
    model, masks = BertForSequenceClassification(config).eval(), {}
    for name, module in find_targets(model).items():
        rows, columns = module.weight.shape
        masks[name] = torch.rand(rows // 8, columns) < 0.25
        module.weight.data.mul_(expand_mask(masks[name], (8, 1)))
    folder = tmp_path_factory.mktemp("large")
    compress(model, masks).save_pretrained(folder)
    return folder


def into(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_headers_and_bitmaps_alone_are_served(hub: LoopbackHub, large: Path, tmp_path: Path) -> None:
    push_folder(large, REPO, token=WRITE_TOKEN)
    hub.served.clear()
    folder = fetch_headers(REPO, into(tmp_path / "seen"))
    assert folder == tmp_path / "seen"
    assert report(folder).to_dict() == report(large).to_dict()
    assert render_report(folder, "x") == render_report(large, "x")
    whole = (large / "model.safetensors").stat().st_size
    bitmaps = sum(-(-layer.total_blocks // 8) for layer in report(large).layers)
    assert whole > 2_500_000
    # The first 64 KiB, which hold the header, and the bitmaps; the headers of answers are not counted.
    assert hub.served["model.safetensors"] <= 2**16 + bitmaps + 2**12
    assert hub.served.total() < 0.06 * whole
    assert (folder / "model.safetensors").stat().st_size == whole
    assert hub.unhandled == []


def test_shards_and_a_header_longer_than_the_first_answer(
    hub: LoopbackHub, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_sparse.hub.headers.FIRST_BYTES", 100)
    model = BertForSequenceClassification.from_pretrained(large)
    model.save_pretrained(into(tmp_path / "shards"), max_shard_size="1MB")
    push_folder(tmp_path / "shards", REPO, token=WRITE_TOKEN)
    hub.served.clear()
    folder = fetch_headers(REPO, into(tmp_path / "seen"))
    assert folder is not None
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert report(folder).to_dict() == report(tmp_path / "shards").to_dict()
    whole = sum(file.stat().st_size for file in (tmp_path / "shards").glob("*.safetensors"))
    assert sum(count for name, count in hub.served.items() if name.endswith(".safetensors")) < 0.06 * whole


def test_experts_of_a_mixture(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A first answer that holds no bitmap: each is asked for by its own range.
    monkeypatch.setattr("hf_sparse.hub.headers.FIRST_BYTES", 100)
    model = mixture("mixtral")
    compress(model, models.prune(model)).save_pretrained(into(tmp_path / "model"))
    push_folder(tmp_path / "model", REPO, token=WRITE_TOKEN)
    hub.served.clear()
    folder = fetch_headers(REPO, into(tmp_path / "seen"))
    assert folder is not None
    assert report(folder).to_dict() == report(tmp_path / "model").to_dict()
    assert sum("experts" in layer.name and layer.sparsity > 0.5 for layer in report(folder).layers) == 4
    assert render_report(folder, "x") == render_report(tmp_path / "model", "x")


def test_a_dense_model_is_not_looked_at_by_its_headers(hub: LoopbackHub, large: Path, tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "dense")
    push_folder(tmp_path / "dense", REPO, token=WRITE_TOKEN)
    hub.served.clear()
    assert fetch_headers(REPO, into(tmp_path / "seen")) is None
    assert "model.safetensors" not in hub.served
    assert list((tmp_path / "seen").iterdir()) == []


def test_a_model_that_is_in_the_cache_is_looked_at_there(
    hub: LoopbackHub, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_folder(large, REPO, token=WRITE_TOKEN)
    fetched = fetch_model(REPO)
    (fetched / "1_Pooling").mkdir()
    hub.served.clear()
    assert fetch_headers(REPO, into(tmp_path / "seen")) == fetched
    assert hub.served.total() == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch_headers(REPO, tmp_path / "seen") == fetched


def test_whatever_else_of_a_commit_is_in_the_cache_is_left_there(
    hub: LoopbackHub, large: Path, tmp_path: Path
) -> None:
    push_folder(large, REPO, token=WRITE_TOKEN)
    cached = fetch_model(REPO, weights=False)
    (cached / "1_Pooling").mkdir()
    (cached / "pytorch_model.bin").write_bytes(b"pickle")
    folder = fetch_headers(REPO, into(tmp_path / "seen"))
    assert folder is not None
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert report(folder).to_dict() == report(large).to_dict()


def test_an_older_revision(hub: LoopbackHub, large: Path, model_folder: Path, tmp_path: Path) -> None:
    push_folder(model_folder, REPO, token=WRITE_TOKEN)
    old = hub.repos[REPO].branches["main"][-1].oid
    push_folder(large, REPO, token=WRITE_TOKEN)
    folder = fetch_headers(REPO, into(tmp_path / "seen"), revision=old)
    assert folder is not None
    assert report(folder).to_dict() == report(model_folder).to_dict()


def test_a_server_without_ranges_does_not_make_it_fetch_the_weights(
    hub: LoopbackHub, large: Path, tmp_path: Path
) -> None:
    push_folder(large, REPO, token=WRITE_TOKEN)
    hub.ranges = False
    with pytest.raises(FetchError, match="serves no parts of files: download the model"):
        fetch_headers(REPO, into(tmp_path / "seen"))


@pytest.mark.parametrize("status", [None, 503])
def test_it_goes_on_after_a_dropped_connection(
    hub: LoopbackHub, large: Path, tmp_path: Path, status: int | None
) -> None:
    push_folder(large, REPO, token=WRITE_TOKEN)
    hub.fail("GET /tester/pruned/resolve/.*safetensors", status, times=2)
    folder = fetch_headers(REPO, into(tmp_path / "seen"))
    assert folder is not None
    assert report(folder).to_dict() == report(large).to_dict()
    hub.fail("GET /tester/pruned/resolve/.*safetensors", status, times=99)
    with pytest.raises(FetchError, match=r"tester/pruned: model\.safetensors could not be looked at"):
        fetch_headers(REPO, into(tmp_path / "again"))


def test_damage_is_found_as_in_the_files(hub: LoopbackHub, large: Path, tmp_path: Path) -> None:
    push_folder(large, REPO, token=WRITE_TOKEN)
    files = hub.repos[REPO].branches["main"][-1].files
    whole = files["model.safetensors"]
    length = int.from_bytes(whole[:8], "little")
    for number, damaged in enumerate((
        whole[:-5],
        whole[:100],
        (2**62).to_bytes(8, "little") + whole[8:],
        whole[:8] + whole[8 : 8 + length].replace(b'"U8"', b'"I8"') + whole[8 + length :],
        # The bitmaps come last.
        whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
    )):  # fmt: skip
        files["model.safetensors"] = damaged
        folder = fetch_headers(REPO, into(tmp_path / str(number)))
        assert folder is not None
        with pytest.raises(FormatError, match=r"model\.safetensors"):
            report(folder)

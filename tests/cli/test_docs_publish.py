"""Every command and every line of Python of docs/publish.md runs, in its order, against the Hub on loopback."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

import hf_sparse
from hf_sparse.hub.card import facts_from_folder, write_card
from tests.hub.conftest import save_tokenizer
from tests.hub.loopback_hub import WRITE_TOKEN, LoopbackHub
from tests.hub.test_facts import FULL
from tests.test_cli import Done

DOCUMENT = Path(hf_sparse.__file__).parents[1] / "docs" / "publish.md"


def test_the_document_runs(
    cli: Callable[..., Done],
    hub: LoopbackHub,
    model_folder: Path,
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    (tmp_path / "out").mkdir()
    model_folder.rename("out/model")
    dense.rename("out/dense")
    save_tokenizer(Path("out/model"))
    write_card("out/model", FULL)
    Path("pruning.json").write_text(json.dumps({"sparsity": 0.8}))
    text = DOCUMENT.read_text(encoding="utf-8").replace("you/pruned", "tester/pruned")
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    assert {language for language, _ in blocks} == {"bash", "python", "text"}
    names: dict[str, object] = {}
    for language, block in blocks:
        if language == "python":
            exec(compile(block, DOCUMENT.name, "exec"), names)
        for line in block.splitlines() if language == "bash" else ():
            command, *arguments = shlex.split(line)
            assert command == "hf-sparse"
            done = cli(*arguments)
            assert done.code == 0, f"{line}: {done.err}"
    assert facts_from_folder("out/model").license == "apache-2.0"
    assert Path("report.html").stat().st_size > 10_000
    assert Path("plan.png").exists()
    repo = hub.repos["tester/pruned"]
    assert repo.private
    assert set(repo.branches) == {"main", "v2", "refs/pr/1"}
    assert names["url"] == f"{hub.url}/tester/pruned"
    assert type(names["model"]).__name__ == type(names["dense"]).__name__ == "BertForSequenceClassification"
    assert hf_sparse.report("out/back").bytes == hf_sparse.report("out/dense").bytes
    assert AutoModelForSequenceClassification.from_pretrained("out/small").hf_quantizer is not None

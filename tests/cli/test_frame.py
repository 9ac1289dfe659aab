"""The frame around the commands: completion, the `hf` extension, progress, what cannot be streamed."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_sparse
from hf_sparse.cli.support import progress
from tests.test_cli import COMMANDS, Done, assert_refused, logits

Cli = Callable[..., Done]
SCRIPTS = Path(sys.executable).parent


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("hf-sparse ", COMMANDS), ("hf-sparse re", ("report",)), ("hf-sparse report --h", ("--html", "--help"))],
)
def test_the_shell_completes(cli: Cli, monkeypatch: pytest.MonkeyPatch, typed: str, offered: tuple[str, ...]) -> None:
    monkeypatch.setenv("_HF_SPARSE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split(" ")) - 1))
    done = cli()
    assert done.code == 0
    assert set(done.out.split()) == set(offered)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_that_a_shell_needs_is_shown(cli: Cli, monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    assert {"--install-completion", "--show-completion"} <= set(cli("--help").out.split())
    monkeypatch.setenv("_HF_SPARSE_COMPLETE", f"source_{shell}")
    done = cli()
    assert done.code == 0
    assert f"_HF_SPARSE_COMPLETE=complete_{shell}" in done.out
    if shell == "bash" and shutil.which("bash"):
        assert subprocess.run(["bash", "-n"], input=done.out, text=True).returncode == 0


@pytest.mark.skipif(
    not ((SCRIPTS / "hf").exists() and (SCRIPTS / "hf-sparse").exists()),
    reason="the scripts hf and hf-sparse are not installed beside this Python",
)
def test_as_an_extension_of_hf(small: Path, tmp_path: Path) -> None:
    # What `hf extensions install OWNER/hf-sparse` leaves behind.
    folder = tmp_path / ".local" / "share" / "hf" / "extensions" / "hf-sparse"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({
        "owner": "someone", "repo": "hf-sparse", "repo_id": "someone/hf-sparse", "short_name": "sparse",
        "executable_path": str(SCRIPTS / "hf-sparse"), "type": "python", "installed_at": "2026-01-01T00:00:00+00:00",
    }))  # fmt: skip
    env = {**os.environ, "HOME": str(tmp_path), "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(SCRIPTS / "hf"), "sparse", "report", str(small), "--json"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] == hf_sparse.report(small).bytes
    done = subprocess.run(
        [str(SCRIPTS / "hf"), "sparse", "report", str(tmp_path / "no")], env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "no does not exist" in done.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_to_who_watches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("compressing x", 100) as advance:
        advance(50)
    assert capsys.readouterr() == ("", "")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress("compressing x", 2_000_000) as advance:
        advance(1_000_000)
    assert "compressing x" in terminal.getvalue()
    assert "2.0/2.0 MB" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_what_cannot_be_streamed_is_loaded_and_it_is_said(cli: Cli, dense: Path, tmp_path: Path) -> None:
    expected = logits(dense)
    tensors = load_file(dense / "model.safetensors")
    # The names that checkpoints of 2018 have, which transformers still reads.
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
           for name, tensor in tensors.items()}  # fmt: skip
    assert old.keys() != tensors.keys()
    save_file(old, dense / "model.safetensors", {"format": "pt"})
    done = cli("compress", dense, tmp_path / "out")
    assert done.code == 0
    assert "are not stored, such as bert" in done.err
    assert "it is loaded as a whole." in done.err
    assert torch.allclose(logits(tmp_path / "out"), expected, atol=1e-6)
    assert hf_sparse.report(tmp_path / "out").bytes < hf_sparse.report(dense).bytes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold (a JSON|an) object, found a? ?list"),
        ('{"quantization_config": "x"}', "is quantized already, with 'x'"),
        ('{"quantization_config": {"quant_method": "gptq"}}', "is quantized already, with 'gptq'"),
    ],
)
def test_configs_that_are_none_of_ours(cli: Cli, dense: Path, tmp_path: Path, text: str, message: str) -> None:
    (dense / "config.json").write_text(text)
    assert_refused(cli("compress", dense, tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pipeline", "AutoTokenizer", "logging", "NoSuchModel", 3])
def test_nothing_but_a_model_is_made_of_a_name_in_a_file(cli: Cli, dense: Path, tmp_path: Path, name: object) -> None:
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    for command in (("compress", dense, tmp_path / "out"), ("plan", "--model", dense)):
        done = cli(*command)
        assert done.code == 1
        assert "names no architecture of transformers" in done.err


def test_other_files_than_safetensors_are_not_opened(cli: Cli, dense: Path, tmp_path: Path) -> None:
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    assert_refused(cli("compress", dense, tmp_path / "out"), "load the model with transformers and save it once")

"""The configurations for `accelerate launch`, and the launch lines of the docs, as accelerate itself reads them."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from hf_sparse.training.support import refuse_unsupported_engine
from tests.training.tiny import sparse_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))
DOCS = [ROOT / "docs" / "many_gpus.md", *CONFIGS]


def launch_lines() -> list[str]:
    lines = [line.lstrip("# ").strip() for path in DOCS for line in path.read_text().splitlines()]
    return [line for line in lines if line.startswith("accelerate launch")]


def environment_of(line: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `accelerate launch` would put into the environment of each rank."""
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(line)[2:] if word != "..."]
    args: Any = launch_command_parser().parse_args(words)
    args.config_file = str(ROOT / args.config_file) if args.config_file else str(ROOT / "missing.yaml")
    if not Path(args.config_file).exists():
        args.config_file = None
        monkeypatch.setattr("accelerate.commands.launch.default_config_file", "missing.yaml")
    args, _, _ = _validate_launch_command(args)
    assert args.multi_gpu or args.use_fsdp, "several processes"
    assert args.num_processes > 1
    return prepare_multi_gpu_env(args)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_one_that_accelerate_reads(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[path.stem]
    assert config.num_processes == 2


def test_there_is_a_line_for_each_config() -> None:
    assert {path.stem for path in CONFIGS} == {"ddp", "fsdp2"}
    for path in CONFIGS:
        assert any(f"examples/accelerate/{path.name}" in line for line in launch_lines())


@pytest.mark.parametrize("line", launch_lines())
def test_every_launch_line_starts_ranks_that_are_not_refused(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = environment_of(line, monkeypatch)
    for name, value in found.items():
        if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(name, value)
    if "fsdp2" in line:
        assert found["ACCELERATE_USE_FSDP"] == "true" and found["FSDP_VERSION"] == "2"
        assert os.environ["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
    else:
        assert found.get("ACCELERATE_USE_FSDP", "false") == "false"
    refuse_unsupported_engine(sparse_config(tmp_path))


def test_the_fsdp_line_for_torchrun_is_understood(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "many_gpus.md").read_text()
    line = re.search(r"torchrun .*--fsdp --fsdp_config '([^']*)'", text)
    assert line is not None
    from transformers import HfArgumentParser

    from hf_sparse import SparseDistillConfig

    parser: Any = HfArgumentParser(SparseDistillConfig)
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--fsdp", "--fsdp_config", line[1]]
    )
    assert args.fsdp_plugin_args["fsdp_version"] == 2
    assert args.fsdp_plugin_args["state_dict_type"] == "SHARDED_STATE_DICT"
    refuse_unsupported_engine(args)

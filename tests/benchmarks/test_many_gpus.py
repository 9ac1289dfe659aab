"""The benchmark of several GPUs: all of it runs on two ranks of the CPU, and what it should refuse it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks import many_gpus
from benchmarks.many_gpus import Waits, compare, engine_settings
from tests.distributed.launching import ROOT, free_port

TIMEOUT = 300


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_check_and_time_their_engines(tmp_path: Path) -> None:
    engines = ["ddp", "fsdp2"]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
        f"--master-port={free_port()}", "benchmarks/many_gpus.py", "--device", "cpu", "--smoke", "--out",
        str(tmp_path / "found.json"), "--engines", *engines,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["settings"]["ranks"] == 2 and found["settings"]["backend"] == "gloo" and found["commit"]
    assert [row["engine"] for row in found["rows"]] == engines
    wrapped = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPBertForSequenceClassification"}
    assert [row["wrapped"] for row in found["rows"]] == [wrapped[engine] for engine in engines]
    for row in found["rows"]:
        assert row["equal_on_ranks"] and row["masks_as_alone"] and 0.0 <= row["max_weight_error"] < 1e-3
        assert row["waits_of_hf_sparse"] is None, "only a GPU is waited for"
        assert row["ratio"] == pytest.approx(row["ours_ms"] / row["bare_ms"], rel=1e-3)
        assert row["ours_spread"][0] <= row["ours_ms"] <= row["ours_spread"][1]


def test_engines_that_do_not_fit_the_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="hsdp needs an even number of at least 4 ranks, there are 2"):
        engine_settings("hsdp", 2)
    parallelism = engine_settings("hsdp", 8)["parallelism_config"]
    assert (parallelism.dp_replicate_size, parallelism.dp_shard_size) == (2, 4)
    assert engine_settings("ddp", 2) == {}


def test_any_difference_ends_the_run() -> None:
    def results() -> dict[str, dict[str, torch.Tensor]]:
        return {"weights": {"a": torch.ones(4), "b": torch.zeros(3)}, "masks": {"a": torch.tensor([True, False])}}

    found = results()
    found["weights"]["a"][2] += 1e-6
    assert compare("ddp", found, results()) == pytest.approx(1e-6, rel=0.1)
    found["weights"]["b"][0] = 1e-3
    with pytest.raises(
        RuntimeError, match=r"ddp: 0 blocks are masked otherwise .*, and 1 weights differ: \{'b': 0\.001"
    ):
        compare("ddp", found, results())
    found = results()
    found["masks"]["a"][1] = True
    with pytest.raises(RuntimeError, match="fsdp2: 1 blocks are masked otherwise than by one process"):
        compare("fsdp2", found, results())


def test_it_says_how_to_start_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        many_gpus.main([])
    assert "start it with torchrun" in capsys.readouterr().err


def test_waits_are_laid_at_the_door_of_whoever_called_torch() -> None:
    waits, wait = Waits([0]), "import warnings\nwarnings.warn('called a synchronizing CUDA operation')"
    places = {name: ROOT / name for name in ("hf_sparse/training/made_up.py", "site/torch/nn.py", "site/other.py")}
    with pytest.warns(UserWarning, match="something else"), waits.listening():
        for place in places.values():
            exec(compile(wait, place, "exec"), {"__name__": "made_up"})
        warnings.warn("something else", stacklevel=1)
    assert waits.ours == {"made_up.py:<module>": 1}
    # The one that torch did is that of the test, which called it.
    here = "test_many_gpus.py:test_waits_are_laid_at_the_door_of_whoever_called_torch"
    assert waits.others == {"other.py:<module>": 1, here: 1}

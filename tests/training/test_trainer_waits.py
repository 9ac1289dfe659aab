"""Contract 9: between logs and mask updates, no code of ours waits for the device."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_sparse.training.distillation import distiller
from hf_sparse.training.distillation.graft import graft_sites
from tests.training.scenarios import ALL_ON, model_for
from tests.training.tiny import Watch, bert, make_trainer, rows

# What copies a tensor's value to Python or to the host, and so would wait for a GPU.
WAITING = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")


class Waits:
    """Counts calls that would wait, made by hf_sparse code itself: (name, file, function)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: Counter[tuple[str, str, str]] = Counter()
        self.watching = False
        for name in WAITING:
            monkeypatch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))
        # A tensor made from a Python number on a device is a copy that waits, too; filling one is not.
        for name in ("tensor", "as_tensor"):
            monkeypatch.setattr(torch, name, self._counted(name, getattr(torch, name)))

    def _counted(self, name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.watching:
                caller = sys._getframe(1)
                while "/torch/" in caller.f_code.co_filename and caller.f_back is not None:
                    caller = caller.f_back
                file = caller.f_code.co_filename
                if "/hf_sparse/" in file:
                    self.found[name, Path(file).name, caller.f_code.co_name] += 1
            return original(*args, **kwargs)

        return call


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # Weights on the CPU would take the native passes, which a GPU never does.
    monkeypatch.setenv("HF_SPARSE_BACKEND", "reference")


@pytest.mark.parametrize("task", ["classes", "tagging", "qa", "lm"])
@pytest.mark.parametrize("form", ["loss", "proximal"])
def test_steps_without_log_or_mask_update_never_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, form: str
) -> None:
    settings = {**ALL_ON, "penalty_form": form, "max_steps": 6, "sparsity_end": 0.9, "mask_updates": 2}
    trainer = make_trainer(model_for(task, 0), tmp_path, rows(task, 16), model_for(task, 5), **settings,
                           per_device_train_batch_size=2, gradient_accumulation_steps=4)  # fmt: skip
    waits, counted = Waits(monkeypatch), []

    def begin(state: Any) -> None:
        # The masks are chosen at steps 2 and 5; the coefficients are taken anew at 0 and 2.
        waits.watching = state.global_step in (1, 3, 4)

    def end(state: Any) -> None:
        if waits.watching:
            counted.append(state.global_step)
        waits.watching = False

    trainer.callback_handler.callbacks.insert(0, Watch(on_step_begin=begin, on_step_end=end))
    trainer.train()
    assert counted == [2, 4, 5]
    # The draws of grafting come from a generator on the CPU, whose numbers are there already.
    allowed = {("tolist", "schedules.py", "graft_draws")}
    assert {call: count for call, count in waits.found.items() if call not in allowed} == {}


def test_this_test_would_see_a_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits(monkeypatch)
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), sparsity=0.5, max_steps=1)
    waits.watching = True
    assert trainer.pruner.masks.sparsity == 0.0
    assert any(file == "masks.py" for _, file, _ in waits.found)


def test_layers_are_paired_once_and_not_in_every_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Walking over all modules of a model as deep as BERT-base takes milliseconds; its step on a GPU some 40.
    calls: list[Any] = []

    def counted(*models: Any) -> Any:
        calls.append(models)
        return graft_sites(*models)

    monkeypatch.setattr(distiller, "graft_sites", counted)
    trainer = make_trainer(bert(), tmp_path, rows("classes", 8), sparsity=0.5, graft_start=0.5, graft_end=1.0,
                           per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=6)  # fmt: skip
    trainer.train()
    # Once to check that the model can be grafted, once to graft.
    assert len(calls) == 2


def test_bookkeeping_costs_little_beside_the_models(tmp_path: Path) -> None:
    # A GPU step of a model as deep as BERT-base takes some 40 ms, of which the contract allows 5 %.
    model = bert(num_hidden_layers=12)
    trainer = make_trainer(model, tmp_path, rows("classes", 8), sparsity=0.5, graft_start=0.5, graft_end=1.0)
    device, taken = torch.device("cpu"), []
    for _ in range(20):
        start = time.process_time()
        trainer.distiller.hire(trainer.student, device)
        with trainer.distiller.grafted(trainer.student, trainer.plan, device):
            pass
        taken.append(time.process_time() - start)
    assert min(taken) < 2e-3, f"{min(taken) * 1e3:.1f} ms"

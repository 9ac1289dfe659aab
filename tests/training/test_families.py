"""The whole loop for each family: prune and distil with grafting and hidden states, save, load, same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_sparse import report
from hf_sparse.inference.compress import compressed_tensors
from tests.training.families import FAMILIES, family_batch, family_model, family_rows
from tests.training.tiny import make_trainer, pruned_zero

# t5 and gpt2 add dropout by default, as real runs do.
RUN = {"sparsity": 0.5, "sparsity_end": 0.6, "penalty_weight": 1e-3, "hidden_weight": 0.5, "graft_start": 0.5,
       "graft_end": 0.7, "max_steps": 4, "logging_strategy": "steps", "logging_steps": 1,
       "learning_rate": 1e-3}  # fmt: skip


def outputs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(**batch)
    return found.logits_per_image if "logits_per_image" in found else found.logits


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_train_save_load_gives_the_same_outputs(tmp_path: Path, name: str) -> None:
    data = family_rows(name)
    batch, model = family_batch(data), family_model(name)
    dense = outputs(model, batch)
    trainer = make_trainer(model, tmp_path / "run", data, extra={"data_collator": family_batch}, **RUN)
    trainer.train()
    assert pruned_zero(trainer)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    # At the first step the grafted layers are still exactly those of the teacher, but dropout moves what they get.
    assert all(torch.tensor(list(entry.values())).isfinite().all() for entry in logs)
    assert [entry["graft_prob"] for entry in logs][-1] == 1.0
    assert all(entry["loss_hidden"] >= 0 for entry in logs)
    trainer.save_model(tmp_path / "final")
    loaded, info = type(model).from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert set(compressed_tensors(loaded)[0]) == set(trainer.pruner.masks.targets)
    torch.testing.assert_close(outputs(loaded, batch), outputs(model, batch), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs(loaded, batch), dense, atol=1e-3), "the run changed the model"
    assert report(tmp_path / "final").sparsity == pytest.approx(trainer.pruner.masks.sparsity)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_hidden_states_of_grafted_layers_are_recorded(tmp_path: Path, name: str) -> None:
    # Every layer is the teacher's, a copy of the student: without dropout nothing can differ.
    model = family_model(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    data = family_rows(name)
    given = {"hidden_weight": 1.0, "attention_weight": 1.0, "graft_start": 0.0, "graft_end": 1.0, "sparsity": 0.0,
             "max_steps": 1}  # fmt: skip
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = make_trainer(model, tmp_path, data, extra={"data_collator": family_batch}, **given,
                           logging_strategy="steps", logging_steps=1)  # fmt: skip
    _without_dropout(model)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss_hidden"] == pytest.approx(0.0, abs=1e-9)
    assert logged["loss_attention"] == pytest.approx(0.0, abs=1e-9)
    stack = [key for key in before if any(key.startswith(n) for n in _stack_names(model))]
    assert stack
    assert all(torch.equal(before[key], model.state_dict()[key]) for key in stack), "no layer of the student ran"


def _stack_names(model: Any) -> list[str]:
    from hf_sparse.core.structure.targets import find_stacks

    return [f"{name}." for name in find_stacks(model)]


def _without_dropout(model: Any) -> None:
    for key, value in vars(model.config).items():
        if ("drop" in key or "pdrop" in key) and isinstance(value, float):
            setattr(model.config, key, 0.0)
    for module in model.modules():
        for key in ("dropout", "dropout_prob", "attention_dropout", "dropout_p"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)

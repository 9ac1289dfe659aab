"""Fused weights that stay dense, and everything that tells a size says so."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from hf_sparse import report
from hf_sparse.core.estimate import estimate
from hf_sparse.core.structure.fused import FusedWeights, fused_weights, is_fused
from tests.mixtures import gpt_oss
from tests.training.families import FAMILIES, family_model
from tests.training.tiny import make_trainer, rows

EXPERTS = [
    FusedWeights(
        name="model.layers.*.mlp.experts.gate_up_proj", shape=(4, 16, 64), count=2, bytes=2 * 4 * 64 * 16 * 4
    ),
    FusedWeights(name="model.layers.*.mlp.experts.down_proj", shape=(4, 32, 16), count=2, bytes=2 * 4 * 16 * 32 * 4),
]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_no_family_that_is_pruned_whole_has_any(name: str) -> None:
    assert fused_weights(family_model(name)) == []


def test_experts_laid_out_with_their_inputs_first_are_found() -> None:
    assert fused_weights(gpt_oss()) == EXPERTS


def test_heads_that_are_no_linears_are_found_too() -> None:
    config = tf.XLNetConfig(vocab_size=40, d_model=16, n_layer=2, n_head=2, d_inner=32)
    found = fused_weights(tf.XLNetForSequenceClassification(config))
    assert {kind.name for kind in found} >= {f"transformer.layer.*.rel_attn.{part}" for part in "qkvor"}
    assert {kind.count for kind in found} == {2}


def test_report_plan_and_log_tell_what_they_weigh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = gpt_oss()
    with caplog.at_level(logging.WARNING, logger="hf_sparse"):
        trainer = make_trainer(model, tmp_path / "run", rows("lm", 8), sparsity=0.5, max_steps=2)
    assert [r.getMessage() for r in caplog.records if "not pruned" in r.getMessage()] == list(map(str, EXPERTS))
    trainer.train()
    trainer.save_model(tmp_path / "final")
    for told in (report(model), report(tmp_path / "final"), estimate(model, (4, 1), 0.5)):
        assert sorted(map(str, told.not_pruned)) == sorted(map(str, EXPERTS))
        assert str(EXPERTS[0]) in str(told).splitlines()
    found: Any = report(tmp_path / "final").to_dict()["not_pruned"]
    assert sum(kind["bytes"] for kind in found) == sum(kind.bytes for kind in EXPERTS)
    assert "not_pruned" not in report(family_model("bert")).to_dict()


def test_only_tensors_of_three_dimensions_in_numbered_layers_are_taken_for_fused() -> None:
    assert is_fused("model.layers.0.mlp.experts.down_proj", (4, 2, 2))
    assert not is_fused("conv.0.weight", (4, 2, 2))
    assert not is_fused("encoder.positions", (1, 4, 2))
    assert not is_fused("model.layers.0.table", (4, 2))

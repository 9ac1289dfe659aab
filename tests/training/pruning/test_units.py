"""Feed-forward units: scored as one, pruned together, trained and saved; the "hybrid" preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_sparse.core.structure.feed_forward import FeedForward
from hf_sparse.training.pruning.units import tie_scores
from tests.training.families import family_batch, family_model, family_rows
from tests.training.tiny import bert, make_trainer, pruned_zero, rows


def units_kept(trainer: Any, name: str) -> torch.Tensor:
    return trainer.pruner.masks.masks[name].flatten()


@pytest.mark.parametrize(
    ("family", "importance"),
    [
        ("bert", "activation"),
        ("bert", "fisher"),
        ("llama", "fisher"),
        ("modernbert", "magnitude"),
        ("gpt2", "fisher"),
        ("t5", "activation"),
    ],
)
def test_units_are_removed_whole(tmp_path: Path, family: str, importance: str) -> None:
    model, data = family_model(family), family_rows(family)
    trainer = make_trainer(
        model, tmp_path, data, extra={"data_collator": family_batch}, preset="hybrid", block_height=4, block_width=4,
        sparsity=0.5, max_steps=3, importance=importance, penalty_weight=1e-3,
    )  # fmt: skip
    trainer.train()
    assert pruned_zero(trainer)
    assert trainer.pruner.parts
    inside = set()
    for part in trainer.pruner.parts:
        out = units_kept(trainer, part.out)
        assert int(out.sum()) == part.units // 2
        for name in part.into:
            assert torch.equal(
                units_kept(trainer, name).view(-1, part.units),
                out.expand(len(units_kept(trainer, name)) // part.units, -1),
            )
        inside |= {*part.into, part.out}
    tiles = {shape for name, shape in trainer.pruner.masks.block_shapes.items() if name not in inside}
    assert tiles == {(4, 4)}
    trainer.save_model(tmp_path / "final")
    loaded = type(model).from_pretrained(tmp_path / "final")
    batch = family_batch(data)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, model.eval()(**batch).logits, rtol=1e-4, atol=1e-5)


def test_a_unit_with_a_removed_output_computes_nothing_else(tmp_path: Path) -> None:
    # Without its units the layer gives what a layer of the kept units alone would give.
    model = bert()
    trainer = make_trainer(model, tmp_path, rows("classes", 8), preset="hybrid", block_height=4, block_width=4)
    trainer.train()
    layer = model.bert.encoder.layer[0]
    kept = units_kept(trainer, "bert.encoder.layer.0.output.dense")
    x = torch.randn(3, 16)
    small_in, small_out = torch.nn.Linear(16, int(kept.sum())), torch.nn.Linear(int(kept.sum()), 16)
    small_in.load_state_dict(
        {"weight": layer.intermediate.dense.weight[kept], "bias": layer.intermediate.dense.bias[kept]}
    )
    small_out.load_state_dict({"weight": layer.output.dense.weight[:, kept], "bias": layer.output.dense.bias})
    whole = layer.output.dense(torch.nn.functional.gelu(layer.intermediate.dense(x)))
    torch.testing.assert_close(whole, small_out(torch.nn.functional.gelu(small_in(x))))


def test_scores_of_a_unit_are_the_geometric_mean_of_its_members() -> None:
    torch.manual_seed(0)
    scores = {"gate": torch.rand(6, 1), "fused": torch.rand(12, 1), "down": torch.rand(1, 6), "q": torch.rand(2, 3)}
    tied = tie_scores(scores, [FeedForward(into=("gate", "fused"), out="down", units=6)])
    for u in range(6):
        members = [scores["gate"][u, 0], scores["fused"][u, 0], scores["fused"][6 + u, 0], scores["down"][0, u]]
        expected = float(torch.tensor(members).prod() ** 0.25)
        found = [tied["gate"][u, 0], tied["fused"][u, 0], tied["fused"][6 + u, 0], tied["down"][0, u]]
        assert [float(x) for x in found] == pytest.approx([expected] * 4, rel=1e-5)
    assert tied["q"] is scores["q"]
    assert list(tied) == list(scores)


def test_scaling_a_unit_against_itself_does_not_change_its_rank() -> None:
    scores = {"up": torch.tensor([[3.0], [2.0]]), "down": torch.tensor([[1.0, 2.0]])}
    part = FeedForward(into=("up",), out="down", units=2)
    scaled = {"up": scores["up"] * torch.tensor([[8.0], [1.0]]), "down": scores["down"] / torch.tensor([[8.0, 1.0]])}
    torch.testing.assert_close(tie_scores(scaled, [part])["up"], tie_scores(scores, [part])["up"])


def test_an_override_that_meets_a_unit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"intermediate.dense more than one shape"):
        make_trainer(bert(), tmp_path, rows("classes", 8), feed_forward="units",
                     block_overrides='{".*intermediate.dense": [4, 4]}')  # fmt: skip


def test_the_preset_sets_shapes_and_nothing_else() -> None:
    from hf_sparse.training.presets import PRESETS

    assert PRESETS["hybrid"] == {"block_height": 32, "block_width": 32, "feed_forward": "units"}

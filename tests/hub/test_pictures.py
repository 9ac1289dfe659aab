"""Maps, curves and the pictures made of them: what is drawn is what was recorded, and nothing else is drawn."""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from hf_sparse import FormatError, compress
from hf_sparse.hub.card import facts_from_folder, render_card, write_card
from hf_sparse.hub.facts import CardFacts, MetricFacts, PictureFacts
from hf_sparse.hub.history import curves, history_facts
from hf_sparse.hub.masks import MaskMap, lay_out, read_mask_maps
from hf_sparse.hub.plots import draw_masks, draw_pictures, draw_tradeoff, draw_training, save
from tests.hub.conftest import pruned_bert
from tests.hub.test_facts import FULL

# --- maps


def test_maps_are_those_of_the_masks(model_folder: Path) -> None:
    _, masks = pruned_bert(seed=0)
    maps = {found.name: found for found in read_mask_maps(model_folder)}
    assert maps.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(maps[name].cells, mask.float())
        assert maps[name].shape == (mask.shape[0] * 8, mask.shape[1])
        assert maps[name].density == pytest.approx(mask.float().mean().item())


def test_maps_of_a_dense_folder_count_what_is_not_zero(tmp_path: Path) -> None:
    model, masks = pruned_bert(seed=1)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    maps = {found.name: found for found in read_mask_maps(tmp_path)}
    assert maps.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(maps[name].cells, mask.float().repeat_interleave(8, 0))


def test_large_masks_are_averaged() -> None:
    mask = torch.zeros(96, 480, dtype=torch.bool)
    mask[:2, :5] = True
    found = MaskMap.of("q", (768, 480), mask)
    assert found.cells.shape == (48, 60)
    assert found.cells[0, 0] == 10 / 16
    assert found.cells.sum() == 10 / 16
    assert found.density == pytest.approx(10 / mask.numel())


def test_the_last_cells_may_hold_fewer_blocks() -> None:
    mask = torch.zeros(1, 65, dtype=torch.bool)
    mask[0, 63:] = True
    cells = MaskMap.of("q", (8, 65), mask).cells
    assert cells.shape == (1, 33)
    assert cells[0, -2:].tolist() == [0.5, 1.0]
    assert cells.sum() == 1.5


def test_layers_are_laid_out_in_their_order() -> None:
    ones = torch.ones(2, 2, dtype=torch.bool)
    names = [f"model.layers.{i}.{part}" for i in range(30) for part in ("attn.q", "mlp.up")]
    grid = lay_out([MaskMap.of(name, (2, 2), ones) for name in sorted(names)])
    assert grid.columns == ["attn.q", "mlp.up"]
    assert grid.left_out == 18
    numbers = [int(row.rpartition(".")[2]) for row in grid.rows]
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1], len(numbers)) == (0, 29, 12)
    assert [grid.label(row) for row in grid.rows] == [f"layers.{number}" for number in numbers]
    assert len(grid.maps) == 24


def test_maps_of_two_stacks_stay_apart() -> None:
    ones = torch.ones(2, 2, dtype=torch.bool)
    grid = lay_out([MaskMap.of(f"{stack}.block.0.{part}", (2, 2), ones)
                    for stack, part in (("encoder", "q"), ("decoder", "q"), ("decoder", "cross"))])  # fmt: skip
    assert grid.rows == ["decoder.block.0", "encoder.block.0"]
    assert [grid.label(row) for row in grid.rows] == grid.rows
    assert ("encoder.block.0", "cross") not in grid.maps
    assert len(grid.maps) == 3


def test_damaged_folders_are_refused(model_folder: Path) -> None:
    weights = model_folder / "model.safetensors"
    whole = (model_folder / "config.json").read_text()
    config = json.loads(whole)
    next(iter(config["quantization_config"]["modules"].values()))["dense_shape"] = [8, 16]
    next(iter(config["quantization_config"]["modules"].values()))["kept"] = 1
    (model_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FormatError, match=r"model\.safetensors: bert\..*weight_block_mask: a bitmap for a 1 x 16 grid"
    ):
        read_mask_maps(model_folder)
    (model_folder / "config.json").write_text(whole)
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(FormatError, match=r"model\.safetensors is not a whole"):
        read_mask_maps(model_folder)
    (model_folder / "config.json").write_text("{")
    with pytest.raises(FormatError, match=r"config\.json is not JSON"):
        read_mask_maps(model_folder)


# --- curves


def test_history_keeps_curves_and_nothing_else() -> None:
    log = [
        {"step": 2, "loss": 1.0, "loss_kd": 0.5, "sparsity": 0.1, "graft_prob": 0.5, "penalty": 0.0, "epoch": 0.1,
         "learning_rate": 1e-4, "grad_norm": 3.0},
        {"step": 2, "eval_accuracy": 0.7, "eval_runtime": 9.0, "eval_samples_per_second": 4.0, "epoch": 0.1},
        {"step": 4, "loss": float("nan"), "loss_kd": 0.25, "sparsity": 0.2},
        {"step": 4, "train_runtime": 3.0, "train_loss": 0.6},
    ]  # fmt: skip
    first, second = history_facts(log)
    assert first == {"step": 2, "loss": 1.0, "loss_kd": 0.5, "sparsity": 0.1, "graft_prob": 0.5, "penalty": 0.0,
                     "eval_accuracy": 0.7}  # fmt: skip
    assert second == {"step": 4, "loss_kd": 0.25, "sparsity": 0.2}
    assert CardFacts.from_dict({"name": "x", "save_format": "dense", "history": [first, second]}).history[1] == second


def test_a_long_history_is_thinned_but_keeps_its_ends_and_evaluations() -> None:
    log = [{"step": i, "loss": 1.0 / i} for i in range(1, 5001)] + [{"step": 777, "eval_f1": 0.5}]
    rows = history_facts(log)
    assert len(rows) <= 200
    assert (rows[0]["step"], rows[-1]["step"]) == (1, 5000)
    assert {"step": 777, "loss": 1.0 / 777, "eval_f1": 0.5} in rows


def test_the_loss_of_evaluations_is_not_taken_for_that_of_training() -> None:
    rows = [{"step": i, "loss": 1.0 / i, "eval_loss": 2.0 / i, "eval_f1": 0.5} for i in (1, 2)]
    assert curves(rows) == {
        "losses": {"eval_loss": [(1, 2.0), (2, 1.0)], "loss": [(1, 1.0), (2, 0.5)]},
        "evaluation": {"f1": [(1, 0.5), (2, 0.5)]},
    }
    figure, _ = draw_training(rows)
    labels = [line.get_label() for axes in figure.axes for line in axes.get_lines()]
    assert labels == ["eval_loss", "loss", "f1"]


def test_curves_without_a_line_are_no_chart() -> None:
    rows = [{"step": 1, "loss": 2.0, "penalty": 0.0, "eval_f1": 0.5}, {"step": 2, "loss": 1.0, "penalty": 0.0}]
    assert curves(rows) == {"losses": {"loss": [(1, 2.0), (2, 1.0)]}}
    assert curves([]) == {}


# --- pictures


def test_the_picture_of_masks_shows_the_masks(tmp_path: Path) -> None:
    half = torch.zeros(48, 48, dtype=torch.bool)
    half[:24] = True
    figure, alt = draw_masks(lay_out([MaskMap.of("layer.0.q", (48, 48), half)]))
    assert alt == "Where the weights of 1 layers survived: 50.0% of each is kept"
    save(figure, tmp_path / "x.png")
    pixels = torch.from_numpy(imread(tmp_path / "x.png"))[..., :3].mean(-1)
    # The panel, as `draw_masks` places it: dark where weights are, light where they are gone.
    height, width = pixels.shape
    inch = 110
    left, top = round(1.0 * inch), round(0.95 * inch + 6 / 54 * 1.25 * inch)
    upper = pixels[top + 10 : top + 50, left + 10 : left + 100].float()
    lower = pixels[top + 70 : top + 110, left + 10 : left + 100].float()
    assert upper.mean() < 0.4 < 0.9 < lower.mean()
    assert (height, width) == (round(2.35 * inch), round(5.8 * inch))


def test_pictures_are_the_same_bytes_again(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert draw_pictures(model_folder, FULL, tmp_path / "a") == draw_pictures(model_folder, FULL, tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["masks.png", "tradeoff.png", "training.png"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_lines_are_the_recorded_numbers() -> None:
    figure, alt = draw_training(FULL.history)
    drawn = {line.get_label(): line.get_xydata().tolist() for axes in figure.axes for line in axes.get_lines()}
    assert drawn == {"sparsity": [[10, 0.25], [20, 0.75]], "loss": [[10, 1.5], [20, 0.75]],
                     "accuracy": [[10, 0.5], [20, 0.9125]]}  # fmt: skip
    assert alt == "Training over 20 steps: sparsity and grafting, losses, evaluation"


def test_points_are_the_recorded_numbers() -> None:
    figure, alt = draw_tradeoff(FULL)
    points = [line.get_xydata()[0].tolist() for axes in figure.axes for line in axes.get_lines()]
    assert points == [[2.5, 0.92], [1.0, 0.9125], [12.0, 0.92], [3.217, 0.9125]]
    assert alt == "The pruned and the dense model: accuracy against size of the weights file and latency"


@pytest.mark.parametrize(
    "absent",
    [{"metrics": ()}, {"metrics": (MetricFacts(type="f1", value=0.5),)}, {"dense_file_bytes": None, "latency": ()}],
)
def test_what_was_not_measured_of_both_models_is_not_drawn(tmp_path: Path, absent: dict) -> None:
    pictures = draw_pictures(tmp_path, replace(FULL, **absent), tmp_path)
    assert [picture.file for picture in pictures] == ["training.png"]
    assert draw_pictures(tmp_path, CardFacts(name="x", save_format="dense"), tmp_path) == ()


def test_without_matplotlib_the_log_says_so_and_the_card_keeps_what_is_there(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_card(model_folder, FULL)
    assert [x.file for x in facts_from_folder(model_folder).pictures] == ["masks.png", "training.png", "tradeoff.png"]
    (model_folder / "training.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.WARNING):
        write_card(model_folder, facts_from_folder(model_folder))
    assert "pip install 'hf-sparse[plots]'" in caplog.text
    facts = facts_from_folder(model_folder)
    # What a measurement since then may have changed is gone.
    assert [x.file for x in facts.pictures] == ["masks.png"]
    assert not (model_folder / "tradeoff.png").exists()
    assert (model_folder / "README.md").read_text(encoding="utf-8") == render_card(facts)


def test_a_card_without_its_model_keeps_its_maps(model_folder: Path, tmp_path: Path) -> None:
    write_card(model_folder, FULL)
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("hf_sparse_card.json", "masks.png"):
        (alone / name).write_bytes((model_folder / name).read_bytes())
    write_card(alone, facts_from_folder(alone))
    assert facts_from_folder(alone) == facts_from_folder(model_folder)
    assert (alone / "masks.png").read_bytes() == (model_folder / "masks.png").read_bytes()
    assert (alone / "README.md").read_text() == (model_folder / "README.md").read_text()


def test_a_model_without_zeros_has_no_picture_of_them(tmp_path: Path) -> None:
    model, masks = pruned_bert(seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    compress(model, {name: torch.ones_like(mask) for name, mask in masks.items()}).save_pretrained(tmp_path)
    assert draw_pictures(tmp_path, CardFacts(name="x", save_format="dense"), tmp_path) == ()


def test_captions_cannot_break_out_of_the_image() -> None:
    card = render_card(replace(FULL, pictures=(PictureFacts(file="a.png", alt="x](evil) <b>"),)))
    assert "![x&#93;(evil) &lt;b&gt;](a.png)" in card

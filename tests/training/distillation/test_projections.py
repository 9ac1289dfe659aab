"""Teachers of another width and depth: learned projections and layer maps, by hand and resumed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from hf_sparse import FormatError
from hf_sparse.training.distillation.distill import hidden_loss
from hf_sparse.training.distillation.layerwise import check_sides, compared_layers, depths, resolve_layer_map
from hf_sparse.training.distillation.projections import FILE, HiddenProjections, needed_projections
from tests.training.families import family_model
from tests.training.tiny import assert_same, bert, llama, make_trainer, pad, rows, stirred, t5, weights_of

WIDE = {"hidden_size": 24, "num_hidden_layers": 4}
RUN = {"sparsity": 0.5, "kd_weight": 0.5, "hidden_weight": 0.7, "hidden_form": "mse",
       "layer_map": "uniform", "max_steps": 4,
       "save_strategy": "steps", "save_steps": 2, "logging_strategy": "steps", "logging_steps": 1}  # fmt: skip


def by_hand(student: Any, teacher: Any, weight: torch.Tensor, inputs: Any, layers: list[int]) -> torch.Tensor:
    with torch.no_grad():
        theirs = teacher.eval()(**inputs, output_hidden_states=True).hidden_states
    mine = student(**inputs, output_hidden_states=True).hidden_states
    mask, total = inputs["attention_mask"], torch.zeros(())
    for own, other in [(0, 0), *((i + 1, layer + 1) for i, layer in enumerate(layers))]:
        error = (mine[own] @ weight.T - theirs[other]).square().mean(-1)
        total = total + ((error * mask).sum(1) / mask.sum(1)).mean()
    return total


def test_the_loss_and_the_step_of_a_projection_are_those_by_hand(tmp_path: Path) -> None:
    data, (student, teacher) = rows("classes", 8), (bert(0), bert(5, **WIDE))
    weight = HiddenProjections({"": (16, 24)}, seed=11).get("").weight.detach().clone().requires_grad_()
    loss = by_hand(bert(0), bert(5, **WIDE), weight, pad(data), [1, 3])
    (0.7 * loss).backward()
    given = {**RUN, "sparsity": 0.0, "max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "save_strategy": "no"}
    trainer = make_trainer(student, tmp_path, data, teacher, **given)
    trainer.train()
    assert trainer.state.log_history[0]["loss_hidden"] == pytest.approx(loss.item(), rel=1e-5)
    moved = trainer.distiller.projections.get("").weight
    torch.testing.assert_close(moved.detach(), (weight - 0.1 * weight.grad).detach())


def test_micro_batches_do_not_change_a_projection(tmp_path: Path) -> None:
    found = []
    for per_device, accumulate in ((8, 1), (2, 4)):
        trainer = make_trainer(
            bert(0), tmp_path, rows("classes", 24), bert(5, **WIDE), **{**RUN, "save_strategy": "no", "max_steps": 3},
            optim="sgd", per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulate,
        )  # fmt: skip
        trainer.train()
        found.append(trainer.distiller.projections.get("").weight.detach())
    torch.testing.assert_close(found[0], found[1])
    assert not torch.equal(found[0], HiddenProjections({"": (16, 24)}, seed=11).get("").weight)


def test_a_resumed_run_equals_straight_through_and_the_model_holds_none(tmp_path: Path) -> None:
    runs = []
    for folder in (tmp_path / "straight", tmp_path / "again"):
        trainer = make_trainer(bert(0), folder, rows("classes", 20), bert(5, **WIDE), **RUN)
        resumed = None if folder.name == "straight" else str(tmp_path / "straight" / "checkpoint-2")
        trainer.train(resume_from_checkpoint=resumed)
        runs.append((weights_of(trainer.student), weights_of(trainer.distiller.projections)))
    assert_same(runs[0][0], runs[1][0])
    assert_same(runs[0][1], runs[1][1])
    trainer.save_model(tmp_path / "final")
    assert not (tmp_path / "final" / FILE).exists()
    assert set(load_file(tmp_path / "straight" / "checkpoint-2" / FILE)) == {"layers.weight"}
    loaded, info = type(trainer.student).from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]


def test_checkpoints_without_projections_or_with_others_are_refused(tmp_path: Path) -> None:
    maps = HiddenProjections({"": (4, 6)}, seed=0)
    with pytest.raises(ValueError, match=f"holds no {FILE}, but the teacher is of another width"):
        maps.load(tmp_path)
    save_file({"layers.weight": torch.ones(5, 4)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="does not fit the teacher"):
        maps.load(tmp_path)
    (tmp_path / FILE).write_bytes(b"no")
    with pytest.raises(FormatError, match="is damaged"):
        maps.load(tmp_path)
    maps.save(tmp_path)
    other = HiddenProjections({"": (4, 6)}, seed=1)
    other.load(tmp_path)
    assert_same(weights_of(maps), weights_of(other))


def test_a_seed_makes_the_same_maps_and_draws_nothing_from_the_run() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, second, other = (HiddenProjections({"": (64, 32)}, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_same(weights_of(first), weights_of(second))
    assert not torch.equal(first.get("").weight, other.get("").weight)
    states = torch.randn(1000, 64)
    assert first.get("")(states).square().mean().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(("student", "teacher", "expected"), [
    (lambda: bert(), lambda: bert(5), None),
    (lambda: llama(), lambda: llama(5, hidden_size=24), {"layers": (24, 16)}),
    (lambda: t5(), lambda: t5(5, d_model=24), {"encoder": (24, 16), "decoder": (24, 16)}),
    (lambda: family_model("clip"), lambda: family_model("clip", 5), None),
    (lambda: torch.nn.Linear(2, 2), lambda: bert(), None),
])  # fmt: skip
def test_projections_are_made_where_widths_differ(student: Any, teacher: Any, expected: Any) -> None:
    found = needed_projections(student(), teacher(), 0)
    shapes = None if found is None else {name: tuple(linear.weight.shape) for name, linear in found.items()}
    assert shapes == expected


def test_each_side_of_an_encoder_decoder_has_its_own(tmp_path: Path) -> None:
    trainer = make_trainer(t5(0), tmp_path, rows("seq2seq", 8), t5(5, d_model=24, num_layers=4, num_decoder_layers=3),
                           **{**RUN, "save_strategy": "no", "logging_strategy": "no"})  # fmt: skip
    before = weights_of(trainer.distiller.projections)
    trainer.train()
    after = weights_of(trainer.distiller.projections)
    assert all((after[name] != value).any() for name, value in before.items()) and len(after) == 2


def test_layers_are_paired_as_the_map_says() -> None:
    mine, theirs = [torch.randn(2, 3, 4) for _ in range(3)], [torch.randn(2, 3, 4) for _ in range(5)]
    student, teacher = SimpleNamespace(hidden_states=mine), SimpleNamespace(hidden_states=theirs)
    for layers, pairs in (("uniform", [(0, 0), (1, 2), (2, 4)]), ([None, 0], [(0, 0), (2, 1)])):
        (side,) = compared_layers(student, teacher, {}, "hidden_states", "hidden_weight", layers)
        expected = sum((mine[a] - theirs[b]).square().mean(-1).mean().item() for a, b in pairs)
        assert hidden_loss(side.student, side.teacher, form="mse").item() == pytest.approx(expected, rel=1e-5)
    maps = SimpleNamespace(attentions=mine[:2]), SimpleNamespace(attentions=theirs[:4])
    (side,) = compared_layers(*maps, {}, "attentions", "attention_weight", "uniform")
    assert [x is y for x, y in zip(side.teacher, (theirs[1], theirs[3]), strict=True)] == [True, True]


@pytest.mark.parametrize(("own", "other", "expected"), [
    (6, 12, [1, 3, 5, 7, 9, 11]), (3, 12, [3, 7, 11]), (4, 6, [0, 2, 3, 5]), (2, 2, [0, 1]), (4, 2, [0, 0, 0, 1]),
])  # fmt: skip
def test_uniform_ends_at_the_last_layer(own: int, other: int, expected: list[int]) -> None:
    assert resolve_layer_map("uniform", own, other) == expected


def test_shared_layers_count_each_time_they_run() -> None:
    assert depths(family_model("albert")) == {"": 2}


@pytest.mark.parametrize(("model", "sides"), [
    (lambda: bert(), {"": 2}),
    (lambda: t5(num_layers=2, num_decoder_layers=3), {"encoder": 2, "decoder": 3}),
    (lambda: family_model("bart"), {"encoder": 2, "decoder": 2}),
    (lambda: family_model("whisper"), {"encoder": 2, "decoder": 2}),
    (lambda: family_model("clip"), {"text": 2, "vision": 2}),
    (lambda: family_model("wav2vec2"), {"": 2}),
])  # fmt: skip
def test_the_sides_of_a_model_are_named(model: Any, sides: dict[str, int]) -> None:
    assert depths(model()) == sides


def bart(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    settings = {"vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32,
                "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0,
                "max_position_embeddings": 32, "pad_token_id": 0, "decoder_start_token_id": 1, **changes}  # fmt: skip
    return stirred(BartForConditionalGeneration(BartConfig(**settings)))


def states(model: Any, inputs: Any, kind: str) -> dict[str, Any]:
    found = model(**inputs, output_hidden_states=True, output_attentions=True)
    return {side: found[f"{side}_{kind}"] for side in ("encoder", "decoder")}


@pytest.mark.parametrize("kind", ["hidden_states", "attentions"])
@pytest.mark.parametrize(("make", "deep"), [
    (t5, {"num_layers": 4, "num_decoder_layers": 3}), (bart, {"encoder_layers": 4, "decoder_layers": 3}),
])  # fmt: skip
@pytest.mark.parametrize(("layers", "pairs"), [
    ('{"encoder": [3, 1], "decoder": "uniform"}', {"encoder": [(0, 3), (1, 1)], "decoder": [(0, 0), (1, 2)]}),
    ('{"encoder": [null, null], "decoder": [null, 2]}', {"encoder": [], "decoder": [(1, 2)]}),
])  # fmt: skip
def test_each_side_has_a_map_of_its_own(
    make: Any, deep: dict[str, int], layers: str, pairs: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    student, teacher, data = make(0), make(5, **deep), rows("seq2seq", 8)
    weights = {"hidden_weight": 0.7} if kind == "hidden_states" else {"attention_weight": 0.7}
    given = {**RUN, "hidden_weight": 0.0, **weights, "layer_map": layers, "max_steps": 1, "save_strategy": "no"}
    trainer = make_trainer(student, tmp_path, data, teacher, **{**given, "sparsity": 0.0})
    for model in (trainer.student, trainer.distiller.teacher):
        model.set_attn_implementation("eager")
    batch, expected = pad(data), 0.0
    with torch.no_grad():
        mine, theirs = (states(model.eval(), batch, kind) for model in (trainer.student, trainer.distiller.teacher))
    real = {"encoder": batch["attention_mask"].bool(), "decoder": batch["labels"] != -100}
    first = int(kind == "hidden_states")
    for side, mask in real.items():
        for own, other in [*([(0, 0)] if first else []), *((a + first, b + first) for a, b in pairs[side])]:
            error = (mine[side][own] - theirs[side][other]).square()
            error = error.mean(-1) if first else error.mean(1)
            counts = mask if first else mask[:, :, None] & mask[:, None, :]
            expected += sum(e[c].mean().item() for e, c in zip(error, counts, strict=True)) / len(data)
    trainer.train()
    told = trainer.state.log_history[0]["loss_hidden" if first else "loss_attention"]
    assert told == pytest.approx(expected, rel=1e-4)


def test_sides_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    deep, by_side = bert(5, num_hidden_layers=4), '{"encoder": [1, 3], "decoder": [1, 3]}'
    message = "layer_map names encoder, decoder, but the model has one stack of layers: give a list for each side that"
    for teacher in (deep, None):
        with pytest.raises(ValueError, match=message):
            make_trainer(bert(0), tmp_path, rows("classes", 8), teacher, **{**RUN, "layer_map": by_side})
    wanted = r"names encoder, but the model has the sides encoder, decoder"
    with pytest.raises(ValueError, match=wanted):
        make_trainer(t5(0), tmp_path, rows("seq2seq", 8), t5(5), **{**RUN, "layer_map": '{"encoder": [0, 1]}'})
    given = {**RUN, "layer_map": '{"encoder": [0, 1], "decoder": [0, 1, 2]}'}
    with pytest.raises(ValueError, match=r"layer_map has 3 entries, the decoder 2 layers: .* or a list for each side"):
        make_trainer(t5(0), tmp_path, rows("seq2seq", 8), t5(5), **given)
    given["layer_map"] = '{"encoder": [0, 3], "decoder": [0, 1]}'
    with pytest.raises(ValueError, match=r"names teacher layer 3, the encoder of the teacher has layers 0 to 1"):
        make_trainer(t5(0), tmp_path, rows("seq2seq", 8), t5(5), **given)
    check_sides({"text": [0], "vision": "uniform"}, {"text": 1, "vision": 4})
    with pytest.raises(ValueError, match="names encoder, and not the one stack of layers there is"):
        resolve_layer_map({"encoder": [0]}, 1, 1)


def tokenizer_of(words: str) -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(words.split())}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="a")))


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    bert(5).save_pretrained(tmp_path / "teacher")
    given = {"extra": {"processing_class": tokenizer_of("a b c")}}
    make_trainer(bert(0), tmp_path, rows("classes", 8), tmp_path / "teacher", **given)
    tokenizer_of("a b c").save_pretrained(tmp_path / "teacher")
    make_trainer(bert(0), tmp_path, rows("classes", 8), tmp_path / "teacher", **given)
    tokenizer_of("a c b").save_pretrained(tmp_path / "teacher")
    message = (
        r"teacher_model reads other tokens: 'b' is 1 for the trainer's tokenizer and 2 for that of .*, and 2 tokens"
    )
    for teacher in (str(tmp_path / "teacher"), type(bert(0)).from_pretrained(tmp_path / "teacher")):
        with pytest.raises(ValueError, match=message):
            make_trainer(bert(0), tmp_path, rows("classes", 8), teacher, **given)
        make_trainer(bert(0), tmp_path, rows("classes", 8), teacher, **given, kd_weight=0.0)


def test_a_padded_embedding_of_the_same_tokenizer_is_cut_as_the_refusal_says(tmp_path: Path) -> None:
    teacher = llama(5, vocab_size=48)
    with pytest.raises(ValueError, match="vocab_size is 40 in the model and 48 .* call teacher.resize_token_emb"):
        make_trainer(llama(0), tmp_path, rows("lm", 8), teacher)
    teacher.resize_token_embeddings(40)
    make_trainer(llama(0), tmp_path, rows("lm", 8), teacher, max_steps=1).train()

"""FSDP2 on 2 and 4 ranks, whose shards cut through blocks, compared with one rank that trains alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sparse import load_dense
from hf_sparse.training.distributed.shards import parts_of_shard
from tests.distributed.fsdp_settings import RUN
from tests.distributed.launching import launched_once
from tests.mixtures import mixture
from tests.training.scenarios import everything_on
from tests.training.tiny import assert_same, bert, gradients_of, make_trainer, pad, rows, weights_of

pytestmark = pytest.mark.dist
LAYERS = 2


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    return launched_once("fsdp_ranks.py", 2, tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    return launched_once("fsdp_ranks.py", 4, tmp_path_factory)


# Four ranks on the two cores of most machines take a minute; test_traffic.py has four of them in any case.
@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)], scope="module")
def launched(request: pytest.FixtureRequest) -> tuple[Path, list[dict[str, Any]]]:
    return request.getfixturevalue({2: "two", 4: "four"}[request.param])


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor], where: str, rtol: float = 2e-4) -> None:
    assert list(first) == list(second), f"{where}: not the same parameters"
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, rtol=rtol, atol=2e-6, msg=lambda m, n=name: f"{where} {n}: {m}"
        )


def test_the_models_are_sharded_and_the_shards_cut_through_blocks(launched: Any) -> None:
    for rank, seen in enumerate(launched[1]):
        setting = seen["setting"]
        assert (setting["world_size"], setting["rank"]) == (len(launched[1]), rank)
        assert setting["class"] == "FSDPBertForSequenceClassification"
        assert all(setting["sharded"]) and setting["teacher_sharded"]
        # query, key, value and the two linears after them have 16 rows, one block high.
        assert setting["cut"] >= 5 * LAYERS


@pytest.mark.parametrize(
    ("count", "case"),
    [("two", "classes 1"), ("two", "lm 1"), ("two", "gpt2 1"), ("two", "classes 2"), ("four", "classes 1"),
     ("four", "gpt2 1")],
)  # fmt: skip
def test_gradients_masks_and_logs_are_those_of_one_rank(
    request: pytest.FixtureRequest, tmp_path: Path, count: str, case: str
) -> None:
    launched = request.getfixturevalue(count)
    changes = launched[1][0]["invariance"][case]["changes"]
    alone = everything_on(case.split()[0], tmp_path, 8, 1, logging_strategy="steps", logging_steps=1, **changes)
    whole = gradients_of(alone)
    logs = [entry for entry in alone.state.log_history if "loss" in entry]
    for seen in launched[1]:
        found = seen["invariance"][case]
        for step, (first, second) in enumerate(zip(whole, found["gradients"], strict=True)):
            assert_close(first, second, f"step {step}")
        for mine, theirs in zip(logs, found["logs"], strict=True):
            assert mine == pytest.approx(theirs, rel=2e-4)
        assert_same(alone.pruner.masks.state_dict(), found["masks"])
        assert_close(weights_of(alone.model), found["weights"], "weights")


@pytest.mark.parametrize("name", ["loss", "proximal", "activation", "fisher", "global", "grafted"])
def test_whole_runs_end_as_on_one_rank(two: Any, tmp_path: Path, name: str) -> None:
    run = {**RUN, **two[1][0]["whole_runs"][name]["changes"]}
    alone = make_trainer(bert(), tmp_path, rows("classes", 32), **run)
    alone.train()
    for seen in two[1]:
        found = seen["whole_runs"][name]
        assert found["zero"] == [True] * 6, "pruned blocks are zero after every step"
        assert_same(alone.pruner.masks.state_dict(), found["masks"])
        assert_close(alone.pruner.coefs, found["coefs"], "coefficients", rtol=2e-3)
        # Adam divides by the size of gradients: where those are all but zero, rounding moves weights.
        for key, weight in weights_of(alone.model).items():
            torch.testing.assert_close(found["weights"][key], weight, rtol=2e-3, atol=2e-4)
    assert any(not mask.all() for mask in alone.pruner.masks.masks.values())


@pytest.mark.parametrize("kind", ["sharded", "full"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_two_ranks_resume_bit_for_bit(two: Any, kind: str, stop: int) -> None:
    for seen in two[1]:
        assert_same(seen["resume"][kind]["straight"], seen["resume"][kind]["resumed"][stop])


def test_four_ranks_resume_bit_for_bit(four: Any) -> None:
    for seen in four[1]:
        assert_same(seen["resume"]["sharded"]["straight"], seen["resume"]["sharded"]["resumed"][3])


def test_checkpoints_hold_shards_or_a_whole_model(two: Any) -> None:
    sharded, full = (two[0] / "resume" / kind / "straight" / "checkpoint-3" for kind in ("sharded", "full"))
    assert {file.name for file in (sharded / "pytorch_model_fsdp_0").iterdir()} == {
        ".metadata", "__0_0.distcp", "__1_0.distcp",
    }  # fmt: skip
    assert not (sharded / "model.safetensors").exists()
    dense = type(bert()).from_pretrained(full)
    assert set(dense.state_dict()) == set(bert().state_dict())
    assert all((folder / "sparsity_state.safetensors").is_file() for folder in (sharded, full))


def test_the_final_save_is_gathered_and_compressed(two: Any) -> None:
    folder, seen = two
    final = folder / "saving" / "final"
    loaded = type(bert()).from_pretrained(final).eval()
    assert loaded.config.quantization_config.quant_method == "hf_sparse"
    assert loaded.config.architectures == ["BertForSequenceClassification"]
    assert "pipeline_tag: text-classification" in (final / "README.md").read_text()
    fresh, inputs = bert().eval(), pad(rows("classes", 16))
    for rank in seen:
        mine = rank["saving"]
        assert mine["applied"]
        assert int(mine["best"].rsplit("-", 1)[1]) >= 2, "the target is reached in the second step"
        assert_same(seen[0]["saving"]["weights"], mine["weights"])
        fresh.load_state_dict(mine["weights"], strict=False)
        with torch.no_grad():
            outputs = fresh(**inputs)
            torch.testing.assert_close(loaded(**inputs).logits, outputs.logits, rtol=1e-5, atol=1e-6)
            assert mine["eval_loss"] == pytest.approx(outputs.loss.item(), rel=1e-4)
            assert mine["teacher_loss"] == pytest.approx(bert()(**inputs).loss.item(), rel=1e-4)
    assert not list(final.glob(".saving-*"))


def test_checkpointing_does_not_change_the_result(two: Any) -> None:
    for seen in two[1]:
        plain = seen["options"]["plain"]
        for name in ("checkpointing", "checkpointing_of_model"):
            found = {key.replace("_checkpoint_wrapped_module.", ""): w for key, w in seen["options"][name].items()}
            assert set(found) == set(plain)
            for key, weight in plain.items():
                torch.testing.assert_close(found[key], weight, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["plain", "bf16", "checkpointing", "checkpointing_of_model"])
def test_every_option_saves_a_model_that_loads(two: Any, name: str) -> None:
    loaded = type(bert()).from_pretrained(two[0] / "options" / name / "final").eval()
    fresh = bert().eval()
    weights = two[1][0]["options"][name]
    plain = {key.replace("_checkpoint_wrapped_module.", ""): weight for key, weight in weights.items()}
    assert {weight.dtype for weight in plain.values()} == {torch.float32}
    fresh.load_state_dict(plain)
    inputs = pad(rows("classes", 8))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, fresh(**inputs).logits, rtol=1e-5, atol=1e-6)


def test_a_model_that_only_rank_0_has_loaded_teaches_on_all_ranks(two: Any) -> None:
    for seen in two[1]:
        assert_same(seen["options"]["plain"], seen["options"]["efficient"])


def test_what_cannot_be_right_is_refused_on_every_rank(two: Any) -> None:
    for seen in two[1]:
        assert "ended off target" in seen["refusals"]["off_target"]
        assert "which FSDP2 does not shard. Launch with DDP" in seen["refusals"]["projections"]
        assert "sharded before a teacher could be copied" in seen["refusals"]["late_teacher"]


@pytest.mark.parametrize(
    ("name", "optimizer", "made", "stepped"),
    # Known when the trainer is made, when training begins, or only once it has been tried.
    [("named", "optim='sgd'", False, 0), ("class", "SGD", False, 0), ("own", "SGD", True, 0),
     ("untried", "WantsMore", True, 1)],
)  # fmt: skip
def test_fisher_information_without_second_moments_is_refused_as_early_as_it_is_known(
    two: Any, name: str, optimizer: str, made: bool, stepped: int
) -> None:
    for seen in two[1]:
        error, *when = seen["refusals"]["fisher"][name]
        assert f"importance='fisher' under FSDP2 reads the second moments that Adam keeps, and {optimizer} " in error
        assert "use optim='adamw_torch', importance='magnitude' or 'activation', or DDP" in error
        assert when == [made, stepped]
        assert seen["refusals"]["fisher"]["unneeded"] == ("", True, RUN["max_steps"])


@pytest.mark.parametrize("size", [(12, 6), (10, 4), (1, 9)])
@pytest.mark.parametrize("block_shape", [(1, 1), (4, 1), (4, 3), (12, 5), (7, 2)])
def test_parts_cover_a_shard_once_and_know_their_blocks(size: tuple[int, int], block_shape: tuple[int, int]) -> None:
    height, width = block_shape
    for offset in ((0, 0), (3, 0), (4, 0), (0, 5), (11, 7), (24, 0)):
        seen = torch.zeros(size, dtype=torch.long)
        for part in parts_of_shard(offset, size, block_shape):
            seen[part.rows, part.cols] += 1
            assert part.shape[0] <= height and part.shape[1] <= width
            rows_in = range(part.rows.start, part.rows.stop)
            cols_in = range(part.cols.start, part.cols.stop)
            blocks = {
                ((offset[0] + r) // height, (offset[1] + c) // width): 0 for r in rows_in for c in cols_in
            }  # fmt: skip
            grid = {
                (r, c)
                for r in range(part.grid_rows.start, part.grid_rows.stop)
                for c in range(part.grid_cols.start, part.grid_cols.stop)
            }
            assert set(blocks) == grid
            assert len(rows_in) == part.shape[0] * (part.grid_rows.stop - part.grid_rows.start)
            assert len(cols_in) == part.shape[1] * (part.grid_cols.stop - part.grid_cols.start)
        assert (seen == 1).all()
    assert parts_of_shard((4, 0), (0, 6), block_shape) == ()


def test_a_mixture_whose_experts_the_ranks_share_ends_as_on_one_rank(two: Any, tmp_path: Path) -> None:
    folder, ranks = two
    alone = make_trainer(mixture("mixtral"), tmp_path, rows("lm", 16), **ranks[0]["mixture_of_experts"]["run"])
    alone.train()
    for seen in (rank["mixture_of_experts"] for rank in ranks):
        assert {shape[0] for shape in seen["local"].values()} == {2}
        assert_same(alone.pruner.masks.state_dict(), seen["masks"])
        assert_close(weights_of(alone.model), seen["weights"], "weights", rtol=1e-3)
        assert "holds 3 experts, which 2 ranks cannot share evenly under FSDP2" in seen["refused"]
    saved = load_dense(type(alone.student), folder / "mixture_of_experts" / "final")
    assert_same(weights_of(saved), ranks[0]["mixture_of_experts"]["weights"])

"""The measuring: what is timed, in which order, and that wrong values stop it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hf_sparse.inference.compress import compress, decompress
from hf_sparse.inference.measuring.bench import (
    MismatchError,
    check_close,
    compare_models,
    time_interleaved,
    token_inputs,
)


class Toy(nn.Module):
    """Token ids in, logits out; two layers to prune."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        x = self.embedding(input_ids) * attention_mask[..., None]
        for layer in self.layers:
            x = x + layer(x)
        return (self.head(x.mean(1)),)


def pruned_toy() -> Toy:
    torch.manual_seed(0)
    model, masks = Toy(), {}
    for i, layer in enumerate(model.layers):
        keep = torch.rand(2, 16) < 0.25
        with torch.no_grad():
            layer[0].weight *= keep.repeat_interleave(8, 0)
        masks[f"layers.{i}.0"] = keep
    return compress(model, masks)


def test_calls_take_turns_and_swap_the_lead() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}  # type: ignore[misc]
    timings = time_interleaved(calls, seconds=0.0, rounds=3, warmup=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert list(timings) == ["a", "b", "c"] and {timing.runs for timing in timings.values()} == {3}


def test_the_slower_call_is_slower_and_the_quartiles_hold_the_median() -> None:
    timings = time_interleaved({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, seconds=0.0, rounds=5)
    assert timings["slow"].median_ms >= 20.0 > timings["fast"].median_ms
    for timing in timings.values():
        assert timing.low_ms <= timing.median_ms <= timing.high_ms


def test_rounds_go_on_until_the_time_is_up() -> None:
    start = time.perf_counter()
    timings = time_interleaved({"nap": lambda: time.sleep(0.005)}, seconds=0.1, rounds=1, warmup=0)
    assert timings["nap"].runs > 1 and time.perf_counter() - start >= 0.1


def test_the_device_is_waited_for_before_and_after_each_call() -> None:
    seen: list[str] = []
    time_interleaved({"a": lambda: seen.append("a")}, 0.0, 2, warmup=0, synchronize=lambda: seen.append("wait"))
    assert seen == ["wait", "a", "wait"] * 2


@pytest.mark.parametrize(("calls", "rounds"), [({}, 5), ({"a": lambda: None}, 0)])
def test_nothing_to_time_is_refused(calls: dict[str, object], rounds: int) -> None:
    with pytest.raises(ValueError, match=f"rounds={rounds}: give at least one call and one round"):
        time_interleaved(calls, rounds=rounds)  # type: ignore[arg-type]


def test_check_close_gives_the_error_and_scales_with_the_reference() -> None:
    reference = torch.tensor([1000.0, 0.0])
    assert check_close(reference, torch.tensor([1000.0, 0.05])) == pytest.approx(0.05)
    with pytest.raises(MismatchError, match=r"the largest error is 0\.2, at most 0\.1 is allowed: no speed is told"):
        check_close(reference, torch.tensor([1000.0, 0.2]))


def test_three_times_too_large_is_no_match() -> None:
    reference = torch.randn(5, 7)
    with pytest.raises(MismatchError, match="the largest error"):
        check_close(reference, 3 * reference)


def test_the_tolerance_follows_the_dtype_measured_or_the_caller() -> None:
    reference, measured = torch.ones(3), torch.full((3,), 1.0078125, dtype=torch.bfloat16)
    assert check_close(reference, measured) == pytest.approx(0.0078125)
    with pytest.raises(MismatchError, match="the largest error"):
        check_close(reference, measured.float())
    with pytest.raises(MismatchError, match="the largest error"):
        check_close(reference, measured, tolerance=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_never_matches(bad: float) -> None:
    for pair in ((torch.tensor([1.0]), torch.tensor([bad])), (torch.tensor([bad]), torch.tensor([bad]))):
        with pytest.raises(MismatchError, match="a value is not finite"):
            check_close(*pair)


def test_another_shape_never_matches() -> None:
    with pytest.raises(MismatchError, match=r"shapes differ: expected \[2, 1\], found \[2\]"):
        check_close(torch.ones(2, 1), torch.ones(2))


def test_token_inputs_cover_every_size_and_repeat_with_the_seed() -> None:
    inputs = token_inputs([1, 3], [4, 7], vocab_size=11, seed=5)
    assert [tuple(given["input_ids"].shape) for given in inputs] == [(1, 4), (1, 7), (3, 4), (3, 7)]
    assert all(0 <= int(given["input_ids"].min()) and int(given["input_ids"].max()) < 11 for given in inputs)
    assert all(bool(given["attention_mask"].all()) for given in inputs)
    again = token_inputs([1, 3], [4, 7], vocab_size=11, seed=5)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(inputs, again, strict=True))


def test_compare_models_fills_two_rows_per_input() -> None:
    pruned, dense = pruned_toy(), decompress(pruned_toy())
    rows = compare_models(dense, pruned, token_inputs([1, 2], [6], 50), seconds=0.0, rounds=2)
    assert [(row["engine"], row["batch"], row["length"]) for row in rows] == [
        ("dense", 1, 6), ("hf_sparse", 1, 6), ("dense", 2, 6), ("hf_sparse", 2, 6),
    ]  # fmt: skip
    kept = sum(layer[0].weight.shape[0] for layer in pruned.layers)
    for row in rows:
        assert row["device"] == "cpu" and row["dtype"] == "float32" and row["threads"] == torch.get_num_threads()
        assert row["runs"] == 2 and row["spread"][0] <= row["ms"] <= row["spread"][1]
    assert rows[0]["block_shape"] is None and rows[0]["density"] == 1.0 and rows[0]["max_error"] == 0.0
    assert rows[1]["block_shape"] == [8, 1] and rows[1]["density"] == pytest.approx(kept / 64, abs=1e-6)
    assert 0.0 <= rows[1]["max_error"] < 1e-5


def test_compare_models_beside_other_engines() -> None:
    pruned, dense = pruned_toy(), decompress(pruned_toy())
    inputs, done = token_inputs([1, 2], [6], 50), []

    def slow(given: Mapping[str, Tensor]) -> Tensor:
        time.sleep(0.02)
        return dense(**given)[0]

    rows = compare_models(
        dense, pruned, inputs, seconds=0.0, rounds=3, others={"slow": slow}, advance=lambda: done.append(1)
    )
    assert [row["engine"] for row in rows] == ["dense", "slow", "hf_sparse"] * 2 and len(done) == 2
    for torch_row, slow_row, ours in (rows[:3], rows[3:]):
        assert torch_row["speedup"] == torch_row["speedup_eager"] == 1.0
        assert slow_row["ms"] >= 20.0 and slow_row["speedup"] < 1.0 and slow_row["max_error"] == 0.0
        assert slow_row["block_shape"] is None and slow_row["density"] == 1.0
        # The best dense engine is torch here, as the other one sleeps.
        assert ours["speedup"] == ours["speedup_eager"] == pytest.approx(torch_row["ms"] / ours["ms"], rel=0.05)


def test_compare_models_times_no_engine_with_wrong_values() -> None:
    dense = decompress(pruned_toy())
    with pytest.raises(MismatchError, match="no speed is told"):
        compare_models(
            dense, pruned_toy(), token_inputs([1], [4], 50), others={"off": lambda given: dense(**given)[0] + 1.0}
        )


def test_compare_models_measures_the_error_against_the_reference_not_the_model_to_beat() -> None:
    other = Toy()
    rows = compare_models(other, pruned_toy(), token_inputs([1], [4], 50), decompress(pruned_toy()), 0.0, 1)
    assert rows[1]["max_error"] < 1e-5


def test_compare_models_times_nothing_when_the_values_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*_: object, **__: object) -> None:
        raise AssertionError("a speed was taken")

    monkeypatch.setattr("hf_sparse.inference.measuring.bench.time_interleaved", timed)
    wrong = decompress(pruned_toy())
    with torch.no_grad():
        wrong.head.bias += 1.0
    with pytest.raises(MismatchError, match="no speed is told"):
        compare_models(wrong, pruned_toy(), token_inputs([1], [4], 50))


def test_models_run_in_evaluation_mode_without_gradients() -> None:
    seen = []

    class Watched(Toy):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(input_ids, attention_mask)  # type: ignore[return-value]

    torch.manual_seed(0)
    model = Watched()
    compare_models(model.train(), model, token_inputs([1], [4], 50), seconds=0.0, rounds=1)
    assert set(seen) == {(False, False)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@pytest.mark.parametrize("graphs", [True, False])
def test_models_on_a_gpu_are_timed_as_graphs_or_as_they_are(graphs: bool) -> None:
    pruned = pruned_toy().cuda()
    dense = decompress(pruned_toy()).cuda()
    inputs = token_inputs([2], [8], vocab_size=50, device="cuda")
    rows = compare_models(dense, pruned, inputs, seconds=0.0, graphs=graphs)
    assert {(row["engine"], row["mode"]) for row in rows} == {
        (engine, "graph" if graphs else "eager") for engine in ("dense", "hf_sparse")
    }
    assert {row["gpu"] for row in rows} == {torch.cuda.get_device_name()}

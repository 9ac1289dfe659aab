"""How fast a model is: interleaved timing, and a check of the values before any speed is told.

What is compared runs in turn, round after round, so that a machine that slows down slows everything down alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_sparse.core.report import report

logger = logging.getLogger(__name__)

# Largest error allowed, as a share of the largest reference value: what rounding in this dtype adds up to in a model.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}

Name = TypeVar("Name")


class MismatchError(ValueError):
    """Two ways to compute the same thing disagree, so no speed is told. The message gives error and tolerance."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What `time_interleaved` measured for one callable.

    Attributes:
        median_ms: median milliseconds of one call.
        low_ms, high_ms: first and third quartile.
        runs: number of calls timed.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int


def time_interleaved(
    calls: Mapping[Name, Callable[[], object]],
    seconds: float = 2.0,
    rounds: int = 5,
    warmup: int = 2,
    synchronize: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, Timing]:
    """Time callables side by side: each runs once per round, in an order that turns from round to round.

    Args:
        calls: {name: what to time}.
        seconds: rounds are added until this much time has gone by, warm-up not counted.
        rounds: at least so many rounds, however long they take.
        warmup: calls of each before the first that counts.
        synchronize: waits for the device; called before and after each call.
        clock: gives seconds. `time.process_time` counts the time of this process alone, which on a busy machine is
            what one thread would take on a quiet one.

    Returns:
        {name: timing}, in the order of `calls`.

    Raises:
        ValueError: if there is nothing to time, or `rounds` is below 1.

    Example:
        >>> time_interleaved({"sum": lambda: sum(range(100))}, seconds=0.0, rounds=3)["sum"].runs
        3
    """
    if not calls or rounds < 1:
        raise ValueError(f"calls={list(calls)} and rounds={rounds}: give at least one call and one round.")
    wait = synchronize or _no_wait
    for call in calls.values():
        for _ in range(warmup):
            call()
    names = list(calls)
    taken: dict[Name, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    turn = 0
    while turn < rounds or time.perf_counter() < end:
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wait()
            start = clock()
            calls[name]()
            wait()
            taken[name].append(1e3 * (clock() - start))
        turn += 1
    return {name: _summary(samples) for name, samples in taken.items()}


def _no_wait() -> None:
    pass


def _summary(samples: Sequence[float]) -> Timing:
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, median, high = torch.tensor(samples, dtype=torch.float64).quantile(points).tolist()
    return Timing(median_ms=median, low_ms=low, high_ms=high, runs=len(samples))


def check_close(reference: Tensor, measured: Tensor, tolerance: float | None = None) -> float:
    """Compare values before speeds.

    Args:
        reference: what is right.
        measured: the same shape.
        tolerance: largest |difference| allowed, as a share of the largest |reference|. None takes `TOLERANCE` of the
            dtype of `measured`.

    Returns:
        Largest |difference| (absolute, not the share).

    Raises:
        MismatchError: if shapes differ, a value is not finite, or the difference is too large.

    Example:
        >>> check_close(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
        Traceback (most recent call last):
        ...
        hf_sparse.inference.measuring.bench.MismatchError: the largest error is 0.5, at most 0.0002 is allowed: no \
speed is told.
    """
    if reference.shape != measured.shape:
        raise MismatchError(f"shapes differ: expected {list(reference.shape)}, found {list(measured.shape)}.")
    if not (reference.isfinite().all() and measured.isfinite().all()):
        raise MismatchError("a value is not finite: no speed is told.")
    share = TOLERANCE[measured.dtype] if tolerance is None else tolerance
    expected = reference.double()
    error = float((measured.double() - expected).abs().max())
    allowed = share * float(expected.abs().max())
    if error > allowed:
        raise MismatchError(f"the largest error is {error:.3g}, at most {allowed:.3g} is allowed: no speed is told.")
    return error


def token_inputs(
    batches: Iterable[int], lengths: Iterable[int], vocab_size: int, device: torch.device | str = "cpu", seed: int = 0
) -> list[dict[str, Tensor]]:
    """Draw token ids for every batch size and length, without padding.

    Args:
        batches: rows.
        lengths: tokens per row.
        vocab_size: ids are drawn from [0, vocab_size).
        device: where the tensors go.
        seed: of the draw.

    Returns:
        [{"input_ids", "attention_mask"}], both [batch, length] int64; lengths vary fastest.

    Example:
        >>> [tuple(x["input_ids"].shape) for x in token_inputs([1, 8], [16], vocab_size=100)]
        [(1, 16), (8, 16)]
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = list(lengths)
    drawn = [torch.randint(vocab_size, (b, n), generator=generator).to(device) for b in batches for n in lengths]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in drawn]


def compare_models(
    dense: nn.Module,
    pruned: nn.Module,
    inputs: Sequence[Mapping[str, Tensor]],
    reference: nn.Module | None = None,
    seconds: float = 2.0,
    rounds: int = 5,
    tolerance: float | None = None,
    others: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]] | None = None,
    advance: Callable[[], None] | None = None,
    graphs: bool = False,
) -> list[dict[str, Any]]:
    """Time a pruned model against a dense one, value check first.

    Args:
        dense: the model to beat. Both models are put into evaluation mode.
        pruned: a compressed model on the same device.
        inputs: keyword arguments of the models, one entry per measurement; "input_ids" is [batch, length].
        reference: a plain model with the very weights of `pruned`, as `decompress` gives; None where `dense` is that.
        seconds, rounds: see `time_interleaved`.
        tolerance: see `check_close`.
        others: {name: another engine that computes what `dense` does}, such as `inference.measuring.engines` makes.
        advance: called when an entry of `inputs` is done.
        graphs: whether CUDA graphs of both models are replayed, which leaves out what the CPU takes to launch them. A
            model that cannot be recorded is called as it is; so are `others`.

    Returns:
        A row per engine and entry of `inputs`, "dense" (torch, as the model comes) first, then `others`, "hf_sparse"
        last, with engine, device, dtype, batch, length, block_shape, density, threads, ms (median), spread ([first,
        third quartile] in ms), runs, speedup (over the fastest of the dense engines), speedup_eager (over "dense")
        and max_error (0.0 for "dense"); on a GPU also its name as "gpu", and "mode": "graph" or "eager".

    Raises:
        MismatchError: if `pruned` does not compute what `reference` does, or another engine what `dense` does;
            nothing is timed then.
    """
    weight = next(p for p in pruned.parameters() if p.is_floating_point())
    others = others or {}
    sparse = report(pruned)
    shapes = {layer.block_shape for layer in sparse.layers if layer.kept_blocks < layer.total_blocks}
    dense_facts: dict[str, Any] = {"block_shape": None, "density": 1.0}
    pruned_facts: dict[str, Any] = {
        "block_shape": list(shapes.pop()) if len(shapes) == 1 else "several" if shapes else None,
        "density": round(1.0 - sparse.sparsity, 6),
    }
    rows = []
    with torch.inference_mode():
        errors = [
            _errors(dense.eval(), pruned.eval(), (reference or dense).eval(), others, given, tolerance)
            for given in inputs
        ]
        for given, found in zip(inputs, errors, strict=True):
            calls: dict[str, Callable[[], object]] = {"dense": partial(dense, **given)}
            calls |= {name: partial(engine, given) for name, engine in others.items()}
            calls["hf_sparse"] = partial(pruned, **given)
            facts: dict[str, dict[str, Any]] = {name: {} for name in calls}
            if weight.device.type == "cuda":
                for name in calls:
                    recorded = record_graph(calls[name]) if graphs and name not in others else None
                    calls[name] = recorded or calls[name]
                    mode = "eager" if recorded is None else "graph"
                    facts[name] = {"gpu": torch.cuda.get_device_name(weight.device), "mode": mode}
            timings = time_interleaved(
                calls,
                seconds,
                rounds,
                synchronize=torch.cuda.synchronize if weight.device.type == "cuda" else None,
            )
            best = min(timing.median_ms for name, timing in timings.items() if name != "hf_sparse")
            batch, length = given["input_ids"].shape
            for engine, timing in timings.items():
                rows.append(
                    {
                        "engine": engine,
                        "device": weight.device.type,
                        **facts[engine],
                        "dtype": str(weight.dtype).removeprefix("torch."),
                        "batch": batch,
                        "length": length,
                        **(pruned_facts if engine == "hf_sparse" else dense_facts),
                        "threads": torch.get_num_threads(),
                        "ms": round(timing.median_ms, 4),
                        "spread": [round(timing.low_ms, 4), round(timing.high_ms, 4)],
                        "runs": timing.runs,
                        "speedup": round(best / timing.median_ms, 3),
                        "speedup_eager": round(timings["dense"].median_ms / timing.median_ms, 3),
                        "max_error": found[engine],
                    }
                )
            if advance:
                advance()
    return rows


def record_graph(call: Callable[[], object]) -> Callable[[], object] | None:
    """Record a call as a CUDA graph, and give what replays it; None where it cannot be recorded.

    Args:
        call: works on tensors that stay where they are.
    """
    try:
        # A first call allocates, compiles and tunes, none of which can be recorded.
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    # Models that wait for the device, or read its values, fail in their own ways.
    except RuntimeError as error:
        logger.info("no CUDA graph, timed as it is called: %s", error)
        return None
    return graph.replay


def _errors(
    dense: nn.Module,
    pruned: nn.Module,
    reference: nn.Module,
    others: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]],
    given: Mapping[str, Tensor],
    tolerance: float | None,
) -> dict[str, float]:
    errors = {"dense": 0.0, "hf_sparse": check_close(_logits(reference, given), _logits(pruned, given), tolerance)}
    if others:
        truth = _logits(dense, given)
        errors |= {name: check_close(truth, run(given).to(truth.dtype), tolerance) for name, run in others.items()}
    return errors


def _logits(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
    # The first output is the logits of a model with a head and the hidden states of a bare one.
    output = model(**given)
    return output if isinstance(output, Tensor) else output[0]

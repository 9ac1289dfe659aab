"""Try plans for the shapes that matter, and print the fastest of each: how the defaults of the gpu backend were found.

Workers compile and check every plan first, each a part of them; then one process times those that are right.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import DEVICE, TOLERANCE, Case, ceilings, copies, dense, error, times
from hf_sparse.inference.kernels.gpu.launch import multiply, transpose
from hf_sparse.inference.kernels.gpu.plan import Plan, default_plan

TILES = ((64, 64, 4), (128, 64, 8), (64, 128, 8), (128, 128, 8), (32, 64, 4), (32, 128, 4), (64, 32, 4))
SQUARE, TALL = (4096, 4096), (11008, 4096)


def jobs() -> Iterator[tuple[Case, int, list[Plan]]]:
    """List weights, tokens and the plans to try, what matters most first."""
    yield Case(SQUARE, (64, 64), 0.1), 4096, _tile_plans(64, 64, wide=True)
    yield Case(SQUARE, (64, 1), 0.1), 4096, _band_plans(64)
    yield Case(SQUARE, (64, 64), 0.1), 1, _few_plans(1, False)
    yield Case(SQUARE, (64, 1), 0.1), 1, _few_plans(1, False)
    yield Case(SQUARE, (64, 64), 0.1), 16, _few_plans(16, False)
    yield Case(SQUARE, (64, 1), 0.1), 16, _few_plans(16, True)
    yield Case(TALL, (64, 64), 0.1), 4096, _tile_plans(64, 64, wide=True)
    yield Case(TALL, (64, 1), 0.1), 4096, _band_plans(64)
    yield Case(TALL, (64, 64), 0.1), 1, _few_plans(1, False)
    yield Case(TALL, (64, 1), 0.1), 1, _few_plans(1, False)
    yield Case((28672, 8192), (64, 64), 0.1), 1, _few_plans(1, False)
    yield Case(SQUARE, (128, 128), 0.1), 4096, _tile_plans(128, 128)
    yield Case(SQUARE, (128, 1), 0.1), 4096, _band_plans(128)
    yield Case(SQUARE, (32, 32), 0.1), 4096, [*_tile_plans(32, 32), *_band_plans(32)[:2]]
    yield Case(SQUARE, (32, 1), 0.1), 4096, _band_plans(32)
    yield Case(SQUARE, (16, 16), 0.1), 4096, [Plan("gather", 128, 16, 64, 4, 3, 4), *_band_plans(16)]
    yield Case(SQUARE, (16, 1), 0.1), 4096, _band_plans(16)
    yield Case(SQUARE, (64, 64), 0.5), 4096, _tile_plans(64, 64)
    yield Case(SQUARE, (64, 64), 0.1), 64, _tile_plans(64, 64, m=64)
    yield Case(SQUARE, (64, 64), 0.1, "float32"), 512, _single_plans()


def _tile_plans(height: int, width: int, *, wide: bool = False, m: int = 128) -> list[Plan]:
    o, k = min(height, 128), min(width, 64)
    warps = 8 if m * o > 128 * 64 else 4
    base = Plan("copy", m, o, k, warps, 3, 4)
    found = [base, replace(base, boxed=True), replace(base, early=1), replace(base, boxed=True, early=1)]
    found += [replace(base, swapped=True, boxed=True), replace(base, stages=2, boxed=True)]
    if m == 128:
        large = replace(base, m=256, warps=8 if o > 32 else 4)
        found += [
            replace(large, boxed=True), replace(large, stages=2, boxed=True),
            replace(large, stages=4, boxed=True), replace(large, warps=4, stages=2, boxed=True),
        ]  # fmt: skip
    if wide:
        found += [
            replace(base, boxed=True, group=2), replace(base, boxed=True, group=8), replace(base, boxed=True, group=1),
            replace(base, boxed=True, warps=8), replace(base, boxed=True, swapped=True, early=1),
            replace(base, boxed=True), replace(base, boxed=True, stages=2),
        ]  # fmt: skip
    return list(dict.fromkeys(found))


def _band_plans(height: int) -> list[Plan]:
    o = max(16, height)
    base = Plan("gather", 128, o, 32, 8 if o > 64 else 4, 3, 4, True)
    found = [
        base,
        replace(base, early=1),
        replace(base, group=2),
        replace(base, group=8),
        replace(base),
    ]
    found += [replace(base, stages=4), replace(base, stages=5), replace(base, k=16, stages=4)]
    found += [replace(base, m=256), replace(base, m=64, group=8)]
    return found + ([replace(base, swapped=True)] if o >= 64 else [])


def _few_plans(m: int, first: bool) -> list[Plan]:
    if m == 1:
        sizes = [(8, 512, 4), (16, 256, 4), (16, 512, 4), (16, 512, 8), (8, 256, 2), (8, 256, 4), (8, 1024, 4)]
    else:
        sizes = [(16, 256, 4), (16, 512, 4), (16, 128, 2), (16, 256, 2), (16, 512, 2), (16, 128, 1), (32, 256, 4)]
    base = Plan("few", m, 16, 512, 4, 1, 4, first)
    found = [replace(base, o=o, k=k, warps=warps) for o, k, warps in sizes]
    return found + [replace(plan, early=early) for plan in found[:4] for early in (1, 2)]


def _single_plans() -> list[Plan]:
    return [
        Plan("gather", m, o, k, warps, 3, 4, True)
        for m, o, k, warps in ((32, 64, 16, 4), (64, 64, 16, 8), (64, 64, 16, 4), (128, 64, 16, 8), (64, 64, 32, 8))
    ]


def check(part: int, parts: int, out: Path) -> None:
    """Compile and check a part of the plans; write the errors, {"job plan": error or message}."""
    found: dict[str, Any] = {}
    number = 0
    for place, (case, tokens, plans) in enumerate(jobs()):
        mine = [plan for plan in plans if (number := number + 1) % parts == part]
        if not mine:
            continue
        weight = case.weight()
        truth = dense(weight)
        x = torch.randn(tokens, case.shape[1], device=DEVICE).to(truth.dtype)
        for plan in mine:
            key = f"{place} {plan}"
            try:
                y = multiply(x, weight.values, weight.forward, None, None, plan)
                found[key] = error(y, x, truth)
            except Exception as problem:  # noqa: BLE001
                found[key] = f"{type(problem).__name__}: {str(problem)[:160]}"
            out.write_text(json.dumps(found), encoding="utf-8")


def measure(checked: dict[str, Any], out: Path, seconds: float) -> None:
    """Time the plans that are right; write everything and print the fastest four of each job."""
    begin = time.monotonic()
    content: dict[str, Any] = {"device": torch.cuda.get_device_name(), "ceilings": ceilings(), "jobs": []}
    print(content["device"], content["ceilings"], flush=True)
    for place, (case, tokens, plans) in enumerate(jobs()):
        if time.monotonic() - begin > seconds:
            print("out of time at job", place)
            break
        weight = case.weight()
        truth = dense(weight)
        allowed = TOLERANCE[truth.dtype]
        errors = {plan: checked.get(f"{place} {plan}", "not checked") for plan in plans}
        right = [plan for plan, told in errors.items() if isinstance(told, float) and told <= allowed]
        for plan in set(plans) - set(right):
            print("  WRONG", case, tokens, plan, errors[plan])
        x = torch.randn(tokens, case.shape[1], device=DEVICE).to(truth.dtype)
        found = _time(case, tokens, weight, truth, x, right)
        best = sorted((ms["ms"], name) for name, ms in found.items() if name.startswith("Plan"))
        reference = found["dense"]["ms"]
        extra = f" transpose {1e3 * found['transpose']['ms']:.1f}" if "transpose" in found else ""
        usual = found.get(str(default_plan(weight.forward, tokens, truth.dtype)), {}).get("ms")
        print(
            f"{case.dtype[:2]} {case.shape[0]}x{case.shape[1]} {case.block[0]}x{case.block[1]} d{case.density} "
            f"t{tokens}: dense {1e3 * reference:.1f} us{extra}" + (f" default {1e3 * usual:.1f}" if usual else "")
        )
        for ms, name in [*best[:5], *best[-1:]]:
            short = re.sub(r"[a-z_]+=(0|False)(, )?|program=|features_first=True, ", "", name)
            print(f"   {1e3 * ms:7.1f} us {reference / ms:5.2f}x {short[5:-1]}", flush=True)
        content["jobs"].append(
            {"case": vars(case), "tokens": tokens, "times": found, "errors": {str(p): e for p, e in errors.items()}}
        )
        out.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _time(case: Case, tokens: int, weight: Any, truth: Any, x: Any, plans: list[Plan]) -> dict[str, Any]:
    few = tokens <= 16
    matrices = copies(truth, 8) if few else [truth]
    stored = copies(weight.values) if few else [weight.values]
    launches = 32 if few else 6
    calls: dict[str, Any] = {"dense": (lambda i: torch.nn.functional.linear(x, matrices[i % len(matrices)]), launches)}
    for plan in plans:

        def call(i: int, plan: Plan = plan) -> Any:
            return multiply(x, stored[i % len(stored)], weight.forward, None, None, plan)

        calls[str(plan)] = (call, max(launches, len(stored)) if few else launches)
    if any(plan.features_first for plan in plans):
        calls["transpose"] = (lambda i: transpose(x, 128 if tokens > 16 else 16), launches)
        if tokens > 16:
            for tile in TILES:
                calls[f"transpose {tile}"] = (lambda i, tile=tile: transpose(x, 128, tile=tile), launches)
    return times(calls, rounds=4)


def _cpu_time(call: Callable[[], Any]) -> float:
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(200):
        call()
    torch.cuda.synchronize()
    return 5e3 * (time.perf_counter() - start)


def eager() -> None:
    """Print what a call costs where the CPU launches it: ours and dense."""
    from hf_sparse.inference.kernels import get_backend

    backend = get_backend("gpu")
    for block in ((64, 64), (64, 1)):
        weight = Case((1024, 1024), block, 0.1).weight()
        matrix, words = dense(weight), []
        for tokens in (1, 16, 64):
            x = torch.randn(tokens, 1024, device="cuda").to(matrix.dtype)
            words += [
                f"{_cpu_time(partial(backend.run, x, weight, None, None)):.1f}",
                f"{_cpu_time(partial(torch.nn.functional.linear, x, matrix)):.1f}",
            ]
        print(f"eager {block} us per call at 1, 16, 64 tokens, ours dense: {' '.join(words)}", flush=True)


if __name__ == "__main__":
    mode, *rest = sys.argv[1:]
    if mode == "check":
        check(int(rest[0]), int(rest[1]), Path(rest[2]))
    else:
        folder = Path(rest[0])
        merged: dict[str, Any] = {}
        for file in sorted(folder.glob("checked-*.json")):
            merged |= json.loads(file.read_text(encoding="utf-8"))
        eager()
        measure(merged, Path(rest[1]), float(rest[2]))

"""Try plans for the shapes that matter, and print the fastest of each: how the defaults of the gpu backend were found.

Workers compile and check every plan first, each a part of them; then one process times those that are right.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import DEVICE, TOLERANCE, Case, ceilings, copies, dense, error, times
from hf_sparse.inference.kernels.gpu.launch import multiply, transpose
from hf_sparse.inference.kernels.gpu.plan import Plan, default_plan

SQUARE, TALL = (4096, 4096), (11008, 4096)


def jobs() -> Iterator[tuple[Case, int, list[Plan]]]:
    """List weights, tokens and the plans to try, what matters most first."""
    tile, bands = _tile_plans, _band_plans
    yield Case(SQUARE, (64, 64), 0.1), 4096, tile(64, 64, wide=True)
    yield Case(SQUARE, (64, 1), 0.1), 4096, bands(64, wide=True)
    yield Case(SQUARE, (64, 64), 0.1), 1, _few_plans(1, False)
    yield Case(SQUARE, (64, 1), 0.1), 1, _few_plans(1, False)
    yield Case(SQUARE, (64, 64), 0.1), 16, _few_plans(16, False)
    yield Case(SQUARE, (64, 1), 0.1), 16, _few_plans(16, True)
    yield Case(TALL, (64, 64), 0.1), 4096, tile(64, 64)
    yield Case(TALL, (64, 1), 0.1), 4096, bands(64)
    for height in (128, 32, 16):
        yield Case(SQUARE, (height, height), 0.1), 4096, tile(height, height)
        yield Case(SQUARE, (height, 1), 0.1), 4096, bands(height)
    yield Case(TALL, (32, 1), 0.1), 1, _few_plans(1, False)
    yield Case(TALL, (32, 32), 0.1), 1, _few_plans(1, False)
    yield Case(SQUARE, (16, 1), 0.1), 1, _few_plans(1, False)
    yield Case(SQUARE, (8, 1), 0.1), 1, _few_plans(1, False, rows=8)
    for tokens in (64, 512):
        yield Case(SQUARE, (64, 64), 0.1), tokens, tile(64, 64, m=(32, 64, 128))
        yield Case(SQUARE, (64, 1), 0.1), tokens, bands(64, m=(32, 64, 128))
    yield Case((1024, 1024), (64, 64), 0.1), 4096, tile(64, 64)
    yield Case((4096, 1024), (64, 64), 0.1), 4096, tile(64, 64)
    yield Case(SQUARE, (64, 64), 0.5), 4096, tile(64, 64)
    yield Case(SQUARE, (64, 64), 0.1, "float32"), 512, _single_plans(False)
    yield Case(SQUARE, (64, 1), 0.1, "float32"), 512, _single_plans(True)


def _tile_plans(height: int, width: int, *, wide: bool = False, m: tuple[int, ...] = (128, 256)) -> list[Plan]:
    o, k, found = min(height, 128), min(width, 64), []
    for tokens in m:
        warps = 8 if tokens * o > 128 * 64 else 4
        for stages in (3, 4):
            for group in (4, 16) if wide else (4,):
                found.append(Plan("copy", tokens, o, k, warps, stages, group))
        found.append(Plan("copy", tokens, o, k, warps, 2, 8))
        found.append(Plan("gather", tokens, o, max(k, 32), warps, 3, 4))
        if wide:
            found += [
                Plan("copy", tokens, o, k, warps, 5 if tokens < 256 else 3, 1),
                Plan("copy", tokens, o, k, warps, 3, 4, swapped=True),
                Plan("gather", tokens, o, k, warps, 4, 4),
                Plan("copy", tokens, o, k, 8 if warps == 4 else 4, 3, 4),
            ]
    return found


def _band_plans(height: int, *, wide: bool = False, m: tuple[int, ...] = (128, 256)) -> list[Plan]:
    o, found = max(16, height), []
    for tokens in m:
        warps = 8 if tokens * o > 128 * 64 else 4
        for k in (32, 64):
            found += [Plan("gather", tokens, o, k, warps, stages, 4, True) for stages in (3, 4)]
        if height >= 64:
            found.append(Plan("gather", tokens, o, 64, warps, 3, 4, True, swapped=True))
        if wide:
            found.append(Plan("gather", tokens, o, 64, warps, 3, 16, True))
            found.append(Plan("gather", tokens, o, 128, warps, 2, 4, True))
            found.append(Plan("gather", tokens, o, 64, 8 if warps == 4 else 4, 3, 4, True))
    return found


def _few_plans(m: int, first: bool, rows: int = 16) -> list[Plan]:
    sizes = [(128, 4), (256, 4), (256, 8), (512, 4), (512, 8)] + ([(1024, 8), (128, 2)] if m == 1 else [])
    found = [Plan("few", m, rows, k, warps, 1, 4, first) for k, warps in sizes]
    found += [Plan("few", m, 32, k, warps, 1, 4, first) for k, warps in ((128, 4), (256, 8))] if rows == 16 else []
    found += [Plan("few", m, 8, k, 4, 1, 4, first) for k in (256, 512)] if m == 1 and rows == 16 else []
    return list(dict.fromkeys(found))


def _single_plans(first: bool) -> list[Plan]:
    return [
        Plan("gather", m, o, 16, warps, 3, 4, first)
        for m, o, warps in ((32, 32, 4), (64, 32, 4), (64, 64, 8), (32, 64, 4))
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
        for ms, name in [*best[:4], *best[-1:]]:
            short = name.replace("features_first=", "ff=").replace("swapped=", "sw=").replace("program=", "")
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
        calls["transpose"] = (lambda i: transpose(x, plans[0].m), launches)
    return times(calls, rounds=4)


if __name__ == "__main__":
    mode, *rest = sys.argv[1:]
    if mode == "check":
        check(int(rest[0]), int(rest[1]), Path(rest[2]))
    else:
        folder = Path(rest[0])
        merged: dict[str, Any] = {}
        for file in sorted(folder.glob("checked-*.json")):
            merged |= json.loads(file.read_text(encoding="utf-8"))
        measure(merged, Path(rest[1]), float(rest[2]))

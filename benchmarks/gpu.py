"""How fast the GPU kernels are, beside cuBLAS, torch's own block-sparse product and 2:4 sparsity. Values come first.

    python benchmarks/gpu.py                 everything, in less than 8 minutes; --seconds N stops sooner
    python benchmarks/gpu.py linear models   parts of it
    python benchmarks/gpu.py --check         every kernel on this GPU against float64, in about a minute
    python benchmarks/gpu.py --explore       try plans for the shapes that matter: how defaults were found

Each part runs in a process of its own, so that one that fails or hangs costs no other; the cells that matter most come
first, and those that were not reached are named in the file. Times are medians of replayed CUDA graphs; buffers are
taken in turn where they would stay in the cache. docs/kernels.md says how to read the numbers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
PARTS = ("linear", "models")
# Of the time there is, by part.
SHARES = {"linear": 0.6, "models": 0.4}
CHECK = "tests/inference/kernels/test_gpu_device.py"


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line says."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    sys.exit(check(options) if options.check else explore(options) if options.explore else measure(options))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", help="linear, models; default: both")
    parser.add_argument("--seconds", type=float, default=450.0, help="for all parts together")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true")
    mode.add_argument("--explore", nargs="?", const="all", choices=["all", "check", "measure"])
    options = parser.parse_args(arguments)
    options.part = options.part or list(PARTS)
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def run(*command: object, seconds: float, quiet: bool = False) -> int:
    """Run a Python module of this repository; its exit status, or 124 where it took too long and was stopped."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    try:
        return subprocess.run(
            [sys.executable, "-m", *map(str, command)], cwd=REPOSITORY, env=environment, timeout=seconds, check=False,
            stdout=subprocess.DEVNULL if quiet else None,
        ).returncode  # fmt: skip
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s: {' '.join(map(str, command))}", flush=True)
        return 124


def check(options: argparse.Namespace) -> int:
    """Compare every kernel with float64 on this GPU: the tests that are marked gpu."""
    words = ["pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=line", "-n", options.jobs, CHECK]
    return run(*words, seconds=options.seconds)


def explore(options: argparse.Namespace) -> int:
    """Compile and check the plans in several processes, then time them in one."""
    begin = time.monotonic()
    if options.explore != "measure":
        _check_plans(options, begin + (0.6 if options.explore == "all" else 1.0) * options.seconds)
        print(f"checked in {time.monotonic() - begin:.0f} s", flush=True)
    if options.explore == "check":
        return 0
    left = options.seconds - (time.monotonic() - begin)
    target = options.out / "gpu_explore.json"
    return run("benchmarks.gpu_explore", "measure", options.out, target, left - 5, seconds=left + 10)


def _check_plans(options: argparse.Namespace, deadline: float) -> None:
    for old in options.out.glob("checked-*.json"):
        old.unlink()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_explore", "check", str(part), str(options.jobs),
             str(options.out / f"checked-{part}.json")],
            cwd=REPOSITORY, env=environment,
        )
        for part in range(options.jobs)
    ]  # fmt: skip
    for worker in workers:
        try:
            worker.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            print("a worker was stopped: its other plans are not checked", flush=True)


def measure(options: argparse.Namespace) -> int:
    """Run the parts, each in its share of the time; what one leaves goes to the next."""
    begin, worst, total = time.monotonic(), 0, sum(SHARES[part] for part in options.part)
    for part in options.part:
        left = options.seconds - (time.monotonic() - begin)
        mine = left if part == options.part[-1] else min(left, options.seconds * SHARES[part] / total)
        words = [f"benchmarks.gpu_{part}", "--seconds", f"{mine:.0f}", "--jobs", options.jobs]
        worst = max(worst, run(*words, "--out", options.out / f"gpu_{part}.json", seconds=mine + 20))
    return worst


if __name__ == "__main__":
    main()

"""How fast the CPU kernels are, against the best dense engines on the same machine. Values are compared first.

    python benchmarks/cpu.py linear        one layer: shapes, block shapes, densities, numbers of tokens
    python benchmarks/cpu.py encoder       MiniLM and BERT-base: hidden states in and out, and ids in, logits out
    python benchmarks/cpu.py deepsparse --python DS/bin/python     DeepSparse in its own environment, same weights
    python benchmarks/cpu.py tables        write the tables of README.md and docs/kernels.md anew

All engines of a cell run in turn in one process, pinned to as many cores as they have threads; times are medians, and
rows that lose are kept. A file is written after every cell, and the same command goes on where it was stopped. Engines
that cannot run are named in the file with the reason. docs/kernels.md says how to read the numbers.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from transformers.utils import logging  # noqa: E402

from benchmarks import against_deepsparse, encoders, linears, models, tables  # noqa: E402
from benchmarks.record import RESULTS, Cell, Record  # noqa: E402
from benchmarks.timing import CLOCKS, pin  # noqa: E402

# What each preset measures, where the command line does not say it: quick takes three minutes at most, default
# twelve, full about three quarters of an hour.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "linear": {
        "quick": {"seconds": 0.3, "shape": linears.SHAPES[::2], "tokens": [1, 32, 128], "density": [0.5, 0.1],
                  "block": [(8, 1), (8, 2), (32, 32)], "threads": [1]},
        "default": {"seconds": 0.5, "shape": linears.SHAPES, "tokens": [1, 8, 32, 128, 512],
                    "density": linears.DENSITIES, "block": [(8, 1), (8, 2), (32, 1), (32, 32)], "threads": [1]},
        "full": {"seconds": 1.0, "shape": linears.SHAPES, "tokens": linears.TOKENS, "density": linears.DENSITIES,
                 "block": linears.BLOCKS, "threads": [1, 2]},
    },
    "encoder": {
        "quick": {"seconds": 1.0, "scope": ["encoder"], "size": [(1, 32), (1, 128)], "density": [0.5, 0.1],
                  "threads": [1]},
        "default": {"seconds": 2.0, "scope": encoders.SCOPES, "density": models.DENSITIES, "threads": [1, 2],
                    "size": [(1, 16), (1, 32), (1, 128), (8, 128)]},
        "full": {"seconds": 2.0, "scope": encoders.SCOPES, "density": models.DENSITIES, "threads": [1, 2],
                 "size": [(batch, length) for batch in encoders.BATCHES for length in encoders.LENGTHS]},
    },
    "deepsparse": {
        "quick": {"seconds": 1.0, "size": [(1, 128)], "density": [0.1], "threads": [1]},
        "default": {"seconds": 2.0, "size": [(1, 128), (8, 128)], "density": [0.1], "threads": [1]},
        "full": {"seconds": 2.0, "size": [(1, 32), (1, 128), (8, 128)], "density": [0.2, 0.1, 0.05],
                 "threads": [1, 2]},
    },
}  # fmt: skip

BLOCKS: dict[str, Any] = {
    "encoder": {dtype: list(block) for dtype, block in models.BLOCKS.items()},
    "deepsparse": [list(block) for block in against_deepsparse.BLOCKS],
}
# Where things lie on one machine is of no use on another.
PLACES = ("--python", "--out", "--work")


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line says."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["tables"]:
        sys.exit(tables.main(given[1:]))
    options = parse(given)
    if options.fresh:
        options.out.unlink(missing_ok=True)
    if len(options.threads) > 1:
        # Some engines count the cores only once: every number of threads has a process of its own.
        rest = [word for word in given if word != "--fresh"]
        for threads in options.threads:
            command = [sys.executable, __file__, *rest, "--threads", str(threads), "--command", options.command]
            if subprocess.run(command, check=False).returncode:
                sys.exit(f"stopped with {threads} threads; the same command goes on from here.")
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = {
        "densities": options.density,
        "blocks": BLOCKS.get(options.part) or [list(block) for block in options.block],
        **{name: getattr(options, name) for name in ("seconds", "rounds", "clock")},
        "compile": options.compile,
        "without": options.without,
    }
    record = Record(options.out, options.command, settings)
    threads = options.threads[0]
    torch.set_num_threads(threads)
    pin(threads)
    without = dict.fromkeys(options.without, "left out on the command line")
    if not options.compile:
        without["compile"] = "takes minutes to compile; measured with --compile"
    with tempfile.TemporaryDirectory(prefix="hf_sparse_bench_") as folder:
        listed, headline = _cells(options, threads, settings, without, options.work or Path(folder))
        record.run(listed, headline)
    print(f"{len(record.content['rows'])} rows in {options.out}")


def _cells(
    options: argparse.Namespace, threads: int, settings: dict[str, Any], without: dict[str, str], folder: Path
) -> tuple[list[Cell], Any]:
    if options.part == "linear":
        listed = linears.cells(options.shape, options.tokens, options.dtype, threads, settings, without)
        return listed, linears.headline
    if options.part == "encoder":
        sizes = options.size
        listed = encoders.cells(options.model, options.scope, sizes, threads, settings, without, folder)
        return listed, encoders.headline
    listed = against_deepsparse.cells(options.model, options.size, threads, settings, folder, options.python)
    return listed, against_deepsparse.headline


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line, and fill in what it leaves to the preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name in PRESETS:
        part = parts.add_parser(name)
        preset = part.add_mutually_exclusive_group()
        preset.add_argument("--quick", action="store_true", help="a look, in three minutes")
        preset.add_argument("--full", action="store_true", help="everything, in about three quarters of an hour")
        part.add_argument("--threads", type=int, nargs="+", help="one process for each number")
        part.add_argument("--density", type=float, nargs="+")
        part.add_argument("--seconds", type=float, help="at least, per cell; all its engines together")
        part.add_argument("--rounds", type=int, default=5, help="at least, per cell")
        part.add_argument("--clock", choices=list(CLOCKS), default="wall", help="process: for one thread")
        part.add_argument("--compile", action="store_true", help="torch.compile as well")
        part.add_argument("--without", nargs="+", default=[], metavar="ENGINE", help="engines to leave out")
        part.add_argument("--out", type=Path, help="default: benchmarks/results/cpu_PART.json")
        part.add_argument("--fresh", action="store_true", help="begin the file anew")
        part.add_argument("--work", type=Path, help="keep models and ONNX files in this folder")
        part.add_argument("--command", help=argparse.SUPPRESS)
        if name == "linear":
            part.add_argument("--shape", nargs="+", type=_pair, metavar="OxI")
            part.add_argument("--tokens", nargs="+", type=int)
            part.add_argument("--block", nargs="+", type=_pair, metavar="HxW")
            part.add_argument("--dtype", nargs="+", choices=linears.DTYPES, default=linears.DTYPES)
        else:
            part.add_argument("--model", nargs="+", choices=[*models.MODELS, "tiny"], default=models.MODELS)
            part.add_argument("--size", nargs="+", type=_pair, metavar="BATCHxLENGTH")
        if name == "encoder":
            part.add_argument("--scope", nargs="+", choices=encoders.SCOPES)
        if name == "deepsparse":
            part.add_argument("--python", type=Path, required=True, help="of the environment that has deepsparse")
    options = parser.parse_args(arguments)
    chosen = "quick" if options.quick else "full" if options.full else "default"
    for key, value in PRESETS[options.part][chosen].items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    if options.clock == "process" and options.threads != [1]:
        parser.error("--clock process adds up what all threads take: use it with --threads 1.")
    options.out = options.out or RESULTS / f"cpu_{options.part}{'_quick' if options.quick else ''}.json"
    words = [
        before.strip("-").upper() if before in PLACES else word
        for before, word in zip(["", *arguments], arguments, strict=False)
        if word != "--fresh"
    ]
    options.command = options.command or shlex.join(["python", "benchmarks/cpu.py", *words])
    return options


def _pair(text: str) -> tuple[int, int]:
    first, _, second = text.partition("x")
    if not (first.isdecimal() and second.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} must be two numbers, such as 8x1")
    return int(first), int(second)


if __name__ == "__main__":
    main()

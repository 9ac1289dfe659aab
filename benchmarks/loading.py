"""Time plain `from_pretrained` of compressed folders beside the dense folder of the same model, values first.

Two things are timed, in turn, in one process that has imported everything, files in the page cache: the load alone,
and the load with the first call after it, in which a backend prepares its weights. Then each folder is loaded once in
a process of its own, for the memory it takes and for the time with a cold Python. Rows that lose are kept.

Usage: python benchmarks/loading.py [--smoke] [--model minilm bert-base] [--rounds 21] [--threads 1] [--out FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForSequenceClassification  # noqa: E402
from transformers.utils import logging  # noqa: E402

from benchmarks.models import load as make_model  # noqa: E402
from benchmarks.timing import CLOCKS  # noqa: E402
from hf_sparse import compress, load_dense  # noqa: E402
from hf_sparse.core.blocks import BlockShape, grid_shape, scale_blocks_  # noqa: E402
from hf_sparse.core.structure.targets import find_targets, weight_view  # noqa: E402
from hf_sparse.inference.measuring.bench import check_close, token_inputs  # noqa: E402
from hf_sparse.inference.measuring.environment import environment  # noqa: E402

MODELS = ["minilm", "bert-base"]
BLOCKS: list[BlockShape] = [(8, 1), (32, 32)]
DENSITIES = [0.2, 0.1, 0.05]
BATCH, LENGTH = 1, 32

# Run in a process of its own: prints what one load takes there.
CHILD = """
import json, re, sys, time
import torch, transformers
import hf_sparse
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(int(sys.argv[2]))
def status(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 2**10
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before, start = status("VmRSS"), time.perf_counter()
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
loaded, after_load = time.perf_counter(), status("VmHWM")
with torch.inference_mode():
    model(**{name: torch.tensor(ids) for name, ids in json.loads(sys.argv[3]).items()})
print(json.dumps({
    "load": {"fresh_ms": 1e3 * (loaded - start), "memory_mib": after_load - before},
    "load_and_call": {"fresh_ms": 1e3 * (time.perf_counter() - start), "memory_mib": status("VmHWM") - before},
}))
"""


def save_models(
    model: Any, folder: Path, blocks: list[BlockShape], densities: list[float]
) -> dict[Path, dict[str, Any]]:
    """Save a dense model, and what is compressed from it.

    Args:
        model: dense; the blocks that are kept are drawn at random.
        folder: for the folders of the models.
        blocks, densities: every block shape is combined with every density.

    Returns:
        {folder: engine, block_shape, density and bytes of its weights}, the dense one first.
    """
    facts: dict[Path, dict[str, Any]] = {folder / "dense": {"engine": "dense", "block_shape": None, "density": 1.0}}
    model.save_pretrained(folder / "dense")
    for block in blocks:
        for density in densities:
            pruned = AutoModelForSequenceClassification.from_pretrained(folder / "dense")
            generator, masks = torch.Generator().manual_seed(0), {}
            for name, layer in find_targets(pruned).items():
                weight = weight_view(layer).detach()
                masks[name] = (
                    torch.rand(grid_shape((weight.shape[0], weight.shape[1]), block), generator=generator) < density
                )
                scale_blocks_(weight, masks[name], block)
            path = folder / f"{block[0]}x{block[1]}_{density}"
            compress(pruned, masks).save_pretrained(path)
            facts[path] = {"engine": "hf_sparse", "block_shape": list(block), "density": density}
    for path, fact in facts.items():
        fact["bytes"] = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return facts


def check(folder: Path, inputs: Mapping[str, Tensor]) -> float:
    """Compare the logits of a folder with those of its dense copy.

    Returns:
        Largest difference.

    Raises:
        MismatchError: if it is too large; nothing is timed then.
    """
    with torch.inference_mode():
        right = load_dense(AutoModelForSequenceClassification, folder)(**inputs).logits
        return check_close(right, AutoModelForSequenceClassification.from_pretrained(folder)(**inputs).logits)


def time_loads(
    calls: Mapping[Any, Callable[[], object]], rounds: int, clock: str = "wall"
) -> dict[Any, tuple[float, list[float]]]:
    """Time callables in turn, with the garbage of the one before cleared away.

    Returns:
        {name: (median, [first, third quartile])} in milliseconds, in the order of `calls`.
    """
    now, names = CLOCKS[clock], list(calls)
    taken: dict[Any, list[float]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            start = now()
            result = calls[name]()
            taken[name].append(1e3 * (now() - start))
            del result
    # The first round warms the caches up.
    edges = {name: statistics.quantiles(samples[1:], method="inclusive") for name, samples in taken.items()}
    return {name: (median, [low, high]) for name, (low, median, high) in edges.items()}


def measure(name: str, facts: Mapping[Path, dict[str, Any]], rounds: int, clock: str) -> list[dict[str, Any]]:
    """Measure all folders of a model.

    Args:
        name: of the model.
        facts: as `save_models` gives.
        rounds: how often each folder is loaded, for each of the two things that are timed.
        clock: one of `timing.CLOCKS`.

    Returns:
        Two rows per folder; "ratio" is its median over that of the dense folder, so below 1 is faster.
    """
    dense = next(iter(facts))
    config = AutoModelForSequenceClassification.from_pretrained(dense).config
    inputs = token_inputs([BATCH], [LENGTH], config.vocab_size)[0]
    errors = {path: check(path, inputs) for path in facts}

    def load(path: Path) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(path)

    def load_and_call(path: Path) -> Any:
        with torch.inference_mode():
            return load(path)(**inputs)

    fresh = {path: _in_a_process_of_its_own(path, inputs) for path in facts}
    calls = {(what.__name__, path): partial(what, path) for what in (load, load_and_call) for path in facts}
    timings = time_loads(calls, rounds, clock)
    rows = []
    for (what, path), (median, spread) in timings.items():
        rows.append(
            {
                "what": what,
                "model": name,
                **facts[path],
                "device": "cpu",
                "dtype": "float32",
                "batch": BATCH,
                "length": LENGTH,
                "threads": torch.get_num_threads(),
                "ms": round(median, 3),
                "spread": [round(edge, 3) for edge in spread],
                "runs": rounds,
                "ratio": round(median / timings[what, dense][0], 3),
                **{fact: round(value, 1) for fact, value in fresh[path][what].items()},
                "max_error": errors[path],
            }
        )
    return rows


def _in_a_process_of_its_own(folder: Path, inputs: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    given = json.dumps({name: tensor.tolist() for name, tensor in inputs.items()})
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-c", CHILD, str(folder), threads, given]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1])


def summary(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out as a table."""
    lines = ["model      block  density  MB      load          load and first call  memory MiB"]
    for load, call in zip(
        *([row for row in rows if row["what"] == w] for w in ("load", "load_and_call")), strict=True
    ):
        block = "x".join(map(str, load["block_shape"] or ["dense"]))
        lines.append(
            f"{load['model']:10} {block:6} {load['density']:<7} {load['bytes'] / 1e6:6.1f}"
            f"  {load['ms']:6.1f} ms {load['ratio']:4.2f}x  {call['ms']:6.1f} ms {call['ratio']:4.2f}x"
            f"    {load['memory_mib']:6.1f} {call['memory_mib']:6.1f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> Path:
    """Measure everything asked for and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rounds", type=int, default=21, help="at least 2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "loading.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    models, blocks, densities = options.model, BLOCKS, DENSITIES
    if options.smoke:
        models, blocks, densities = ["tiny"], [(8, 1)], [0.5]
    rows, start = [], time.perf_counter()
    for name in models:
        with tempfile.TemporaryDirectory() as folder:
            facts = save_models(make_model(name), Path(folder), blocks, densities)
            rows += measure(name, facts, options.rounds, options.clock)
        print(f"{name} done after {time.perf_counter() - start:.0f} s", flush=True)
    print(summary(rows))
    command = shlex.join(["python", "benchmarks/loading.py", *(sys.argv[1:] if arguments is None else arguments)])
    result = {"command": command, "clock": options.clock, **environment(REPOSITORY), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} rows in {options.out}")
    return options.out


if __name__ == "__main__":
    main()

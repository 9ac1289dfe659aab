"""How much faster other engines run a model once its dead units and heads are cropped, beside the model with zeros.

Weights are random: units and heads are removed whole, as `feed_forward="units"` does, and what is timed depends on
sizes alone. Values are compared with the model's own first; each engine runs both in turn in one process.

Usage: python benchmarks/cropping.py [--smoke] [--model minilm bert-base] [--seconds 4] [--out FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import BertConfig, BertModel  # noqa: E402

from benchmarks.timing import time_in_turns  # noqa: E402
from hf_sparse.core.structure.targets import weight_view  # noqa: E402
from hf_sparse.inference.exits.crop import crop  # noqa: E402
from hf_sparse.inference.exits.structure import croppable_layers  # noqa: E402
from hf_sparse.inference.measuring.bench import check_close, token_inputs  # noqa: E402
from hf_sparse.inference.measuring.engines import make_engines  # noqa: E402
from hf_sparse.inference.measuring.environment import environment  # noqa: E402

SIZES: dict[str, dict[str, Any]] = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "smoke": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
}
# Shares of units and of heads that are left.
KEPT = [(0.5, 1.0), (0.2, 1.0), (0.2, 0.5)]
LENGTH = 128


def pruned_model(size: str, units: float, heads: float) -> Any:
    """Make an encoder in which only a share of the units and heads is alive; a constant is left of each dead one."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=1000, **SIZES[size]), add_pooling_layer=False).eval()
    with torch.no_grad():
        for layer in croppable_layers(model):
            up, value = layer.get(layer.feed_forward.up), layer.get("attention.self.value")
            up.bias.normal_(std=0.1)
            value.bias.normal_(std=0.1)
            weight_view(up)[round(units * up.out_features) :] = 0
            weight_view(value)[round(heads * value.out_features) :] = 0
    return model


def measure(size: str, units: float, heads: float, seconds: float) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Time every engine there is on both models.

    Returns:
        One row per engine and variant; {engine: why it was left out}.
    """
    zeros = pruned_model(size, units, heads)
    cut = crop(copy.deepcopy(zeros), uneven=True)
    inputs = token_inputs([1], [LENGTH], 1000)
    calls: dict[str, Callable[[], Tensor]] = {}
    skipped: dict[str, str] = {}
    with torch.inference_mode():
        truths = [zeros(**given)[0] for given in inputs]
        for variant, model in (("zeros", zeros), ("cropped", cut)):
            engines, left = make_engines(model, ["onnxruntime", "openvino"], inputs, truths)
            skipped |= left
            calls[f"eager/{variant}"] = partial(_eager, model, inputs[0])
            calls |= {f"{name}/{variant}": partial(engine, inputs[0]) for name, engine in engines.items()}
        errors = {name: check_close(truths[0], call()) for name, call in calls.items()}
        timings = time_in_turns(calls, seconds=seconds, rounds=5, threads=1, clock="process")
    rows = []
    for name, timing in timings.items():
        engine, variant = name.split("/")
        rows.append(
            {
                "model": size, "units_kept": units, "heads_kept": heads, "engine": engine, "variant": variant,
                "batch": 1, "length": LENGTH, "threads": 1, "dtype": "float32", **timing.row(),
                "max_error": errors[name],
            }
        )  # fmt: skip
    return rows, skipped


def _eager(model: Any, given: dict[str, Tensor]) -> Tensor:
    output: Tensor = model(**given)[0]
    return output


def main(arguments: list[str]) -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(SIZES), default=["minilm", "bert-base"])
    parser.add_argument("--seconds", type=float, default=4.0, help="at least, per cell; all its engines together")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that it works")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "cropping.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/cropping.py", *arguments]), **environment(REPOSITORY),
        "skipped": {}, "rows": [],
    }  # fmt: skip
    for size in ["smoke"] if given.smoke else given.model:
        for units, heads in KEPT:
            rows, skipped = measure(size, units, heads, 0.0 if given.smoke else given.seconds)
            results["rows"] += rows
            results["skipped"] |= skipped
            for row in rows:
                print(f"{size} {units:.0%} {heads:.0%} {row['engine']:<12} {row['variant']:<8} {row['ms']:.3f} ms")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

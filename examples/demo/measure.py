"""Run in a process of its own: loads both models as a user would, checks that they are right, then measures them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.utils import logging

import hf_sparse  # noqa: F401 (lets from_pretrained read the compressed model)
from examples.demo.predict import pad_and_tokenize, predict_logits
from examples.demo.settings import Paths, Settings
from hf_sparse import decompress, report
from hf_sparse.inference.measuring.bench import check_close, compare_models, time_interleaved

BATCHES = (1, 8)
DENSE_ENGINE = "torch eager, fp32, scaled dot product attention"


def measure(paths: Paths, settings: Settings) -> dict[str, Any]:
    """Check and measure the two saved models side by side.

    Args:
        paths: where the models and the test split are.
        settings: of the run.

    Returns:
        {"accuracy": {"dense", "pruned"}, "bytes": the same, "layer_bytes": the same, "load": [...], "speed": [...],
        "checks": {...}, "dense_engine": in words}; `speed` as `compare_models` gives it.

    Raises:
        MismatchError: if the loaded model is not the one that was trained; nothing is measured then.
        ValueError: if `pipeline(...)` answers otherwise than the model.
    """
    with tqdm(total=7, desc="measuring", unit=" steps") as bar:
        tokenizer = AutoTokenizer.from_pretrained(paths.pruned)
        rows = Dataset.from_parquet(str(paths.data / "test.parquet"), cache_dir=str(paths.root / "cache"))
        texts, labels = list(rows["text"]), torch.tensor(rows["label"])
        models = {name: _load(folder) for name, folder in (("dense", paths.dense), ("pruned", paths.pruned))}
        _done(bar, "evaluating the dense model")
        logits = {"dense": predict_logits(models["dense"], tokenizer, texts, settings)}
        _done(bar, "evaluating the pruned model")
        logits["pruned"] = predict_logits(models["pruned"], tokenizer, texts, settings)
        error = check_close(load_file(paths.expected)["logits"], logits["pruned"])
        _done(bar, "asking the pipeline")
        asked = texts[: 4 * BATCHES[-1]]
        _check_pipeline(paths.pruned, asked, logits["pruned"][: len(asked)])
        _done(bar, "timing the loading")
        inputs = [_batch(tokenizer, texts, size, settings) for size in BATCHES]
        load = _time_loading(paths, inputs[0], settings)
        reference = decompress(_load(paths.pruned))
        speed = []
        for given in inputs:
            _done(bar, f"timing batches of {len(given['input_ids'])}")
            speed += compare_models(
                models["dense"], models["pruned"], [given], reference, settings.timing_seconds, settings.timing_rounds
            )
        _done(bar, "done")
    return {
        "accuracy": {name: float((found.argmax(-1) == labels).float().mean()) for name, found in logits.items()},
        "bytes": {name: _weight_bytes(folder) for name, folder in (("dense", paths.dense), ("pruned", paths.pruned))},
        "layer_bytes": _layer_bytes(paths.pruned),
        "load": load,
        "speed": speed,
        "checks": {"logits_max_error": error, "logits_rows": len(texts), "pipeline_rows": len(asked)},
        "dense_engine": DENSE_ENGINE,
    }  # fmt: skip


def _done(bar: Any, doing: str) -> None:
    bar.set_description(doing)
    bar.update()


def _load(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def _time_loading(paths: Paths, given: Any, settings: Settings) -> list[dict[str, Any]]:
    # Weights are mapped into memory and kernels laid out on first use, so loading alone is half the story.
    folders = {"dense": paths.dense, "hf_sparse": paths.pruned}
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for engine, folder in folders.items():
        calls["load", engine] = partial(_load, folder)
        calls["load and first answer", engine] = partial(_load_and_answer, folder, given)
    timings = time_interleaved(calls, settings.timing_seconds, settings.timing_rounds, warmup=1)
    return [
        {"what": what, "engine": engine, "ms": round(timing.median_ms, 2),
         "spread": [round(timing.low_ms, 2), round(timing.high_ms, 2)], "runs": timing.runs}
        for (what, engine), timing in sorted(timings.items())
    ]  # fmt: skip


def _load_and_answer(folder: Path, given: Any) -> Any:
    with torch.inference_mode():
        return _load(folder)(**given)


def _check_pipeline(folder: Path, texts: list[str], logits: torch.Tensor) -> None:
    classify: Any = pipeline("text-classification", model=str(folder), device="cpu")
    names = [classify.model.config.id2label[label] for label in logits.argmax(-1).tolist()]
    answers = [answer["label"] for answer in classify(texts)]
    if answers != names:
        row = next(i for i, (answer, name) in enumerate(zip(answers, names, strict=True)) if answer != name)
        raise ValueError(f"pipeline(...) says {answers[row]!r} to {texts[row]!r}, the model itself {names[row]!r}.")


def _batch(tokenizer: Any, texts: Sequence[str], size: int, settings: Settings) -> Any:
    # One sentence is the median one; eight are short and long ones, padded to the longest as in real use.
    order = sorted(texts, key=len)
    picked = [order[(2 * i + 1) * len(order) // (2 * size)] for i in range(size)]
    return pad_and_tokenize(tokenizer, picked, settings)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))


def _layer_bytes(folder: Path) -> dict[str, int]:
    layers = report(folder).layers
    return {"dense": sum(layer.dense_bytes for layer in layers), "pruned": sum(layer.bytes for layer in layers)}


def main(root: str, settings: str, output: str) -> None:
    """Measure what lies in `root` with `settings` (JSON) and write the numbers to `output`."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    chosen = Settings.from_dict(json.loads(settings))
    Path(output).write_text(json.dumps(measure(Paths(Path(root)), chosen)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

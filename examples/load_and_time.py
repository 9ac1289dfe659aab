"""Load a compressed model, make sure that it computes what its dense copy does, and time both.

python examples/load_and_time.py FOLDER      a folder that SparseDistillTrainer or save_pretrained wrote
python examples/load_and_time.py --smoke     a tiny one, offline
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from tiny_task import write_model
from transformers import AutoModelForSequenceClassification

import hf_sparse  # registers the file format, so that plain from_pretrained reads it
from hf_sparse.inference.measuring.bench import compare_models, token_inputs


def load_and_time(folder: str, batches: list[int], length: int, seconds: float) -> None:
    """Print sparsity, the largest difference between the logits, and a line per engine and batch size."""
    print(hf_sparse.report(folder))
    pruned = AutoModelForSequenceClassification.from_pretrained(folder)
    dense = hf_sparse.load_dense(AutoModelForSequenceClassification, folder)
    inputs = token_inputs(batches, [length], pruned.config.vocab_size)
    with torch.inference_mode():
        largest = max(float((pruned(**x).logits - dense(**x).logits).abs().max()) for x in inputs)
    print(f"largest difference between the logits: {largest:.2e}")
    # Times nothing if the two disagree by more than rounding.
    for row in compare_models(dense, pruned, inputs, seconds=seconds):
        low, high = row["spread"]
        print(
            f"{row['engine']:<10} batch {row['batch']:<3} {row['ms']:9.2f} ms  (middle half {low:.2f} to {high:.2f})"
        )


def write_pruned(folder: Path) -> str:
    """Save a tiny model, compressed to 80 % sparsity."""
    model = AutoModelForSequenceClassification.from_pretrained(write_model(folder, with_head=True))
    masks = hf_sparse.BlockMasks.for_model(model, block_shape=(8, 1))
    masks.choose(sparsity=0.8)
    masks.apply_()
    hf_sparse.compress(model, masks.masks).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each batch size")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    if given.smoke == (given.folder is not None):
        parser.error("give a folder, or --smoke")
    with tempfile.TemporaryDirectory() as scratch:
        load_and_time(given.folder or write_pruned(Path(scratch)), given.batches, given.length, given.seconds)

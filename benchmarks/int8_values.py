"""What kept blocks stored as int8 would save and cost: bytes and perplexity of a compressed language model.

The kept values of every compressed layer are rounded to float32 (as they are), bfloat16, and int8 with one float32
scale per output row (symmetric, the largest |value| of the row is 127); everything else stays float32, or becomes
bfloat16. What is int8 is computed in the dtype of all else. Perplexity is measured on the same text for each.

Usage: python benchmarks/int8_values.py MODEL --text FILE [--block_size 128] [--blocks 400] [--out FILE]
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from hf_sparse import report  # noqa: E402
from hf_sparse.inference.compress import compressed_layers  # noqa: E402
from hf_sparse.inference.layers.linear import BlockSparseLinear  # noqa: E402
from hf_sparse.inference.measuring.environment import environment  # noqa: E402

STORAGES = ("float32", "bfloat16", "int8", "int8, all else bfloat16")


def round_int8(layer: BlockSparseLinear) -> Tensor:
    """Round the kept values of a layer to int8 with a scale per output row, and give them back as floats.

    Args:
        layer: compressed.

    Returns:
        [N, h, w], the dtype of the values.

    Example:
        >>> layer = BlockSparseLinear.from_dense(torch.tensor([[127.0, 3.4]]), torch.ones(1, 2).bool(), (1, 1))
        >>> round_int8(layer).flatten().tolist()
        [127.0, 3.0]
    """
    values, rows = layer.weight.detach().float(), layer.index().rows
    height = layer.block_shape[0]
    # [N, h]: the output row of each row of each block.
    outputs = rows[:, None] * height + torch.arange(height)
    largest = torch.zeros(layer.out_features).scatter_reduce(
        0, outputs.flatten(), values.abs().amax(dim=2).flatten(), "amax"
    )
    scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)[outputs][:, :, None]
    return ((values / scale).round().clamp(-127, 127) * scale).to(layer.weight.dtype)


def perplexity(model: Any, blocks: Tensor) -> float:
    """Perplexity of the next token. blocks: [B, T] token ids."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in blocks.split(16):
            loss = model(input_ids=batch, labels=batch).loss
            total, count = total + float(loss) * batch[:, 1:].numel(), count + batch[:, 1:].numel()
    return math.exp(total / count)


def text_blocks(file: Path, tokenizer: Any, size: int, limit: int) -> Tensor:
    """Join the lines of a text file and cut them, as examples/run_clm.py does: [B, T] token ids."""
    opened = gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8")
    with opened as handle:
        lines = [line for line in handle.read().splitlines() if line.strip()]
    ids = [token for row in tokenizer(lines)["input_ids"] for token in [*row, tokenizer.eos_token_id]]
    count = min(limit, len(ids) // size)
    return torch.tensor(ids[: count * size]).view(count, size)


def measure(folder: str, storage: str, blocks: Tensor) -> dict[str, Any]:
    """Measure one way to store the values."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    weights = report(folder)
    layers = compressed_layers(model)
    values = sum(layer.weight.numel() for layer in layers.values())
    masks = sum(layer.weight_block_mask.numel() for layer in layers.values())
    others = weights.bytes - 4 * values - masks
    stored = (2 if storage == "bfloat16" else 4) * values
    if storage.startswith("int8"):
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.copy_(round_int8(layer))
        stored = values + sum(4 * layer.out_features for layer in layers.values())
    if storage.endswith("bfloat16"):
        model, others = model.to(torch.bfloat16), others // 2
    return {
        "storage": storage, "sparsity": round(weights.sparsity, 4), "values": values, "layer_bytes": stored + masks,
        "model_bytes": stored + masks + others, "perplexity": perplexity(model, blocks), "tokens": blocks.numel(),
    }  # fmt: skip


def main(arguments: list[str]) -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a compressed language model")
    parser.add_argument("--text", type=Path, required=True, help="text file, gzipped or not")
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=400)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "int8_values.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    blocks = text_blocks(given.text, AutoTokenizer.from_pretrained(given.model), given.block_size, given.blocks)
    rows = [measure(given.model, storage, blocks) for storage in STORAGES]
    for row in rows:
        print(
            f"{row['storage']:<25} {row['layer_bytes']:>12,} {row['model_bytes']:>12,} bytes  {row['perplexity']:.3f}"
        )
    shown = ["python", "benchmarks/int8_values.py", "MODEL", "--text", given.text.name]
    results = {"command": shlex.join(shown), **environment(REPOSITORY), "rows": rows}
    given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

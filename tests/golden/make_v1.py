"""Wrote the files of tests/golden/v1. They stay as they are for ever; no test runs this.

Run from the root of the repository: python -m tests.golden.make_v1 NEW_FOLDER
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from hf_sparse import compress
from hf_sparse.core.blocks import grid_shape, scale_blocks_
from hf_sparse.core.structure.targets import find_targets, weight_view
from hf_sparse.inference.compress import compressed_layers

IDS = [[3, 9, 4, 1], [7, 2, 11, 5]]
BLOCKS = [(4, 1), (1, 4), (2, 2), (4, 4), (1, -1), (-1, 1), (1, 1), (8, 4), (8, 1)]


def main(folder: Path) -> None:
    """Write one folder per model."""
    torch.manual_seed(20)
    bert = tf.BertForSequenceClassification(
        tf.BertConfig(
            vocab_size=12,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
            num_labels=3,
        )
    )
    gpt2 = tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=12, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    write(bert.eval(), folder / "bert")
    write(gpt2.eval().to(torch.bfloat16), folder / "gpt2")


def write(model: Any, folder: Path) -> None:
    """Prune a model, every layer with another block shape, compress it, and note what it must load as."""
    masks, digests = {}, {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for number, (name, module) in enumerate(find_targets(model).items()):
            weight = weight_view(module).detach()
            h, w = BLOCKS[number % len(BLOCKS)]
            block = (weight.shape[0] if h == -1 else h, weight.shape[1] if w == -1 else w)
            masks[name] = torch.rand(grid_shape(tuple(weight.shape), block)) < 0.4
            # The first layer keeps nothing, the last but one keeps all but one block.
            if number == 0:
                masks[name][:] = False
            if number == len(find_targets(model)) - 2:
                masks[name][:] = True
                masks[name][0, 0] = False
            scale_blocks_(weight, masks[name], block)
            # Zero has a sign, which a pruned block does not keep.
            weight.add_(0.0)
        compress(model, masks)
        for name, layer in compressed_layers(model).items():
            digests[name] = digest(layer.dense_weight())
        model.save_pretrained(folder)
        logits = model.to(torch.float64)(input_ids=torch.tensor(IDS)).logits
    expected = {"input_ids": IDS, "logits": logits.tolist(), "dense_sha256": digests}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


def digest(weight: Tensor) -> str:
    """SHA-256 of the bytes of a dense weight [O, I] in its own dtype, row by row."""
    return hashlib.sha256(weight.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

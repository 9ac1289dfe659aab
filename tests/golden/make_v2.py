"""Wrote the files of tests/golden/v2: a mixture of experts. They stay as they are for ever; no test runs this.

Run from the root of the repository: python -m tests.golden.make_v2 NEW_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers as tf

from hf_sparse import compress
from hf_sparse.core.blocks import grid_shape, scale_blocks_
from hf_sparse.core.structure.targets import find_targets, tiled_shape, weight_view
from hf_sparse.inference.compress import compressed_experts, compressed_layers
from tests.golden.make_v1 import IDS, digest

BLOCKS = [(4, 1), (1, 4), (2, 2), (-1, 1), (1, -1), (8, 1), (2, 4)]


def main(folder: Path) -> None:
    """Write a Mixtral of 2 layers and 3 experts: every weight in blocks of another shape, one expert without any."""
    torch.manual_seed(21)
    model = tf.MixtralForCausalLM(
        tf.MixtralConfig(
            vocab_size=12,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
            num_experts_per_tok=2,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    masks = {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for number, (name, target) in enumerate(find_targets(model).items()):
            weight, (rows, cols) = weight_view(target).detach(), tiled_shape(target)
            h, w = BLOCKS[number % len(BLOCKS)]
            block = (rows if h == -1 else h, cols if w == -1 else w)
            masks[name] = torch.rand(grid_shape(tuple(weight.shape), block)) < 0.4
            if name.endswith("layers.0.mlp.experts.down_proj"):
                masks[name][: masks[name].shape[0] // 3] = False
            scale_blocks_(weight, masks[name], block)
            # Zero has a sign, which a pruned block does not keep.
            weight.add_(0.0)
        # One fused parameter keeps all its blocks, and is stored dense.
        del masks["model.layers.1.mlp.experts.down_proj"]
        compress(model, masks)
        digests = {name: digest(layer.dense_weight()) for name, layer in compressed_layers(model).items()}
        for name, experts in compressed_experts(model).items():
            digests |= {f"{name}.{part}": digest(weight) for part, weight in experts.dense_weights().items()}
        model.save_pretrained(folder)
        # The only one of transformers' ways to compute experts that takes float64.
        model.set_experts_implementation("eager")
        logits = model.to(torch.float64)(input_ids=torch.tensor(IDS)).logits
    expected = {"input_ids": IDS, "logits": logits.tolist(), "dense_sha256": digests}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) / "mixtral")

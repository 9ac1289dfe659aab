"""Why the choice of blocks matters: how much of what dense linears put out survives it, before any training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.grid.cell import Sources, load_rows
from hf_sparse import BlockMasks
from hf_sparse.core.structure.targets import weight_view
from hf_sparse.training.pruning.importance import activation, input_rms

_ROWS = 32


@torch.no_grad()
def kept_energy(
    task: str, settings: Mapping[str, Any], sources: Sources, sparsity: float = 0.8
) -> dict[str, dict[str, float]]:
    """Compare both kinds of importance on the dense model of a task, in 8 x 1 blocks.

    The energy of a weight is its square times the mean square of the input feature it meets: what it adds to the mean
    square of the outputs if input features are taken as uncorrelated. Inputs are measured on the first training rows.

    Returns:
        {kind of linear: {"magnitude", "activation": share of the energy in the blocks kept, mean over layers;
        "input_rms_low", "input_rms_high": smallest and largest over input features, mean over layers}}.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sources.model)
    model = AutoModelForSequenceClassification.from_pretrained(sources.dense(task))
    rows = load_rows(task, settings, sources, tokenizer)["train"].select(range(_ROWS))
    batch = tokenizer.pad(
        {key: rows[key] for key in ("input_ids", "attention_mask")}, padding=True, return_tensors="pt"
    )
    masks = BlockMasks.for_model(model, (8, 1))
    rms = input_rms(model, masks.targets, [dict(batch)])
    scores = {name: activation(weight_view(m), (8, 1), rms[name]) for name, m in masks.targets.items()}
    found: dict[str, dict[str, list[float]]] = {}
    for importance, given in (("magnitude", None), ("activation", scores)):
        chosen = BlockMasks.for_model(model, (8, 1))
        chosen.choose(sparsity, given)
        for name, mask in chosen.masks.items():
            # scores are root mean squares over blocks of one size: their squares add up to the energy.
            energy = scores[name].square()
            kind = name.split(".layer.")[1].split(".", 1)[1]
            row = found.setdefault(kind, {})
            row.setdefault(importance, []).append(float(energy[mask].sum() / energy.sum()))
            if given is None:
                row.setdefault("input_rms_low", []).append(float(rms[name].min()))
                row.setdefault("input_rms_high", []).append(float(rms[name].max()))
    return {k: {key: round(sum(v) / len(v), 4) for key, v in row.items()} for k, row in found.items()}

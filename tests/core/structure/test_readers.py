"""Linears that somebody reads without calling them cannot be compressed."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from hf_sparse.core.structure.readers import is_read_elsewhere, reader_of, refuse_read_without_call


def mamba() -> tf.MambaForCausalLM:
    torch.manual_seed(0)
    return tf.MambaForCausalLM(
        tf.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4)
    )


def test_readers_are_named() -> None:
    model = mamba()
    assert reader_of(model, "backbone.layers.1.mixer.dt_proj") == "MambaMixer"
    assert reader_of(model, "backbone.layers.1.mixer.in_proj") is None
    assert reader_of(model, "lm_head") is None
    with pytest.raises(ValueError, match=r"MambaMixer reads .* backbone\.layers\.0\.mixer\.dt_proj .*exclude_modules"):
        refuse_read_without_call(model, "backbone.layers.0.mixer.dt_proj")
    refuse_read_without_call(model, "backbone.layers.0.mixer.out_proj")


def test_layers_of_torch() -> None:
    model = nn.ModuleDict({"layer": nn.TransformerEncoderLayer(8, 2, 16), "head": nn.Linear(8, 2)})
    assert is_read_elsewhere(model, "layer.linear1") and not is_read_elsewhere(model, "head")


@pytest.mark.parametrize("name", ["MambaMixer", "FalconMambaMixer", "JambaMambaMixer", "WavLMAttention"])
def test_transformers_still_has_the_classes(name: str) -> None:
    folder = {"MambaMixer": "mamba", "FalconMambaMixer": "falcon_mamba", "JambaMambaMixer": "jamba",
              "WavLMAttention": "wavlm"}[name]  # fmt: skip
    module = __import__(f"transformers.models.{folder}.modeling_{folder}", fromlist=[name])
    assert hasattr(module, name)

"""Models that cannot be pruned are refused at once, saying what was found and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from hf_sparse.core.structure.targets import find_targets
from hf_sparse.training.distillation.graft import graft_sites
from tests.mixtures import gpt_oss
from tests.training.tiny import SMALL, VOCAB, llama, make_trainer, rows

NO_STACK = "Strange has no nn.ModuleList of repeated layers"


class Strange(nn.Module):
    """One part beside a head, called like a classifier of tokens."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.head = part, nn.Linear(16, 3)


class Scaled(nn.Linear):
    """A linear that computes something else than one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2.0


def scaled_layers() -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(Scaled(16, 16), Scaled(16, 16)) for _ in range(2))


@pytest.mark.parametrize(("model", "message"), [
    (nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU()),
     "Sequential has no nn.Linear or Conv1D layer, so there is nothing to prune"),
    (Strange(nn.LSTM(16, 16, num_layers=2)),
     "Strange has no nn.ModuleList of repeated layers, .* Name them with target_modules; the first linears are head"),
    (Strange(nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(3))), NO_STACK),
    (Strange(nn.ModuleList([nn.Sequential(nn.Linear(16, 16)), nn.TransformerEncoderLayer(16, 2)])),
     NO_STACK),
    (Strange(scaled_layers()),
     r"linears inside part of Strange are subclasses of nn.Linear, such as part.0.0, a Scaled\. .* outside are head"),
    (Strange(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 2)),
     "Strange has no linear layer that could be pruned inside part.layers: their weights are shared, or read by"),
])  # fmt: skip
def test_what_was_found_and_what_is_missing(tmp_path: Path, model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_targets(model)
    with pytest.raises(ValueError, match=message):
        make_trainer(model, tmp_path, rows("tagging", 8), save_format="dense")


def test_named_layers_of_a_strange_model_are_pruned(tmp_path: Path) -> None:
    assert list(find_targets(Strange(nn.LSTM(16, 16)), "head")) == ["head"]
    with pytest.raises(ValueError, match="Strange has no stack of repeated layers to graft: set graft_start=1"):
        graft_sites(Strange(nn.LSTM(16, 16)), Strange(nn.LSTM(16, 16)))
    with pytest.raises(ValueError, match="save_format='compressed' needs a PreTrainedModel with a config"):
        make_trainer(Strange(nn.LSTM(16, 16)), tmp_path, rows("tagging", 8), target_modules="head")


def test_experts_that_are_linears_are_pruned_like_any_other() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(16, 2)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)) for _ in range(2))

    found = find_targets(Strange(nn.ModuleList(Layer() for _ in range(2))), exclude_modules=r".*\.gate")
    assert list(found) == [f"part.{i}.experts.{e}.{w}" for i in range(2) for e in range(2) for w in range(2)]


def test_a_mixture_whose_attention_is_left_out_has_nothing_to_prune_where_experts_stay_dense() -> None:
    with pytest.raises(ValueError, match="exclude_modules='.*attn.*' leaves no layer to prune"):
        find_targets(gpt_oss(), exclude_modules=".*attn.*")


def test_layers_of_a_state_space_model_are_found_by_the_same_rule() -> None:
    # Nothing here knows Mamba: its layers are a list of one class with linears inside.
    config = tf.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)
    found = {name.split(".", 3)[-1] for name in find_targets(tf.MambaForCausalLM(config))}
    assert found == {"mixer.in_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"}


def test_another_family_as_teacher_cannot_be_grafted() -> None:
    config = tf.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2)
    other: Any = tf.GPT2LMHeadModel(config)
    with pytest.raises(ValueError, match=r"the student has \['model.layers'\], the teacher \['transformer.h'\]"):
        graft_sites(llama(), other)


@pytest.mark.parametrize(("change", "message"), [
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rope_parameters is .*10000.* and .*500.0"),
    ({"head_dim": 16}, "head_dim is 8 in the student and 16 in the teacher"),
])  # fmt: skip
def test_a_teacher_with_other_positions_cannot_be_grafted(change: dict[str, Any], message: str) -> None:
    # Its layers would run with the positions that the student's own were trained for, and nobody would notice.
    with pytest.raises(ValueError, match=f"grafting needs layers that can be handed the same .*: {message}"):
        graft_sites(llama(), llama(5, **change))


def test_a_teacher_with_windows_elsewhere_cannot_be_grafted() -> None:
    sizes = {"vocab_size": VOCAB, **SMALL, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4}
    kinds = ["sliding_attention", "full_attention"]
    models: list[Any] = [
        tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**sizes, layer_types=order)) for order in (kinds, kinds[::-1])
    ]
    with pytest.raises(ValueError, match=r"layer_types is \['sliding_attention', 'full_attention'\] in the student"):
        graft_sites(*models)

"""Learned projections of the student's hidden states to the width of a wider or narrower teacher's.

They belong to the run and not to the model: the optimizer trains them beside it, training checkpoints keep them, the
final model does not.

Source: TinyBERT (Jiao et al., 2020): one linear map, shared by all layers of a stack.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hf_sparse.core.stored.packing import FormatError
from hf_sparse.training.distributed import sum_over_ranks, world_size

FILE = "hidden_projections.safetensors"


class HiddenProjections(nn.ModuleDict):
    """One linear map without bias for each side of a model (`layerwise.Side`) where the widths differ.

    Args:
        widths: {side: (student's hidden size, teacher's)}.
        seed: of the initial values, which are normal and keep the size of the states.

    Example:
        >>> HiddenProjections({"": (4, 6)}, seed=0).get("")(torch.ones(2, 3, 4)).shape
        torch.Size([2, 3, 6])
    """

    def __init__(self, widths: Mapping[str, tuple[int, int]], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        maps = {}
        for side, (own, other) in widths.items():
            # Without the usual first values, which would draw from the run's own random numbers.
            maps[_key(side)] = linear = nn.utils.skip_init(nn.Linear, own, other, bias=False)
            nn.init.normal_(linear.weight, std=own**-0.5, generator=generator)
        super().__init__(maps)

    def get(self, side: str) -> nn.Module | None:
        """Give the map of a side; None where the widths agree."""
        return self[_key(side)] if _key(side) in self else None

    def add_to(self, optimizer: torch.optim.Optimizer) -> bool:
        """Let the student's optimizer train the maps as well, without weight decay.

        Returns:
            Whether they were new to it; the second time nothing is done.
        """
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(parameter) in known for parameter in self.parameters()):
            return False
        optimizer.add_param_group({"params": list(self.parameters()), "weight_decay": 0.0})
        return True

    def average_gradients_(self) -> None:
        """Take the mean of the gradients over ranks, as a distributed wrapper does for the student's."""
        for parameter in self.parameters():
            if world_size() > 1:
                # Every rank takes part, also one whose batches gave no gradient.
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = sum_over_ranks(gradient) / world_size()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the maps into a training checkpoint, whole or not at all."""
        target = Path(folder) / FILE
        staged = target.with_name(f".{FILE}.{os.getpid()}")
        save_file({name: value.cpu().contiguous() for name, value in self.state_dict().items()}, staged)
        os.replace(staged, target)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Read the maps from a training checkpoint.

        Raises:
            ValueError: if the checkpoint has none, or they have other widths.
            FormatError: if the file is damaged.
        """
        file = Path(folder) / FILE
        if not file.is_file():
            raise ValueError(
                f"{folder} holds no {FILE}, but the teacher is of another width: the run was begun with another "
                f"teacher, or without hidden_weight. Resume it as it was begun."
            )
        try:
            self.load_state_dict(load_file(file))
        except SafetensorError as error:
            raise FormatError(f"{file} is damaged: {error}. Resume from another checkpoint.") from error
        except RuntimeError as error:
            raise ValueError(f"{file} does not fit the teacher: {error}") from error


def needed_projections(student: nn.Module, teacher: nn.Module, seed: int) -> HiddenProjections | None:
    """Make projections where student and teacher have other hidden sizes.

    Returns:
        None where all sizes agree, or a config does not tell them (a difference is then refused when states meet).
    """
    own, others = hidden_sizes(student), hidden_sizes(teacher)
    widths = {side: (own[side], others[side]) for side in own if side in others and own[side] != others[side]}
    return HiddenProjections(widths, seed) if widths else None


def hidden_sizes(model: Any) -> dict[str, int]:
    """Give the width of the states of each side, as far as a model's config tells."""
    config = getattr(model, "config", None)
    if config is None:
        return {}
    sides: dict[str, Any] = {"": config.get_text_config() if hasattr(config, "get_text_config") else config}
    if getattr(config, "is_encoder_decoder", False):
        sides = {side: getattr(config, side, config) for side in ("encoder", "decoder")}
    elif hasattr(model, "logit_scale"):
        # Two towers that are compared by their product, each with a config of its own.
        sides = {side: getattr(config, f"{side}_config", None) for side in ("text", "vision", "audio")}
    sizes = {side: getattr(part, "hidden_size", None) for side, part in sides.items()}
    return {side: size for side, size in sizes.items() if isinstance(size, int)}


def _key(side: str) -> str:
    # A module cannot have an empty name.
    return side or "layers"

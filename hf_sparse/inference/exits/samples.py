"""What a model takes and gives, told from its config: inputs to export it with, and to check what came out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ExportError(ValueError):
    """A model cannot be exported, or what was exported computes something else. The message says why."""


def sample_inputs(model: Any, batch: int = 2, length: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Make inputs that a model of transformers takes: tokens with a mask, or images.

    Args:
        model: with a config.
        batch: samples; the last one of several ends two tokens early, if there are so many.
        length: tokens, where it takes tokens.
        seed: of the random values.

    Returns:
        {name: tensor}, in the order of the arguments of `forward`: "input_ids", "attention_mask", "token_type_ids"
        where the config has several types, "decoder_input_ids" where there is a decoder; or "pixel_values".

    Raises:
        ExportError: if the model takes something else.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    takes = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", None)
    made: dict[str, Tensor] = {}
    if main == "input_ids":
        vocabulary = config.get_text_config().vocab_size
        made["input_ids"] = torch.randint(min(3, vocabulary - 1), vocabulary, (batch, length), generator=generator)
        mask = torch.ones(batch, length, dtype=torch.int64)
        if batch > 1 and length > 3:
            mask[-1, -2:] = 0
        made["attention_mask"] = mask
        if getattr(config, "type_vocab_size", 0) > 1:
            made["token_type_ids"] = torch.zeros(batch, length, dtype=torch.int64)
        if config.is_encoder_decoder:
            made["decoder_input_ids"] = torch.randint(
                min(3, vocabulary - 1), vocabulary, (batch, length), generator=generator
            )
    elif main == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = size if isinstance(size, tuple | list) else (size, size)
        made["pixel_values"] = torch.randn(batch, config.num_channels, height, width, generator=generator)
    else:
        raise ExportError(
            f"{type(model).__name__} takes {main}, for which no inputs can be made up: give inputs={{name: tensor}} "
            f"as the model takes them."
        )
    return {name: made[name] for name in takes if name in made}


def dynamic_axes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Name the axes of inputs that may have any size: samples, and where there are two axes, the length as well.

    Example:
        >>> dynamic_axes({"input_ids": torch.ones(2, 8)})
        {'input_ids': {0: 'batch', 1: 'length'}}
    """
    axes = {}
    for name, tensor in inputs.items():
        length = "decoder_length" if name.startswith("decoder_") else "length"
        axes[name] = {0: "batch", 1: length} if tensor.ndim == 2 else {0: "batch"}
    return axes


class Plain(nn.Module):
    """A model with tensors as arguments and tensors as results, as tracers want it.

    Args:
        model: what is called.
        inputs: names of its arguments, in the order in which they are given here.
        outputs: names of its outputs; None gives the first one alone.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[str] | None = None) -> None:
        super().__init__()
        self.model = model
        self.inputs, self.outputs = tuple(inputs), outputs
        # Keys and values of past tokens are no result that anybody asked for.
        cached = "use_cache" in inspect.signature(model.forward).parameters
        self.options = {"use_cache": False} if cached else {}

    def forward(self, *tensors: Tensor) -> Any:
        """Call the model."""
        output = self.model(**dict(zip(self.inputs, tensors, strict=True)), **self.options)
        if isinstance(output, Tensor):
            return output
        return output[0] if self.outputs is None else tuple(output[name] for name in self.outputs)


def output_names(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[str]:
    """Name the outputs of a model that are tensors, such as "logits"; it is called once."""
    with torch.no_grad():
        output = model(**inputs, **Plain(model, list(inputs)).options)
    if not hasattr(output, "items"):
        raise ExportError(f"{type(model).__name__} gives a {type(output).__name__}, and no outputs with names.")
    return [name for name, value in output.items() if isinstance(value, Tensor)]

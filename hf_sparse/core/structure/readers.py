"""Linears whose weight the module around them reads without calling them.

Compressed, such a linear holds something else than its weight, which only its own forward understands.
"""

from __future__ import annotations

from torch import nn

# Modules of transformers that use the weights of linears by themselves: {class: names of the linears inside}.
_READ_BY_PARENT = {
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer", "JambaMambaMixer"), ("dt_proj",)),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


def is_read_elsewhere(model: nn.Module, name: str) -> bool:
    """Tell whether a linear stands in `nn.TransformerEncoderLayer`, whose fast path takes weights without a call."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer)


def reader_of(model: nn.Module, name: str) -> str | None:
    """Name the class of the module of transformers that reads the weight of a linear without calling the linear.

    Such a linear can be pruned and saved dense; compressed, the model would not run.

    Args:
        model: any module tree.
        name: of a linear in it, or of a parameter of fused experts.

    Returns:
        The name of the class; None if the linear is called as any other.
    """
    parent, _, child = name.rpartition(".")
    names = [cls.__name__ for cls in type(model.get_submodule(parent)).__mro__]
    return next((found for found in names if child in _READ_BY_PARENT.get(found, ())), None)


def refuse_read_without_call(model: nn.Module, name: str) -> None:
    """Refuse to compress a linear that its module would go on reading as a dense weight.

    Args:
        model: any module tree.
        name: of a linear with pruned blocks.

    Raises:
        ValueError: naming the module that reads it, and the way out.
    """
    if reader := reader_of(model, name):
        raise ValueError(
            f"{reader} reads the weight of {name} without calling it, so that the model would not run once that is "
            f"compressed. Leave it out with exclude_modules, or of the masks: it stays dense, zeros and all."
        )

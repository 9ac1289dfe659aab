"""Feed-forward units in a stack of BERT models: their blocks, and one score for all blocks of a unit."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_sparse.core.blocks import BlockShape

# The linears of a feed-forward part; attention has an output as well, which is square.
_INTO, _OUT = ".intermediate.dense", ".output.dense"


def check_units(config: Any, importance: str) -> None:
    """Refuse what is scored in blocks of one size alone.

    Raises:
        ValueError: naming the settings.
    """
    if config.feed_forward == "units" and (config.budget_scope == "global" or importance in ("taylor", "movement")):
        raise ValueError(
            f"feed_forward='units' with sparsity_scope={config.budget_scope!r} and importance={importance!r} is not "
            f"trained in stacks: run the cell by itself."
        )


def shape_in(config: Any, name: str, rows: int, columns: int) -> BlockShape:
    """Give the blocks (h, w) of a linear: units are rows of what leads in, columns of what leads out."""
    if config.feed_forward == "units" and name.endswith(_INTO):
        return 1, columns
    if config.feed_forward == "units" and name.endswith(_OUT) and columns > rows:
        return rows, 1
    return config.block_height, config.block_width


def tie_units_(scores: dict[str, Tensor]) -> None:
    """Give both blocks of a unit the geometric mean of their scores, as `hf_sparse.training.pruning.units` does.

    Args:
        scores: {name: [N, R, C]}; changed in place.
    """
    for name in [name for name in scores if name.endswith(_INTO)]:
        out = name.removesuffix(_INTO) + _OUT
        unit = scores[name].flatten(1).sqrt() * scores[out].flatten(1).sqrt()
        scores[name], scores[out] = unit.view_as(scores[name]), unit.view_as(scores[out])

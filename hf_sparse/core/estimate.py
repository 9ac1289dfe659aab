"""What pruning would save, before anything is trained: the report of a model as it will be."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from hf_sparse.core.blocks import BlockShape, grid_shape
from hf_sparse.core.report import LayerReport, SparsityReport, stored_bytes
from hf_sparse.core.structure.fused import fused_weights
from hf_sparse.core.structure.targets import assign_block_shapes, find_targets, weight_view


def estimate(
    model: nn.Module,
    block_shape: BlockShape,
    sparsity: float,
    overrides: Mapping[str, BlockShape] | None = None,
    target_modules: str | None = None,
    exclude_modules: str | None = None,
    scope: str = "layer",
    layer_share: float = 0.0,
) -> SparsityReport:
    """Tell what a model will weigh once it is pruned and compressed.

    Every layer is taken to lose the same share. Under one budget for all of them the sum is the same as long as all
    blocks have one size; which layer keeps how much only training tells.

    Args:
        model: dense; its weights are not looked at and may be on the meta device.
        block_shape: (h, w) of the blocks, -1 for the whole dimension.
        sparsity: fraction of blocks to remove, [0, 1).
        overrides, target_modules, exclude_modules: as `SparseDistillConfig` has them, the first one parsed.
        scope, layer_share: as `BlockMasks` takes them.

    Returns:
        A `SparsityReport`: to within one block per layer of what `report` will tell, or under a global scope the sum
        of all layers to within one block.

    Raises:
        ValueError: if `sparsity` is out of range or removes all of a layer that has a budget, the model has no layer
            to prune, or blocks do not tile one.

    Example:
        >>> layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8, bias=False)) for _ in range(2))
        >>> estimate(nn.ModuleDict({"layer": layers}), (8, 1), 0.75).bytes, 2 * (2 * 8 * 4 + 1)
        (130, 130)
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity={sparsity!r} must be in [0, 1).")
    targets = find_targets(model, target_modules, exclude_modules)
    layers, owed = [], 0.0  # weights
    for name, shape in assign_block_shapes(targets, block_shape, overrides).items():
        weight = weight_view(targets[name])
        rows, cols = grid_shape((weight.shape[0], weight.shape[1]), shape)
        owed += (1.0 - sparsity) * rows * cols * math.prod(shape)
        kept = rows * cols - int(sparsity * rows * cols + 0.5)
        if not kept and (scope == "layer" or layer_share):
            raise ValueError(
                f"sparsity={sparsity} would remove all of {name}: it has {rows * cols} block(s) of shape {shape}. "
                f"Use smaller blocks for it or a lower sparsity, or leave it out with exclude_modules."
            )
        if scope == "global":
            # What rounding takes from one layer goes to the next, so that the sum is right to within a block.
            kept = min(int(owed / math.prod(shape) + 0.5), rows * cols)
        owed -= kept * math.prod(shape)
        dense = weight.numel() * weight.element_size()
        # A layer of which nothing is removed is stored dense.
        packed = kept * math.prod(shape) * weight.element_size() + (rows * cols + 7) // 8
        layers.append(
            LayerReport(
                name=name, shape=(weight.shape[0], weight.shape[1]), block_shape=shape, kept_blocks=kept,
                total_blocks=rows * cols, bytes=packed if kept < rows * cols else dense, dense_bytes=dense,
            )
        )  # fmt: skip
    if layers and not any(layer.kept_blocks for layer in layers):
        raise ValueError(f"sparsity={sparsity} would remove all blocks of the {len(layers)} target layers: lower it.")
    total = stored_bytes(model)
    return SparsityReport(
        layers=layers,
        bytes=total - sum(x.dense_bytes - x.bytes for x in layers),
        dense_bytes=total,
        not_pruned=tuple(fused_weights(model)),
    )

"""Which blocks are kept: chosen from scores, applied to the weights, held at zero, written to checkpoints.

The masks live beside the model, not in its state_dict: checkpoints keep the keys of the dense model. At rest a mask
takes one bit per block; it is spread out where it is used. Each target also carries its mask as the plain attribute
`block_mask`, a `core.bits.Bitmap`, which `report` reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.core.bits import Bitmap, Masks, pack_bits
from hf_sparse.core.blocks import BlockShape, TilingError, grid_shape, resolve_block_shape
from hf_sparse.core.structure.experts import ExpertsWeight, Prunable
from hf_sparse.core.structure.targets import find_targets, grad_view, tiled_shape, weight_view
from hf_sparse.training.distributed import norms_of_blocks, pruned_are_zero
from hf_sparse.training.pruning.importance import magnitudes
from hf_sparse.training.pruning.passes import mask_blocks_
from hf_sparse.training.pruning.selection import keep_highest, keep_highest_of_all, num_removed, share_bounds


class BlockMasks:
    """The masks of all pruned layers of a model.

    Args:
        targets: {name: linear or fused experts}; the weights are read and written through the modules, so they may
            move or be loaded.
        block_shapes: (h, w) for all, or {name: (h, w)}; may hold -1.
        scope: "layer" = every weight has its own budget; "global" = all blocks compete for one.
        layer_share: under scope "global", the share of a budget of its own that is decided inside each weight, in
            [0, 1]: so much of what it would lose goes first, and of what it would keep last; the rest competes. With 0
            all of it does (the trainer's default is 0.1).

    Raises:
        TypeError: if the targets are no mapping of names to layers with a weight matrix.
        ValueError: for an unknown scope, a share out of range, or a block shape that is missing or does not tile its
            layer.

    Example:
        >>> linear = nn.Linear(4, 2, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[1., 2., 3., 4.], [1., 2., 3., 4.]]))
        >>> masks = BlockMasks({"linear": linear}, (2, 1))
        >>> masks.choose(sparsity=0.5)
        >>> masks.apply_()
        >>> linear.weight.data
        tensor([[0., 0., 3., 4.],
                [0., 0., 3., 4.]])
    """

    def __init__(
        self,
        targets: Mapping[str, Prunable],
        block_shapes: BlockShape | Mapping[str, BlockShape],
        scope: str = "layer",
        layer_share: float = 0.0,
    ) -> None:
        if scope not in ("layer", "global"):
            raise ValueError(f'scope={scope!r} is not known: use "layer" or "global".')
        if not 0.0 <= layer_share <= 1.0:
            raise ValueError(
                f"layer_share={layer_share!r} must be in [0, 1]: the part of a budget that each weight fills itself."
            )
        self.targets = _checked_targets(targets)
        self.block_shapes = {name: _shape_for(name, target, block_shapes) for name, target in self.targets.items()}
        self.scope, self.layer_share = scope, layer_share
        self._bitmaps: dict[str, Bitmap] = {}
        self.started = False
        for name, weight in self.weights():
            grid = grid_shape((weight.shape[0], weight.shape[1]), self.block_shapes[name])
            self._bitmaps[name] = Bitmap(torch.ones(grid, dtype=torch.bool, device=weight.device))
            self.targets[name].block_mask = self._bitmaps[name]

    @classmethod
    def for_model(
        cls, model: nn.Module, block_shape: BlockShape, scope: str = "layer", layer_share: float = 0.0
    ) -> BlockMasks:
        """Make masks for the default targets of a model: the linears inside its repeated layers."""
        return cls(find_targets(model), block_shape, scope, layer_share)

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """{name: [R, C] bool, True = keep}, read-only: new tensors at each access. `load_state_dict` sets masks."""
        return Masks(self._bitmaps)

    @property
    def bits(self) -> dict[str, Tensor]:
        """{name: [ceil(R * C / 8)] uint8}: what is held of the masks, shared; `core.bits.Bitmap` tells the layout."""
        return {name: bitmap.bits for name, bitmap in self._bitmaps.items()}

    @property
    def bitmaps(self) -> Mapping[str, Bitmap] | None:
        """{name: mask} as they are held, shared; None as long as nothing is pruned."""
        return self._bitmaps if self.started else None

    @property
    def nbytes(self) -> int:
        """Bytes that the masks take: one bit per block, rounded up to whole bytes per layer."""
        return sum(bits.nbytes for bits in self.bits.values())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, weight [O, I]) of every target; whole or sharded, sharing memory with the module."""
        for name, module in self.targets.items():
            yield name, weight_view(module)

    def norms(self) -> dict[str, Tensor]:
        """Give {name: [R, C]}, the L2 norms of all blocks; one message between ranks where weights are sharded."""
        return norms_of_blocks(dict(self.weights()), self.block_shapes)

    @property
    def sparsity(self) -> float:
        """Fraction of the targets' weights that the masks remove, [0, 1]. Waits for the device."""
        total = sum(weight.numel() for _, weight in self.weights())
        return sum(self._removed_weights(name) for name in self.masks) / total if total else 0.0

    def check_budgets(self, sparsity: float) -> None:
        """Refuse a sparsity that would leave the whole model without any block, or a layer that has a budget.

        Under scope "global" layers have one where `layer_share` is above 0.

        Raises:
            ValueError: naming the layer, or the number of blocks in all of them.
        """
        if self.scope == "global":
            sizes = self._sizes()
            blocks = sum(bitmap.num_blocks for bitmap in self._bitmaps.values())
            total = sum(bitmap.num_blocks * sizes[name] for name, bitmap in self._bitmaps.items())
            if sparsity and total and num_removed(total, sparsity) >= total:
                raise ValueError(
                    f"sparsity={sparsity} would remove all {blocks} blocks of the {len(sizes)} target layers, which "
                    f"share one budget. Use a lower sparsity or smaller blocks."
                )
        if self.scope == "layer" or self.layer_share:
            for name, bitmap in self._bitmaps.items():
                count = bitmap.num_blocks
                if sparsity and num_removed(count, sparsity) == count:
                    raise ValueError(
                        f"sparsity={sparsity} would remove all of {name}: it has {count} block(s) of shape "
                        f"{self.block_shapes[name]}. Use smaller blocks for it or a lower sparsity, or leave it out "
                        f"with exclude_modules."
                    )

    @torch.no_grad()
    def choose(self, sparsity: float, scores: Mapping[str, Tensor] | None = None, share: float | None = None) -> None:
        """Choose which blocks to keep. Pruned blocks never come back. Does not touch the weights.

        Args:
            sparsity: fraction to remove, [0, 1), within one block of each budget; less than is removed already
                removes nothing more.
            scores: {name: [R, C]}, higher = kept longer; None = magnitude.
            share: in place of `layer_share`, where these scores say less or more about layers than others do.

        Raises:
            ValueError: if sparsity is no number in this range, or scores are missing, do not fit or hold NaN. Looking
                for NaN waits for the device, as an update of masks may.
        """
        given: Any = sparsity
        if not isinstance(given, Real) or not 0.0 <= sparsity < 1.0:
            raise ValueError(f"sparsity={sparsity!r} must be in [0, 1): the fraction of blocks to remove, a number.")
        scores = magnitudes(self.norms(), self.block_shapes) if scores is None else scores
        if missing := [name for name in self.targets if name not in scores]:
            raise ValueError(
                f"scores hold nothing for {missing[0]} ({len(missing)} of {len(self.targets)} targets are missing): "
                f"give one tensor [R, C] for each target."
            )
        ranked, alive = {}, {}
        for name, weight in self.weights():
            mask, score = self._bitmaps[name].move(weight.device).mask(), scores[name]
            if score.shape != mask.shape:
                raise ValueError(
                    f"the scores of {name} have shape {list(score.shape)}, its grid is {list(mask.shape)}."
                )
            ranked[name], alive[name] = score.reshape(-1), mask.reshape(-1)
        # NaN ranks nowhere: a layer full of it would lose nothing, and nobody would know.
        if unknown := [name for name, score in ranked.items() if bool((score.isnan() & alive[name]).any())]:
            raise ValueError(
                f"the scores of {unknown[0]} hold NaN, and so do those of {len(unknown)} target layer(s), so that "
                f"blocks cannot be ranked. Weights, gradients or inputs that they were made from are not finite: "
                f"where training diverged, lower the learning rate or resume from an earlier checkpoint."
            )
        share = self.layer_share if share is None else share
        # What is pruned goes first, and so stays pruned whatever the scores say.
        keep = self._keep_globally(ranked, alive, sparsity, share) if self.scope == "global" else {
            name: keep_highest(score, num_removed(score.numel(), sparsity), alive[name])
            for name, score in ranked.items()
        }  # fmt: skip
        for name, kept in keep.items():
            self._bitmaps[name].bits.bitwise_and_(pack_bits(kept))
        self.started = self.started or sparsity > 0.0

    @torch.no_grad()
    def apply_(self) -> None:
        """Set the weights of pruned blocks to exactly zero, in place."""
        if self.started:
            mask_blocks_(dict(self.weights()), self.block_shapes, self._bitmaps)

    @torch.no_grad()
    def apply_to_grads_(self) -> None:
        """Set the gradients of pruned blocks to zero, so that they neither move weights nor count in clipping."""
        if self.started:
            grads = {name: grad_view(module) for name, module in self.targets.items()}
            found = {name: grad for name, grad in grads.items() if grad is not None}
            mask_blocks_(found, self.block_shapes, self._bitmaps)

    def is_applied(self) -> bool:
        """Tell whether every pruned block is exactly zero. Waits for the device."""
        return pruned_are_zero(dict(self.weights()), self.masks, self.block_shapes)

    def off_target(self, sparsity: float) -> str | None:
        """Say which budget misses a sparsity by more than one block; None if none does. Waits for the device."""
        if self.scope == "global" and self.targets:
            total = sum(weight.numel() for _, weight in self.weights())
            largest = max(h * w for h, w in self.block_shapes.values())
            reached = self.sparsity
            return f"sparsity {reached:.4f} over all layers" if abs(reached - sparsity) * total > largest else None
        for name, mask in self.masks.items():
            removed = mask.numel() - int(mask.sum())
            if abs(removed - sparsity * mask.numel()) > 1.0:
                return f"{name} has lost {removed} of {mask.numel()} blocks"
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """Give {name: bool mask [R, C]}, copied to the CPU."""
        return {name: mask.cpu() for name, mask in self.masks.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take masks from `state_dict` over.

        Raises:
            ValueError: if the layers or a grid differ; the message names the first difference.
        """
        if missing := sorted(set(self._bitmaps) ^ set(state)):
            where = "the saved masks" if missing[0] in self._bitmaps else "this run's targets"
            raise ValueError(f"{missing[0]} is not among {where}: the run was saved with other target layers.")
        for name, saved in state.items():
            bitmap = self._bitmaps[name]
            if tuple(saved.shape) != bitmap.grid or saved.dtype != torch.bool:
                raise ValueError(
                    f"the saved mask of {name} is {saved.dtype} of shape {list(saved.shape)}, this run needs "
                    f"torch.bool of shape {list(bitmap.grid)}: the run was saved with another block shape."
                )
        for name, saved in state.items():
            self._bitmaps[name].bits.copy_(pack_bits(saved.reshape(-1)))
        self.started = any(not bool(mask.all()) for mask in state.values())

    def _keep_globally(
        self, ranked: dict[str, Tensor], alive: dict[str, Tensor], sparsity: float, share: float
    ) -> dict[str, Tensor]:
        sizes = self._sizes()
        counts = {name: mask.numel() for name, mask in alive.items()}
        budget = num_removed(sum(counts[name] * size for name, size in sizes.items()), sparsity)
        bounds = None
        if share:
            pruned = {name: int((~mask).sum()) for name, mask in alive.items()}
            bounds = share_bounds(counts, pruned, sizes, sparsity, share)
        return keep_highest_of_all(ranked, sizes, budget, bounds, alive)

    def _sizes(self) -> dict[str, int]:
        """What a block counts in a global budget: 1 where all are of one size, else its weights."""
        sizes = {name: h * w for name, (h, w) in self.block_shapes.items()}
        return sizes if len(set(sizes.values())) > 1 else dict.fromkeys(sizes, 1)

    def _removed_weights(self, name: str) -> int:
        h, w = self.block_shapes[name]
        return int((~self.masks[name]).sum()) * h * w


def _checked_targets(targets: Any) -> dict[str, Prunable]:
    if not isinstance(targets, Mapping):
        raise TypeError(
            f"targets must map names to linears, found a {type(targets).__name__}: pass {{name: linear}}, or let "
            f"BlockMasks.for_model(model, block_shape) find them."
        )
    for name, target in targets.items():
        weight = getattr(target, "weight", None)
        if not isinstance(target, ExpertsWeight) and not (isinstance(weight, Tensor) and weight.ndim == 2):
            found = f"a weight of shape {list(weight.shape)}" if isinstance(weight, Tensor) else "no weight"
            raise TypeError(
                f"target {name} is a {type(target).__name__} with {found}: only weights [O, I] are pruned, of "
                f"nn.Linear, Conv1D of transformers, or fused experts. Leave it out of the targets."
            )
    return dict(targets)


def _shape_for(name: str, target: Prunable, block_shapes: Any) -> BlockShape:
    if isinstance(block_shapes, Mapping) and name not in block_shapes:
        raise ValueError(
            f"block_shapes hold nothing for {name}: give {{name: (h, w)}} for each target, or one (h, w) for all."
        )
    try:
        shape = block_shapes[name] if isinstance(block_shapes, Mapping) else block_shapes
        return resolve_block_shape(shape, tiled_shape(target))
    except TilingError as error:
        raise TilingError(f"{name}: {error} Or give each target its own: block_shapes={{name: (h, w)}}.") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error

"""The mask that a layer carries since it was pruned, and whether its weight still is what the mask says."""

from __future__ import annotations

from hf_sparse.core.bits import Bitmap
from hf_sparse.core.blocks import to_blocks
from hf_sparse.core.structure.experts import Prunable
from hf_sparse.core.structure.targets import weight_view


def carried_mask(target: Prunable) -> Bitmap | None:
    """Give the mask that `BlockMasks` has left on a layer, true or not.

    Args:
        target: a dense linear or fused experts.
    """
    mask: Bitmap | None = getattr(target, "block_mask", None)
    return mask


def follows_mask(target: Prunable, mask: Bitmap) -> bool:
    """Tell whether every block that a mask prunes is zero in the weight. Waits for the device.

    What moves the weight after its pruning, be it another trainer, need not know of the mask, which then stays behind.

    Args:
        target: a dense linear or fused experts.
        mask: [R, C].

    Returns:
        False, too, if the grid does not divide the weight. True for a weight that cannot be looked at: one on the meta
        device, or one of which each rank holds a part, to look at which all ranks would have to come.
    """
    weight = weight_view(target).detach()
    rows, cols = weight.shape
    if rows % mask.grid[0] or cols % mask.grid[1]:
        return False
    if weight.is_meta or hasattr(weight, "to_local"):
        return True
    used = to_blocks(weight != 0, (rows // mask.grid[0], cols // mask.grid[1])).any(dim=3).any(dim=2)
    return not bool((used & ~mask.mask().to(used.device)).any())

"""The final save: pruned blocks left out, every file whole or not replaced at all."""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_sparse.core.stored.files import atomic_folder
from hf_sparse.inference.compress import compress
from hf_sparse.inference.exits.crop import crop

# Weights of an earlier save under another name would be loaded in place of the new ones.
_WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")

_UNSET = object()


def save_final(
    model: nn.Module,
    folder: str | os.PathLike[str],
    masks: dict[str, Tensor],
    save_others: Callable[[Path], None],
    cropped: bool = False,
    is_copy: bool = False,
) -> None:
    """Save a pruned model and what belongs to it.

    Args:
        model: a `PreTrainedModel` whose pruned blocks are zero; not changed.
        folder: made if missing; weight files of an earlier save are removed once the new ones are in place.
        masks: {name: [R, C]} of the layers to compress; empty = save dense.
        save_others: writes tokenizer, card and the like into the folder that it is given.
        cropped: save dense, without the units that died in every layer (`inference.exits.crop`).
        is_copy: whether the model may be changed, so that no copy of it is needed.
    """
    to_save: Any = model if is_copy or not (cropped or masks) else copy_to_cpu(model)
    if cropped:
        to_save = crop(to_save)
    elif masks:
        to_save = compress(to_save, masks=masks)
    with atomic_folder(folder, stale=lambda name: _WEIGHT_FILE.fullmatch(name) is not None) as staging:
        to_save.save_pretrained(staging)
        save_others(staging)


@contextlib.contextmanager
def under_own_names(model: Any) -> Iterator[None]:
    """Let `save_pretrained` write tensors as the model holds them.

    By itself it writes those of some classes as their first checkpoints had them: layers under other names, experts
    one by one. `Trainer` reads a checkpoint with `load_state_dict`, which knows nothing of that and leaves such
    weights as they are.
    """
    before = vars(model).get("_weight_conversions", _UNSET)
    model._weight_conversions = []
    try:
        yield
    finally:
        if before is _UNSET:
            del model._weight_conversions
        else:
            model._weight_conversions = before


def copy_to_cpu(model: nn.Module) -> nn.Module:
    """Copy a model to the CPU without a second copy on its device; tied weights stay tied."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("cpu", copy=True), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        # The masks travel beside the copy.
        module.__dict__.pop("block_mask", None)
    return copied

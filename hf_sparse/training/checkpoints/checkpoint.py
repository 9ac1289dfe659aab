"""The part of a training checkpoint that a dense checkpoint lacks: masks, coefficients, and what they belong to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_sparse.core.blocks import grid_shape
from hf_sparse.core.stored.packing import FormatError
from hf_sparse.training.pruning.masks import BlockMasks
from hf_sparse.training.pruning.sensitivity import SquaredGradients

STATE_FILE = "sparsity_state.safetensors"
_VERSION = 1


def save_state(
    folder: str | os.PathLike[str],
    masks: BlockMasks,
    coefs: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    squares: SquaredGradients | None = None,
) -> None:
    """Write masks and coefficients beside a dense checkpoint, whole or not at all.

    Args:
        folder: the checkpoint's folder; made if missing.
        masks: all masks of the run.
        coefs: {name: [R, C]} reweighting coefficients; empty before the first reweighting.
        facts: plain values that a resumed run has to agree with, such as the teacher's fingerprint.
        squares: of which those are written that the optimizer does not keep itself.
    """
    tensors = {f"{name}.mask": mask for name, mask in masks.state_dict().items()}
    if squares is not None:
        tensors |= {f"{name}.square": square.detach().cpu().contiguous() for name, square in squares.own.items()}
        tensors |= {f"{name}.steps": steps.detach().cpu() for name, steps in squares.steps.items()}
    tensors |= {f"{name}.coef": coef.detach().cpu().contiguous() for name, coef in coefs.items()}
    shapes = {name: list(shape) for name, shape in masks.block_shapes.items()}
    # The scope as it came out, and the share where it counts: "auto" follows other settings.
    budget = {"scope": masks.scope, "layer_share": masks.layer_share if masks.scope == "global" else None}
    state = {"version": _VERSION, "block_shapes": shapes, **budget, "facts": dict(facts)}
    target = Path(folder) / STATE_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{STATE_FILE}.{os.getpid()}")
    save_file(tensors, staged, metadata={"format": "pt", "hf_sparse_state": json.dumps(state)})
    os.replace(staged, target)


def load_state(folder: str | os.PathLike[str], masks: BlockMasks, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read masks into `masks`, and give the coefficients.

    Returns:
        {name: [R, C]}, empty if there was no reweighting yet.

    Raises:
        ValueError: if the checkpoint has no sparsity state, or was written by a run with other target layers, block
            shapes, scope or facts; the message names the difference.
        FormatError: if the file is damaged or newer than this version.
    """
    file = Path(folder) / STATE_FILE
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no {STATE_FILE}: it is no whole checkpoint of SparseDistillTrainer. "
            f"Resume from another one, or load its model and train anew."
        )
    try:
        with safe_open(file, framework="pt") as handle:
            state = json.loads((handle.metadata() or {}).get("hf_sparse_state", "null"))
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, ValueError) as error:
        raise FormatError(f"{file} is damaged: {error}. Resume from another checkpoint.") from error
    if not isinstance(state, dict) or state.get("version") != _VERSION:
        found = state.get("version") if isinstance(state, dict) else None
        raise FormatError(f"{file} has version {found}, this hf_sparse reads {_VERSION}.")
    if missing := sorted({"block_shapes", "scope", "facts"} - set(state)):
        raise FormatError(f"{file} is damaged: it lacks {missing[0]!r}. Resume from another checkpoint.")
    _compare(file, state, masks, facts)
    masks.load_state_dict({k.removesuffix(".mask"): v for k, v in tensors.items() if k.endswith(".mask")})
    coefs = {k.removesuffix(".coef"): v for k, v in tensors.items() if k.endswith(".coef")}
    grids = {
        name: grid_shape((weight.shape[0], weight.shape[1]), masks.block_shapes[name])
        for name, weight in masks.weights()
    }
    for name in sorted(set(grids) | set(coefs)) if coefs else ():
        found = tuple(coefs[name].shape) if name in coefs else None
        if found != grids.get(name):
            raise FormatError(
                f"{file} is damaged: the coefficients of {name} have shape {found}, its grid is {grids.get(name)}. "
                f"Resume from another checkpoint."
            )
    return coefs


def load_squares(folder: str | os.PathLike[str], squares: SquaredGradients) -> None:
    """Read the running means of squared gradients of a checkpoint that `load_state` has accepted; often none."""
    with safe_open(Path(folder) / STATE_FILE, framework="pt") as handle:
        for ending, held in ((".square", squares.own), (".steps", squares.steps)):
            keys = [key for key in handle.keys() if key.endswith(ending)]  # noqa: SIM118 (no mapping)
            held.update({key.removesuffix(ending): handle.get_tensor(key) for key in keys})


def _compare(file: Path, state: dict[str, Any], masks: BlockMasks, facts: Mapping[str, Any]) -> None:
    saved, current = state["block_shapes"], {name: list(shape) for name, shape in masks.block_shapes.items()}
    if different := sorted(set(saved) ^ set(current)):
        where = "this run" if different[0] in saved else "the checkpoint"
        raise ValueError(
            f"{file}: {different[0]} is not a target layer of {where}: target_modules or exclude_modules differ."
        )
    for name, shape in current.items():
        if saved[name] != shape:
            raise ValueError(
                f"{file}: {name} was pruned in blocks of {saved[name]}, this run asks for {shape}. "
                f"Resume with the same block_height, block_width and block_overrides."
            )
    # Before there was a choice, hidden states were compared by their mean squared error, if at all.
    form = {"hidden_form": "mse"} if state["facts"].get("hidden_weight") else {}
    old, facts = {**form, **state["facts"]}, {**facts, "sparsity_scope": masks.scope}
    old["sparsity_scope"] = state["scope"]
    if state["scope"] == masks.scope == "global":
        old, facts = {**old, "layer_share": state.get("layer_share")}, {**facts, "layer_share": masks.layer_share}
    differing = [key for key in facts if key in old and old[key] != facts[key]]
    changed = [f"{key} was {old[key]!r}, in this run it is {facts[key]!r}" for key in differing]
    if changed:
        raise ValueError(f"{file}: {'; '.join(changed)}. A resumed run must be set up as it was begun.")


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Refuse an output folder that cannot be written, before hours of training and not after.

    Raises:
        OSError: naming the folder and the reason.
    """
    probe = Path(folder) / f".hf_sparse-{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"output_dir={str(folder)!r} cannot be written: {error.strerror or error}.") from error

"""Masks and the group lasso in one pass over a weight in training, on the CPU.

In plain torch, norms, gradient or shrinking and masks are a pass over the weight each, and each waits for memory. The
native kernel reads a band of rows once. It takes whole float32 weights that lie in one piece of memory, stored either
way round (`nn.Linear`, `Conv1D`); `fits` tells. `training.pruning.passes` has the same in torch for all others.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hf_sparse.core.blocks import BlockShape, grid_shape
from hf_sparse.inference.kernels import library
from hf_sparse.inference.kernels.registry import ENV_BACKEND, requested_backend, require_backend


def fits(*tensors: Tensor) -> bool:
    """Tell whether the kernel takes these: one weight [O, I], or it and its gradient.

    Raises:
        ValueError: if `HF_SPARSE_BACKEND` is set to something that is not a choice, or to "cpu" where there is no
            native library.
    """
    first = tensors[0]
    taken = all(
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.ndim == 2
        and tensor.stride() == first.stride()
        and (tensor.is_contiguous() or tensor.t().is_contiguous())
        for tensor in tensors
    )
    # What torch.compile traces is fused by it, and holds no addresses.
    if not taken or torch.compiler.is_compiling():
        return False
    backend = requested_backend()
    if backend == "cpu":
        require_backend(backend)
    return backend in ("auto", "cpu") and library.load_library().handle is not None


def mask_(target: Tensor, block_shape: BlockShape, bits: Tensor) -> None:
    """Set blocks whose bit is 0 to zero, in place.

    Args:
        target: [O, I], a weight or its gradient that `fits`.
        block_shape: (h, w), both positive, tiling it.
        bits: [ceil(R * C / 8)] uint8, as `core.bits.Bitmap` holds them.

    Raises:
        ValueError: if a tensor is not of the kind that is named here.
    """
    _run("mask", target, None, block_shape, bits)


def add_lasso_gradient_(
    grad: Tensor,
    weight: Tensor,
    block_shape: BlockShape,
    *,
    amount: float,
    coef: Tensor | None = None,
    scale: Tensor | None = None,
    bits: Tensor | None = None,
) -> Tensor:
    """Add scale * amount * coef / norm * block to the gradient of every block; then set pruned blocks to zero.

    Args:
        grad: [O, I], written to; it and the weight `fits`.
        weight: [O, I].
        block_shape: (h, w), both positive, tiling it.
        amount: the penalty's weight.
        coef: [R, C] float32; None = 1 for every block.
        scale: a float32 scalar on the CPU; None = 1.
        bits: [ceil(R * C / 8)] uint8 of the blocks to keep; None = all.

    Returns:
        The penalty, sum of coef * norm, a float32 scalar.

    Raises:
        ValueError: if a tensor is not of the kind that is named here.

    Example:
        >>> grad, weight = torch.zeros(1, 4), torch.tensor([[3., 4., 0., 1.]])
        >>> if fits(grad, weight):
        ...     assert add_lasso_gradient_(grad, weight, (1, 2), amount=10.0) == 6.0
        ...     assert grad.tolist() == [[6.0, 8.0, 0.0, 10.0]]
    """
    return _run("gradient", grad, weight, block_shape, bits, amount, coef, scale=scale)


def shrink_(
    weight: Tensor,
    block_shape: BlockShape,
    *,
    threshold: float,
    coef: Tensor | None = None,
    moved: Tensor | None = None,
    bits: Tensor | None = None,
) -> Tensor:
    """Multiply every block by max(0, 1 - threshold * coef / norm); then set pruned blocks to zero.

    Args:
        weight: [O, I] that `fits`, written to.
        block_shape: (h, w), both positive, tiling it.
        threshold: learning rate * penalty_weight, >= 0.
        coef: [R, C] float32; None = 1 for every block.
        moved: a bool scalar on the CPU; where False nothing is shrunk. None = True.
        bits: [ceil(R * C / 8)] uint8 of the blocks to keep; None = all.

    Returns:
        The penalty before the step, sum of coef * norm, a float32 scalar.

    Raises:
        ValueError: if a tensor is not of the kind that is named here.
    """
    return _run("shrink", weight, None, block_shape, bits, threshold, coef, moved=moved)


def _run(
    mode: str,
    target: Tensor,
    weight: Tensor | None,
    block_shape: BlockShape,
    bits: Tensor | None,
    amount: float = 0.0,
    coef: Tensor | None = None,
    scale: Tensor | None = None,
    moved: Tensor | None = None,
) -> Tensor:
    tensors = (target,) if weight is None else (target, weight)
    if not fits(*tensors) or tensors[-1].shape != target.shape:
        raise ValueError(
            f"the native pass takes a float32 weight [O, I] on the CPU that lies in one piece, and its gradient laid "
            f"out alike, under {ENV_BACKEND}=auto or cpu; found {target.dtype} {list(target.shape)} on "
            f"{target.device} under {requested_backend()}."
        )
    grid = grid_shape((target.shape[0], target.shape[1]), block_shape)
    rows, cols = grid
    _check("bits", bits, torch.uint8, (-(-rows * cols // 8),))
    _check("coef", coef, torch.float32, grid)
    _check("scale", scale, torch.float32, ())
    _check("moved", moved, torch.bool, ())
    # Autograd would not see the write, nor would who asks for a tensor's version whether it is still the same.
    torch.autograd.graph.increment_version(target)
    # A Conv1D lies the other way round: to C it is [I, O] in blocks of (w, h), whose bits come column by column.
    turned = not target.is_contiguous()
    (height, width), (lines, length) = block_shape, target.shape
    penalty = target.new_empty(()) if mode != "mask" else None
    call = library.Prune(
        rows=length if turned else lines,
        cols=lines if turned else length,
        height=width if turned else height,
        width=height if turned else width,
        row_step=1 if turned else cols,
        col_step=cols if turned else 1,
        target=target.data_ptr(),
        weight=_address(weight),
        bits=_address(bits),
        coef=_address(coef),
        scale=_address(scale),
        moved=_address(moved),
        penalty=_address(penalty),
        amount=amount,
        mode=library.MODES[mode],
        isa=_isa(),
        threads=torch.get_num_threads(),
    )
    if status := library.load_library().handle.hfs_prune_blocks(ctypes.addressof(call)):  # type: ignore[union-attr]
        raise RuntimeError(f"the native pass refused a weight {list(target.shape)}: {library.STATUS[status]}.")
    return target if penalty is None else penalty


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor is None:
        return
    on_cpu = tensor.device.type == "cpu" and tensor.is_contiguous()
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not on_cpu:
        raise ValueError(
            f"{name} must be {dtype} of shape {list(shape)}, contiguous on the CPU; found {tensor.dtype} of shape "
            f"{list(tensor.shape)} on {tensor.device}."
        )


def _isa() -> int:
    return library.ISAS.index(library.choose_isa())

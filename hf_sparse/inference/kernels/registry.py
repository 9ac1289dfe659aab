"""Who can compute a block-sparse linear: the interface of a backend, the list of them, and the choice between them."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hf_sparse.core.stored.packing import FormatError, LayerFormat, unpack_mask

logger = logging.getLogger(__name__)

ENV_BACKEND = "HF_SPARSE_BACKEND"

# Asked in this order by "auto"; "dense" takes every layer, and "reference" is for tests and bug reports alone.
PREFERENCE = ("gpu", "cpu", "torch", "dense")
CHOICES = ("auto", "reference", "torch", "cpu", "gpu", "dense")

# Backends with native code live in modules of their own, which register themselves when imported.
_MODULES = {
    "reference": "hf_sparse.inference.kernels.reference",
    "dense": "hf_sparse.inference.kernels.dense",
    "torch": "hf_sparse.inference.kernels.banded",
    "cpu": "hf_sparse.inference.kernels.cpu",
    "gpu": "hf_sparse.inference.kernels.gpu",
}


@dataclass(frozen=True)
class BlockIndex:
    """Where the stored blocks of a layer belong.

    Attributes:
        layer: the geometry.
        rows: [N] int64, grid row of each stored block, never decreasing.
        cols: [N] int64, grid column of each stored block, increasing within a row; same device as `rows`.
    """

    layer: LayerFormat
    rows: Tensor
    cols: Tensor

    @classmethod
    def from_bitmap(cls, bitmap: Tensor, layer: LayerFormat) -> BlockIndex:
        """Read a bitmap.

        Args:
            bitmap: uint8, as in `core.stored.packing.pack_mask`.
            layer: the geometry it must fit.

        Raises:
            FormatError: if the bitmap does not fit the grid, or keeps another number of blocks than `layer.kept`.
        """
        rows, cols = unpack_mask(bitmap, layer.grid).nonzero(as_tuple=True)
        if rows.numel() != layer.kept:
            raise FormatError(f"the bitmap keeps {rows.numel()} blocks, but {layer.kept} are stored.")
        return cls(layer=layer, rows=rows, cols=cols)


@dataclass(frozen=True)
class LayerSpec:
    """What a backend is told when it is asked whether it wants a layer.

    Attributes:
        layer: the geometry; density is `layer.kept / layer.num_blocks`.
        device: where the values lie.
        dtype: of values and activations.
    """

    layer: LayerFormat
    device: torch.device
    dtype: torch.dtype

    @property
    def density(self) -> float:
        """Fraction of blocks kept, [0, 1]."""
        return self.layer.kept / self.layer.num_blocks


class Backend(Protocol):
    """One way to compute `activation(x @ W.T + bias)`. Register an instance with `register`."""

    name: str

    def available(self) -> tuple[bool, str]:
        """Tell whether this machine can run it, and why (not)."""

    def supports(self, spec: LayerSpec) -> tuple[bool, str]:
        """Tell whether it computes this layer at all, and why (not). Asked when the backend is forced, too."""

    def wins(self, spec: LayerSpec) -> bool:
        """Tell whether it is measured to be at least as fast as dense for this layer. Asked by "auto" alone."""

    def prepare(self, values: Tensor, index: BlockIndex) -> Any:
        """Bring values [N, h, w] into the layout that `run` wants. Called once per change of the weights."""

    def run(self, x: Tensor, state: Any, bias: Tensor | None, activation: str | None) -> Tensor:
        """Compute [M, O] from x [M, I], any strides, M >= 0, with the state that `prepare` gave."""


@runtime_checkable
class CountsTokens(Protocol):
    """A backend that loses to dense where tokens are few; "auto" then runs those calls dense."""

    def from_tokens(self, state: Any) -> int | None:
        """Give the number of tokens from which it is measured to beat dense; None where it never does."""


@runtime_checkable
class WinsForFew(Protocol):
    """A backend that beats dense for few tokens where it does not for many; "auto" then runs those calls with it."""

    def until_tokens(self, spec: LayerSpec) -> int:
        """Give the number of tokens up to which it is measured to beat dense though `wins` says no; 0 for none."""


@runtime_checkable
class GivesGradients(Protocol):
    """A backend that reads the values of a layer where they are stored, and computes gradients from them."""

    def follows(self, state: Any, values: Tensor) -> bool:
        """Tell whether the state reads these very values, where they are."""

    def expects_writes(self, state: Any) -> bool:
        """Tell whether the gradient of the values was asked for: from then on they may be written to at any time."""

    def input_gradient(self, grad: Tensor, state: Any) -> Tensor | None:
        """Compute the gradient of x [M, I] from that of y [M, O]; None where a dense product does it better."""

    def values_gradient(self, grad: Tensor, x: Tensor, state: Any) -> Tensor | None:
        """Compute the gradient of the values [N, h, w]; None where a dense product does it better."""


_BACKENDS: dict[str, Backend] = {}


def register(backend: Backend) -> Backend:
    """Add a backend to the registry, replacing an earlier one of the same name.

    Raises:
        ValueError: if its name is not one of the known ones.
    """
    if backend.name not in _MODULES:
        raise ValueError(f"backend name {backend.name!r} is not one of {sorted(_MODULES)}.")
    _BACKENDS[backend.name] = backend
    return backend


def get_backend(name: str) -> Backend:
    """Give a backend by name, whether it is available or not.

    Raises:
        ValueError: if there is no backend of that name in this version.
    """
    if name not in _MODULES:
        raise ValueError(f"backend {name!r} is not one of {sorted(_MODULES)}.")
    if name not in _BACKENDS and importlib.util.find_spec(_MODULES[name]) is not None:
        importlib.import_module(_MODULES[name])
    if name not in _BACKENDS:
        raise ValueError(f"the {name!r} backend is not part of this version of hf_sparse.")
    return _BACKENDS[name]


def backend_status() -> dict[str, tuple[bool, str]]:
    """Tell of every backend whether it can run here, and why (not): {name: (available, reason)}."""
    status = {}
    for name in _MODULES:
        try:
            status[name] = get_backend(name).available()
        except ValueError as error:
            status[name] = (False, str(error))
    return status


def requested_backend() -> str:
    """Read `HF_SPARSE_BACKEND`.

    Raises:
        ValueError: if it is set to something that is not a choice.
    """
    name = os.environ.get(ENV_BACKEND) or "auto"
    if name not in CHOICES:
        raise ValueError(f"{ENV_BACKEND}={name!r} is not a backend: use one of {', '.join(CHOICES)}.")
    return name


def require_backend(name: str) -> Backend | None:
    """Give a forced backend, which has to be available here; None for "auto", which forces none.

    Raises:
        ValueError: if it is not available; the message has the reason.
    """
    if name == "auto":
        return None
    backend = get_backend(name)
    able, reason = backend.available()
    if not able:
        raise ValueError(f"{ENV_BACKEND}={name!r} cannot be used: {reason}")
    return backend


def choose_backend(spec: LayerSpec, name: str | None = None) -> Backend:
    """Pick the backend for a layer.

    Args:
        spec: the layer, its device and dtype.
        name: "auto" takes the first available backend that supports the layer and is measured to beat dense there;
            any other name forces that one. None reads `HF_SPARSE_BACKEND`.

    Raises:
        ValueError: if a forced backend is not available here or cannot compute the layer; the message has the reason.
    """
    name = requested_backend() if name is None else name
    forced = require_backend(name)
    if forced is not None:
        able, reason = forced.supports(spec)
        if not able:
            raise ValueError(f"{ENV_BACKEND}={name!r} cannot be used: {reason}")
        return forced
    for name in PREFERENCE:
        if _usable(name):
            backend = get_backend(name)
            if backend.supports(spec)[0] and backend.wins(spec):
                return backend
    return get_backend("dense")


def backend_for_few(spec: LayerSpec) -> tuple[Backend, int] | None:
    """Pick a backend for few tokens of a layer that "auto" runs dense, and say how many tokens that is; or None."""
    for name in PREFERENCE:
        backend = get_backend(name) if _usable(name) else None
        if isinstance(backend, WinsForFew) and backend.supports(spec)[0] and (tokens := backend.until_tokens(spec)):
            return backend, tokens
    return None


@cache
def _usable(name: str) -> bool:
    able, reason = backend_status()[name]
    # Said once: a missing kernel costs speed, never function.
    logger.debug("backend %s: %s (%s)", name, "available" if able else "not available", reason)
    return able

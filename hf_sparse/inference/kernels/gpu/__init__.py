"""The gpu backend: block-sparse linears as Triton programs. docs/kernels.md explains how they work."""

from __future__ import annotations

from hf_sparse.inference.kernels.gpu.backend import GpuBackend

__all__ = ["GpuBackend"]

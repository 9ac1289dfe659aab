"""A dense model as ONNX, the one form that most engines read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_sparse.inference.exits.samples import ExportError, Plain, dynamic_axes

OPSET = 17


def write_onnx(
    model: nn.Module, inputs: Mapping[str, Tensor], file: Path, outputs: Sequence[str] | None = None
) -> None:
    """Write a model as ONNX, any batch, any length. What it computes is for the caller to check.

    torch traces the model (`torch.onnx.export(dynamo=False)`): on all families tried this gives the same values as
    the exporter on top of torch.export, in a tenth of its time, needs no further package, and ONNX Runtime runs the
    result a little faster. Weights beyond 2 GB go into files beside it.

    Args:
        model: float32, on the CPU, in evaluation mode, without compressed layers.
        inputs: an example of its arguments.
        file: to write, "*.onnx".
        outputs: names of the outputs to keep; None keeps the first one and calls it "y".

    Raises:
        ExportError: if the onnx package is missing, or torch cannot trace the model.
    """
    try:
        import onnx  # noqa: F401 (torch asks for it late, with a longer story)
    except ModuleNotFoundError as error:
        raise ExportError(f"{error.name} is not installed: pip install 'hf-sparse[bench]'") from error
    with warnings.catch_warnings(), torch.no_grad():
        # The tracer warns of every branch that it follows; values are compared afterwards.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                Plain(model, list(inputs), outputs).eval(), tuple(inputs.values()), str(file),
                input_names=list(inputs), output_names=list(outputs or ["y"]), dynamic_axes=dynamic_axes(inputs),
                opset_version=OPSET, dynamo=False,
            )  # fmt: skip
        except (RuntimeError, TypeError, ValueError) as error:
            line = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
            raise ExportError(f"torch cannot export the model as ONNX: {line}") from error

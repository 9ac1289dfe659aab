"""The engines that hf_sparse is measured against: eager torch, torch.compile, oneDNN, onnxruntime, OpenVINO."""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.inference.measuring.bench import MismatchError, check_close

DENSE = ("eager", "compile", "onednn", "onnxruntime", "openvino")
# These words belong to hf_sparse itself: what it computes has to be right, or there is no benchmark.
OURS = ("cpu", "auto", "hf_sparse", "hf_sparse_layers")

Engine = Callable[[], Tensor]
Key = tuple[Any, ...]


class Unavailable(RuntimeError):
    """An engine cannot run here. The message is the reason that the results give."""


def build(builders: Mapping[Key, Callable[[], Engine]], without: Mapping[str, str]) -> tuple[dict[Key, Engine], dict]:
    """Make the engines that there are.

    Args:
        builders: {(engine, dtype, ...): what makes it}.
        without: {engine: why it is left out}.

    Returns:
        ({key: engine}, {"engine dtype": why there is none}).
    """
    engines, skipped = {}, {}
    for key, builder in builders.items():
        name = f"{key[0]} {key[1]}"
        if key[0] in without:
            skipped[name] = without[key[0]]
            continue
        try:
            engines[key] = builder()
        except Unavailable as error:
            skipped[name] = str(error)
    return engines, skipped


def check(engines: dict[Key, Engine], truths: Mapping[Key, Tensor], skipped: dict[str, str]) -> dict[Key, float]:
    """Compare the values of every engine with what is right, before any is timed.

    Args:
        engines: to check; one of another maker that is wrong is taken out.
        truths: {key: what it has to give}.
        skipped: where the reason is noted then.

    Returns:
        {key: largest error}.

    Raises:
        MismatchError: if an engine of hf_sparse is wrong.
    """
    errors = {}
    for key, engine in list(engines.items()):
        try:
            # The dtype of the values decides on the tolerance, and OpenVINO gives float32 whatever it computes in.
            errors[key] = check_close(truths[key], engine().to(getattr(torch, key[1])))
        except MismatchError as error:
            if key[0] in OURS:
                raise MismatchError(f"{' '.join(map(str, key))}: {error}") from error
            skipped[f"{key[0]} {key[1]}"] = f"wrong values: {error}"
            del engines[key]
    return errors


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def export_onnx(module: nn.Module, x: Tensor, path: Path | None = None, dynamic: bool = False) -> bytes | Path:
    """Write a module of one input and one output as ONNX.

    Args:
        module: float32.
        x: an input.
        path: of the file; None gives bytes, which is for less than 2 GB.
        dynamic: whether the first two dimensions are left open.

    Returns:
        `path`, or the bytes.

    Raises:
        Unavailable: if the onnx package is missing.
    """
    _package("onnx")
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            export_onnx(module, x, file, dynamic)
            return file.read_bytes()
    axes = {"x": {0: "batch", 1: "length"}} if dynamic else None
    with warnings.catch_warnings(), torch.no_grad():
        # It warns that it is old, and of the branches it follows: the values are compared before any time is taken.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), (x,), str(path),
            input_names=["x"], output_names=["y"], dynamic_axes=axes, opset_version=14, dynamo=False,
        )  # fmt: skip
    return path


def onnxruntime(model: bytes | Path, x: Tensor, threads: int) -> Engine:
    """Make an engine of onnxruntime, float32."""
    ort: Any = _package("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads that wait for the next call of their own engine would be in the way of the next engine.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for name, size in zip(("batch", "length"), x.shape, strict=False):
        options.add_free_dimension_override_by_name(name, size)
    source = model if isinstance(model, bytes) else str(model)
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    given = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, given)[0])


def openvino(model: bytes | Path, x: Tensor, threads: int, dtype: str) -> Engine:
    """Make an engine of OpenVINO that computes in float32 or bfloat16."""
    ov: Any = _package("openvino")
    core = ov.Core()
    if dtype == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unavailable("OpenVINO has no bfloat16 on this CPU")
    graph = core.read_model(io.BytesIO(model) if isinstance(model, bytes) else str(model))
    graph.reshape(list(x.shape))
    config = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    request = core.compile_model(graph, "CPU", config).create_infer_request()
    # It reads the array where it is, and does not keep it alive.
    array = x.numpy()
    request.set_input_tensor(ov.Tensor(array, shared_memory=True))

    def call(_: Any = array) -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    return call


def compiled(module: nn.Module, x: Tensor) -> Engine:
    """Make an engine of torch.compile with frozen weights, which lets it pack them beforehand."""
    function = torch.compile(module, dynamic=False, options={"freezing": True})
    function(x)
    return lambda: function(x)


def onednn(x: Tensor, weight: Tensor, bias: Tensor) -> Engine:
    """Make an engine of one linear with the weight packed beforehand, the fastest dense one inside torch."""
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    except RuntimeError as error:
        if "needs the cpu support" not in str(error):
            raise
        raise Unavailable("oneDNN cannot pack this dtype on this CPU") from error
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{name} is not installed") from error

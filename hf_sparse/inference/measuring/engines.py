"""Dense engines to compare with: torch.compile, onnxruntime, OpenVINO. The optional ones are imported when asked for.

An engine takes what the model takes, {"input_ids", "attention_mask"}, and gives its first output.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.inference.exits.onnx import write_onnx
from hf_sparse.inference.exits.samples import ExportError, Plain
from hf_sparse.inference.measuring.bench import MismatchError, check_close

Engine = Callable[[Mapping[str, Tensor]], Tensor]

ENGINES = ("torch_compile", "onnxruntime", "openvino")
_NAMES = ("input_ids", "attention_mask")


class Unavailable(RuntimeError):
    """An engine cannot run here. The message is the reason."""


class DenseEngines:
    """The engines of one dense model.

    Args:
        model: dense, in evaluation mode; float32 or bfloat16. On a GPU only torch_compile is there.
        threads: that each engine may use.

    Example:
        >>> DenseEngines(nn.Identity(), threads=1).make("tensorrt")
        Traceback (most recent call last):
        ...
        ValueError: engine 'tensorrt' is not one of torch_compile, onnxruntime, openvino.
    """

    def __init__(self, model: nn.Module, threads: int) -> None:
        self.model = model
        self.threads = threads
        weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self.dtype, self.device = weight.dtype, weight.device

    def make(self, name: str) -> Engine:
        """Make an engine.

        Args:
            name: one of `ENGINES`.

        Raises:
            Unavailable: if it is not installed, or cannot compute this model in its dtype here.
            ValueError: if there is no engine of that name.
        """
        if name not in ENGINES:
            raise ValueError(f"engine {name!r} is not one of {', '.join(ENGINES)}.")
        if name != "torch_compile" and self.device.type != "cpu":
            raise Unavailable("measured on the CPU alone")
        return {"torch_compile": self._compile, "onnxruntime": self._onnxruntime, "openvino": self._openvino}[name]()

    @cached_property
    def onnx(self) -> bytes:
        """The model as ONNX, float32, any batch and length.

        Raises:
            Unavailable: if the onnx package is missing, or torch cannot export the model.
        """
        import_optional("onnx")
        ids = torch.ones(2, 8, dtype=torch.int64)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            self.model.float()
            try:
                write_onnx(self.model, dict.fromkeys(_NAMES, ids), file)
            except ExportError as error:
                raise Unavailable(str(error)) from error
            finally:
                self.model.to(self.dtype)
            return file.read_bytes()

    def _compile(self) -> Engine:
        # Frozen weights are packed beforehand, which is the fastest that torch has.
        compiled = torch.compile(Plain(self.model, _NAMES).eval(), dynamic=False, options={"freezing": True})
        return lambda given: compiled(*(given[name] for name in _NAMES))

    def _onnxruntime(self) -> Engine:
        if self.dtype != torch.float32:
            raise Unavailable(f"it does not compute in {str(self.dtype).removeprefix('torch.')} on a CPU")
        runtime: Any = import_optional("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        # Threads that wait for the next call of their own engine would be in the way of the next engine.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = runtime.InferenceSession(self.onnx, options, providers=["CPUExecutionProvider"])
        wanted = [i.name for i in session.get_inputs()]
        return lambda given: torch.from_numpy(session.run(None, {n: given[n].numpy() for n in wanted})[0])

    def _openvino(self) -> Engine:
        openvino: Any = import_optional("openvino")
        core = openvino.Core()
        able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if self.dtype == torch.bfloat16 and "BF16" not in able:
            raise Unavailable("it does not compute in bfloat16 on this CPU")
        config = {
            "INFERENCE_PRECISION_HINT": "bf16" if self.dtype == torch.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = core.compile_model(core.read_model(self.onnx, b""), "CPU", config).create_infer_request()
        wanted = [i.get_any_name() for i in request.model_inputs]

        def call(given: Mapping[str, Tensor]) -> Tensor:
            return torch.from_numpy(request.infer({n: given[n].numpy() for n in wanted})[0])

        return call


def import_optional(name: str) -> Any:
    """Import a package that need not be there.

    Raises:
        Unavailable: if it is not installed.

    Example:
        >>> import_optional("no_such_engine")
        Traceback (most recent call last):
        ...
        hf_sparse.inference.measuring.engines.Unavailable: no_such_engine is not installed
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from error


def make_engines(
    model: nn.Module, names: Iterable[str], inputs: Sequence[Mapping[str, Tensor]], truths: Sequence[Tensor]
) -> tuple[dict[str, Engine], dict[str, str]]:
    """Make the engines that there are and that compute the right values for every input.

    Args:
        model: see `DenseEngines`.
        names: of `ENGINES`.
        inputs: what will be measured.
        truths: what the model gives for each of them.

    Returns:
        ({name: engine}, {name: why there is none}).
    """
    dense, engines, skipped = DenseEngines(model, torch.get_num_threads()), {}, {}
    for name in names:
        try:
            engine = dense.make(name)
            for given, truth in zip(inputs, truths, strict=True):
                # The dtype decides on the tolerance, and OpenVINO gives float32 whatever it computes in.
                check_close(truth, engine(given).to(dense.dtype))
            engines[name] = engine
        except Unavailable as error:
            skipped[name] = str(error)
        except MismatchError as error:
            skipped[name] = f"wrong values: {error}"
        # Engines fail in their own ways, with their own errors, and one that fails is no reason to measure nothing.
        except Exception as error:  # noqa: BLE001
            line = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
            skipped[name] = f"{type(error).__name__}: {line}"
    return engines, skipped

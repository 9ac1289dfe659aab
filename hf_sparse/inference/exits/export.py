"""`export`: a model as ONNX, OpenVINO or torch.export program, compared with the model before anybody relies on it."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse.core.stored.files import atomic_folder
from hf_sparse.inference.compress import compressed_experts, compressed_layers, decompress
from hf_sparse.inference.exits.crop import crop as crop_model
from hf_sparse.inference.exits.onnx import write_onnx
from hf_sparse.inference.exits.samples import ExportError, Plain, dynamic_axes, output_names, sample_inputs
from hf_sparse.inference.exits.structure import CropError, croppable_layers
from hf_sparse.inference.measuring.bench import MismatchError, check_close

logger = logging.getLogger(__name__)

# What the files are called in each form, as Optimum calls them.
FILES = {
    "onnx": ("model.onnx",),
    "openvino": ("openvino_model.xml", "openvino_model.bin"),
    "torch": ("model.pt2",),
}
_PACKAGES = {"onnx": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino"), "torch": ()}

Run = Callable[[Mapping[str, Tensor]], list[Tensor]]


def export(
    model: Any,
    folder: str | os.PathLike[str],
    to: str = "onnx",
    crop: bool | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Write a model for another engine into a folder, with its config, and check there what it computes.

    Args:
        model: a model of transformers, compressed or dense; not changed.
        folder: made if missing.
        to: "onnx" (model.onnx), "openvino" (openvino_model.xml and .bin, made from ONNX), or "torch" (model.pt2, a
            program of `torch.export` that plain torch loads; pruned blocks stay out of the file).
        crop: whether what is dead is cut away first (`crop(model, uneven=True)`); otherwise pruned blocks are zeros,
            except in "torch". None crops where the layers are known, and never for "torch".
        inputs: an example of what the model takes; None makes one up for models of tokens or images. Two-dimensional
            inputs may later have any length, and all of them any number of samples.

    Returns:
        {output: largest difference from the model's own}. It was measured on other sizes than those exported with,
        where `inputs` were made up.

    Raises:
        ExportError: (a ValueError) if there is no such form, a package is missing, the model cannot be exported, or
            the values are not those of the model. Nothing is written then.
        CropError: if `crop` is True and the model cannot be cropped.
    """
    if to not in FILES:
        raise ExportError(f"to={to!r} is not known: use one of {', '.join(FILES)}.")
    for package in _PACKAGES[to]:
        _import(package)
    example = dict(inputs) if inputs is not None else sample_inputs(model)
    other = example if inputs is not None else sample_inputs(model, batch=3, length=11, seed=1)
    plain = _plain_copy(model, _crops(model, to, crop), packed=to == "torch" and not crop)
    names = output_names(plain, example)
    with atomic_folder(folder, stale=lambda name: name in FILES[to]) as staging:
        file = staging / FILES[to][0]
        run = {"onnx": _onnx, "openvino": _openvino, "torch": _torch}[to](plain, example, names, file)
        errors = _compare(_on_cpu(model), run, names, other)
        config = copy.deepcopy(plain.config)
        # The engine's file holds the weights as they are, whatever they were packed in.
        config.__dict__.pop("quantization_config", None)
        config.save_pretrained(staging)
    return errors


def export_program(
    model: Any, inputs: Mapping[str, Tensor] | None = None, kernels: bool = False
) -> torch.export.ExportedProgram:
    """Export a model with `torch.export`; its compressed layers stay packed.

    Args:
        model: in evaluation mode, compressed or dense; not changed.
        inputs: as in `export`; the program takes them as keyword arguments.
        kernels: False spells compressed layers out in torch's own operators (blocks are put where they belong, then a
            dense linear), so that the program runs anywhere. True makes each one call of the native operator, as fast
            as the model itself; whoever loads that program has to `import hf_sparse` first.

    Returns:
        The program; `program.module()(**inputs)` gives what the model gives.

    Raises:
        ExportError: if torch cannot export the model, or no inputs can be made up for it.
    """
    example = dict(inputs) if inputs is not None else sample_inputs(model)
    copied = copy.deepcopy(model).eval().requires_grad_(not kernels)
    for layer in compressed_layers(copied).values():
        # Where blocks belong is read from the bitmap, and a program under construction has no values to read.
        layer.index()
        if kernels:
            layer.backend()
    for experts in compressed_experts(copied).values():
        experts.dense_weights()
    axes = {name: dict.fromkeys(named, torch.export.Dim.AUTO) for name, named in dynamic_axes(example).items()}
    options = Plain(copied, list(example)).options
    try:
        with torch.set_grad_enabled(not kernels):
            shapes = {**axes, **dict.fromkeys(options)}
            return torch.export.export(copied, (), {**example, **options}, dynamic_shapes=shapes, strict=False)
    # torch has errors of many kinds for models that it cannot export.
    except Exception as error:  # noqa: BLE001
        line = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        raise ExportError(f"torch cannot export the model: {type(error).__name__}: {line}") from error


def _crops(model: Any, to: str, crop: bool | None) -> bool:
    if crop is not None or to == "torch":
        return bool(crop)
    try:
        return bool(croppable_layers(model))
    except CropError as error:
        logger.info("export: not cropped, pruned blocks become zeros: %s", error)
        return False


def _plain_copy(model: Any, crop: bool, packed: bool) -> Any:
    copied = copy.deepcopy(model).cpu().eval()
    if packed:
        return copied
    copied = crop_model(copied, uneven=True) if crop else decompress(copied)
    # No engine on a CPU computes everything in half precision, and these values fit exactly.
    return copied.float()


def _on_cpu(model: Any) -> Any:
    ready = model.device.type == "cpu" and not model.training
    return model if ready else copy.deepcopy(model).cpu().eval()


def _compare(model: Any, run: Run, names: list[str], inputs: Mapping[str, Tensor]) -> dict[str, float]:
    with torch.no_grad():
        expected = model(**inputs, **Plain(model, list(inputs)).options)
    errors = {}
    for name, found in zip(names, run(inputs), strict=True):
        try:
            # The model's own dtype says how exact it is.
            errors[name] = check_close(expected[name], found.to(expected[name].dtype))
        except MismatchError as error:
            raise ExportError(f"the export computes another {name}: {error}") from error
    return errors


def _onnx(model: Any, inputs: Mapping[str, Tensor], names: list[str], file: Path) -> Run:
    write_onnx(model, inputs, file, names)
    session = _import("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])
    # What a model does not use is no input of its graph.
    wanted = [given.name for given in session.get_inputs()]

    def run(given: Mapping[str, Tensor]) -> list[Tensor]:
        return [torch.from_numpy(y) for y in session.run(names, {name: given[name].numpy() for name in wanted})]

    return run


def _openvino(model: Any, inputs: Mapping[str, Tensor], names: list[str], file: Path) -> Run:
    openvino = _import("openvino")
    source = file.with_name("export.onnx")
    write_onnx(model, inputs, source, names)
    core = openvino.Core()
    openvino.save_model(core.read_model(str(source)), str(file), compress_to_fp16=False)
    for part in file.parent.glob("export.onnx*"):
        part.unlink()
    compiled = core.compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    wanted = [given.get_any_name() for given in compiled.inputs]

    def run(given: Mapping[str, Tensor]) -> list[Tensor]:
        found = compiled({name: given[name].numpy() for name in wanted})
        return [torch.from_numpy(found[name].copy()) for name in names]

    return run


def _torch(model: Any, inputs: Mapping[str, Tensor], names: list[str], file: Path) -> Run:
    program = export_program(model, inputs)
    with warnings.catch_warnings():
        # Rows and columns of blocks share one tensor, of which torch warns; what it wrote is loaded and compared.
        warnings.filterwarnings("ignore", "No complete tensor found", UserWarning)
        torch.export.save(program, str(file))
    loaded = torch.export.load(str(file)).module()

    def run(given: Mapping[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            found = loaded(**given, **Plain(model, list(given)).options)
        return [found[name] for name in names]

    return run


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ExportError(f"{error.name} is not installed: pip install 'hf-sparse[bench]'") from error

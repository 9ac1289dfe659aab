"""What `from_pretrained` does with a compressed folder: a quantizer registered with transformers.

Everything a file says is checked against the model and against the file itself before anything is allocated.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_sparse.core.packing import FORMAT_VERSION, FormatError, LayerFormat
from hf_sparse.inference.checkpoint import check_tensors, match_modules, read_headers
from hf_sparse.inference.compress import compressed_layers, decompress, replace_module
from hf_sparse.inference.linear import BlockSparseLinear

QUANT_METHOD = "hf_sparse"
_KEYS = ("quant_method", "format_version", "modules", "dequantize")


class BlockSparseConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed model.

    Args:
        modules: {module name: {"block_shape": [h, w], "kept": N, "dense_shape": [O, I]}}, plain integers.
        format_version: version of the file format, 1.
        dequantize: True loads plain dense linears. It is never written to a file.

    Raises:
        FormatError: if anything in it is not what format 1 allows.
    """

    def __init__(
        self,
        modules: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        dequantize: bool = False,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        # The version comes first: a newer file may well hold keys and modules that read as nonsense here.
        if type(format_version) is not int or format_version < 1:
            raise FormatError(f"quantization_config: format_version must be 1 or more, found {format_version!r}.")
        if format_version > FORMAT_VERSION:
            raise FormatError(
                f"the checkpoint has format_version {format_version}, this hf_sparse reads up to {FORMAT_VERSION}: "
                f"pip install -U hf-sparse."
            )
        if quant_method != QUANT_METHOD:
            raise FormatError(f"quantization_config: quant_method must be {QUANT_METHOD!r}, found {quant_method!r}.")
        if unknown:
            raise FormatError(
                f"quantization_config: format {FORMAT_VERSION} has no key {sorted(unknown)[0]!r}; it has {list(_KEYS)}."
            )
        if not isinstance(dequantize, bool):
            raise FormatError(f"quantization_config: dequantize must be true or false, found {dequantize!r}.")
        modules = {} if modules is None else modules
        if not isinstance(modules, dict):
            raise FormatError(
                f"quantization_config: modules must map layer names to their shapes, found {type(modules).__name__}."
            )
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.dequantize = dequantize
        self.modules = {name: LayerFormat.from_dict(name, entry).to_dict() for name, entry in modules.items()}

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read the JSON form; see `QuantizationConfigMixin.from_dict`."""
        if any(not isinstance(key, str) or key == "self" for key in config_dict):
            raise FormatError(f"quantization_config: unknown keys in {sorted(map(str, config_dict))}.")
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def layer_formats(self) -> dict[str, LayerFormat]:
        """Give `modules` as `LayerFormat` objects."""
        return {name: LayerFormat.from_dict(name, entry) for name, entry in self.modules.items()}

    def to_dict(self) -> dict[str, Any]:
        """Give what config.json holds: plain integers, strings and lists."""
        return {"quant_method": self.quant_method, "format_version": self.format_version, "modules": dict(self.modules)}


class BlockSparseQuantizer(HfQuantizer):
    """Builds the compressed layers of a model before its weights are loaded, and describes them when it is saved."""

    # There is no compressing on the fly: from_pretrained(dense_folder, quantization_config=...) is refused.
    requires_calibration = True

    quantization_config: BlockSparseConfig

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        formats = self.quantization_config.layer_formats()
        tensors = read_headers(checkpoint_files)
        names = match_modules(model, formats, tensors)
        check_tensors(model, formats, tensors, names)
        for name, local in names.items():
            linear = model.get_submodule(local)
            compressed = BlockSparseLinear(
                formats[name], bias=linear.bias is not None, device="meta", dtype=linear.weight.dtype
            )
            replace_module(model, local, compressed)
        self.quantization_config.modules = {local: formats[name].to_dict() for name, local in names.items()}
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return decompress(model) if self.quantization_config.dequantize else model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        """Bring the config up to date with the layers and give the strings for the header of each weights file."""
        self.quantization_config.modules = {n: m.layer_format().to_dict() for n, m in compressed_layers(model)}
        model.config.quantization_config = self.quantization_config
        return None, {"hf_sparse_format_version": str(FORMAT_VERSION)}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return decompress(model)

    def is_serializable(self) -> bool:
        """Compressed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Compressed models can be fine-tuned."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Without adapters, too: the kept blocks are ordinary parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Compressed models go through torch.compile."""
        return True


def register() -> None:
    """Tell transformers of quant_method "hf_sparse". Calling it again replaces the earlier classes."""
    # The decorators of transformers refuse a second registration, which a module reload is.
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = BlockSparseConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = BlockSparseQuantizer


def load_dense(auto_class: Any, path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load a compressed model as a plain dense one.

    Args:
        auto_class: what to call `from_pretrained` on: an Auto class or a model class.
        path: folder or repository id.
        kwargs: passed on to `from_pretrained`.

    Returns:
        The model, with plain linears and without a trace of the compression.
    """
    return decompress(auto_class.from_pretrained(path, **kwargs))

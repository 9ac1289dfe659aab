"""What `from_pretrained` does with a compressed folder: a quantizer registered with transformers."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_sparse.core.stored.files import interrupted_save
from hf_sparse.core.stored.formats import QUANT_METHOD, FormatError, LayerFormat, read_layer_formats, version_of
from hf_sparse.inference.compress import compressed_tensors, decompress
from hf_sparse.inference.encoders.fused import fuse
from hf_sparse.inference.kernels import requested_backend, require_backend
from hf_sparse.inference.stored.checkpoint import check_bitmaps, check_places, header_strings, read_headers
from hf_sparse.inference.stored.direct import fill, replace_layers, unhide
from hf_sparse.inference.stored.matching import match_modules

# A damaged or hostile config may ask for more layers than could be built in a lifetime.
MAX_LAYERS = 4096


class BlockSparseConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed model.

    Args:
        modules: {name: {"block_shape": [h, w], "kept": N, "dense_shape": [O, I]}}, plain integers; the shape of fused
            experts is [E, O, I].
        format_version: version of the file format; None takes the lowest that can say `modules`: 2 with experts, else
            1, and that is what is written.
        dequantize: True loads plain dense linears. It is never written to a file.
        quant_method: "hf_sparse".

    Raises:
        FormatError: if anything in it is not what its version allows. Unknown keys are refused: a key that this
            version does not know could change what the others mean.

    Example:
        >>> config = BlockSparseConfig({"q": {"block_shape": [2, 1], "kept": 3, "dense_shape": [4, 4]}})
        >>> config.layer_formats()["q"].grid
        (2, 4)
    """

    def __init__(
        self,
        modules: dict[str, Any] | None = None,
        format_version: int | None = None,
        dequantize: bool = False,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        modules = {} if modules is None else modules
        if format_version is None:
            format_version = version_of(LayerFormat.from_dict(name, entry) for name, entry in modules.items())
        config = {"quant_method": quant_method, "format_version": format_version, "modules": modules}
        formats = read_layer_formats({**unknown, **config, "dequantize": dequantize})
        self.quant_method: Any = QUANT_METHOD
        self.format_version = format_version
        self.dequantize = dequantize
        self.modules = {name: layer.to_dict() for name, layer in formats.items()}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the JSON form; arguments as in `QuantizationConfigMixin.from_dict`."""
        # Checked before Python sees the keys as arguments; the layers are checked by __init__.
        layers: dict[str, Any] = {"modules": {}} if isinstance(config_dict.get("modules"), dict) else {}
        read_layer_formats({**config_dict, **layers})
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def layer_formats(self) -> dict[str, LayerFormat]:
        """Give `modules` as `LayerFormat` objects."""
        return {name: LayerFormat.from_dict(name, entry) for name, entry in self.modules.items()}

    def to_dict(self) -> dict[str, Any]:
        """Give what config.json holds: plain integers, strings and lists."""
        formats = self.layer_formats()
        return {
            "quant_method": self.quant_method,
            "format_version": version_of(formats.values()),
            "modules": {name: layer.to_dict() for name, layer in formats.items()},
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockSparseConfig:
        # transformers copies configs again and again; entries hold plain numbers and lists of them.
        copied = copy.copy(self)
        copied.modules = {
            name: {key: value[:] if isinstance(value, list) else value for key, value in entry.items()}
            for name, entry in self.modules.items()
        }
        return copied


class BlockSparseQuantizer(HfQuantizer):
    """Builds the compressed layers of a model before its weights are loaded, and describes them when it is saved."""

    # There is no compressing on the fly: from_pretrained(dense_folder, quantization_config=...) is refused.
    requires_calibration = True

    quantization_config: BlockSparseConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, device_map: Any = None, **kwargs: Any
    ) -> Any:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                "compressed models cannot be split over devices as they load (distributed_config, tp_plan): load a "
                "dense copy, made with hf_sparse.load_dense(...).save_pretrained(...)."
            )
        # A backend that cannot run is said now and not in the first forward pass.
        require_backend(requested_backend())
        # transformers builds models inside `torch.device("meta")`, which makes every look at a tensor slow.
        with torch._C.DisableTorchFunction():
            self._build(model, checkpoint_files, device_map)
        return model

    def _build(self, model: Any, checkpoint_files: list[str] | None, device_map: Any) -> None:
        formats = self.quantization_config.layer_formats()
        check_places(model.config.name_or_path, checkpoint_files)
        try:
            headers = read_headers(checkpoint_files, self.quantization_config.format_version)
            check_bitmaps(headers, formats)
            matches = match_modules(model, headers, formats)
        except FormatError as error:
            folder = os.path.dirname(checkpoint_files[0]) if checkpoint_files else ""
            if folder and (left := interrupted_save(folder)):
                raise FormatError(
                    f"{error} A save into this folder was interrupted; the rest of it lies in {left.name}. "
                    f"Finish it with hf_sparse.core.stored.files.finish_interrupted_save({folder!r})."
                ) from error
            raise
        replace_layers(matches, formats)
        missing = fill(model, headers, matches, device_map)
        self.quantization_config.modules = {local: formats[name].to_dict() for name, local in matches.layers.items()}
        self._shapes = {}
        if missing:
            self._shapes = {name: p.shape for name, p in model.named_parameters() if name in missing}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        unhide(model)
        # Before 5.23 transformers takes any shape into the dense layers of a model that has a quantizer.
        for name, shape in self._shapes.items():
            if (found := model.get_parameter(name).shape) != shape:
                raise FormatError(
                    f"{name} has shape {list(found)} in the file, expected {list(shape)}. "
                    f"ignore_mismatched_sizes replaces it from transformers 5.23 on."
                )
        return decompress(model) if self.quantization_config.dequantize else fuse(model)

    def update_attn_implementation(self, config: Any) -> Any:
        """Look at the size that a config asks for, before transformers builds it layer by layer."""
        return _of_sane_size(config)

    def update_tp_plan(self, config: Any) -> Any:
        """Do the same for a transformers before 5.24."""
        return _of_sane_size(config)

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Change nothing: compressed models are not split over devices, and looking for it takes time."""

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Bring the config up to date with the layers, and give the strings for the header of each weights file."""
        formats, bitmaps = compressed_tensors(model)
        self.quantization_config.modules = {name: layer.to_dict() for name, layer in formats.items()}
        self.quantization_config.format_version = version_of(formats.values())
        model.config.quantization_config = self.quantization_config
        # Tensors are stored under the names they have in the model, whatever a model's older checkpoints called them:
        # `modules` names the same layers, and packed weights do not fit the conversions of dense ones.
        model._weight_conversions = []
        return None, header_strings(bitmaps, version_of(formats.values()))

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return decompress(model)

    def is_serializable(self) -> bool:
        """Compressed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Compressed models can be fine-tuned with adapters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """They can be fine-tuned without, too: the kept blocks are ordinary parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Compressed models go through torch.compile."""
        return True


def _of_sane_size(config: Any) -> Any:
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise FormatError(f"config.json asks for {layers} layers; no model has more than {MAX_LAYERS}.")
    return config


def register() -> None:
    """Tell transformers of quant_method "hf_sparse". Calling it again replaces the classes of the earlier call."""
    # The decorators of transformers refuse a second registration, which is what a reload of this package makes.
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = BlockSparseConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = BlockSparseQuantizer


def load_dense(auto_class: Any, path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load a compressed model as a plain dense one.

    Args:
        auto_class: an Auto class of transformers, or a model class.
        path: folder or repository id; a dense one loads as it is.
        kwargs: passed on to `from_pretrained`.

    Returns:
        The model with plain linears; it saves as a dense folder that loads without hf_sparse.

    Raises:
        FormatError: if the checkpoint is damaged.
        ValueError: if `device_map` offloads compressed layers to disk.
    """
    return decompress(auto_class.from_pretrained(path, **kwargs))


register()

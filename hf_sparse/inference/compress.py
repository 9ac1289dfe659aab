"""A whole model, in memory: compressed (pruned blocks left out of storage) and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.core.blocks import BlockShape, block_norms, expand_mask, resolve_block_shape
from hf_sparse.core.targets import find_targets, is_conv1d, is_linear, weight_view
from hf_sparse.inference.linear import BlockSparseLinear


def compress(
    model: Any, masks: dict[str, Tensor] | None = None, block_shape: BlockShape | None = None
) -> Any:
    """Leave the zero blocks of a model out of storage.

    Args:
        model: a model with pruned linears; changed in place.
        masks: {module name: [R, C] bool, True = keep}. The block shape of a layer follows from its mask. None finds
            the zero blocks of the default target layers.
        block_shape: (h, w) of the blocks to look for where `masks` is None.

    Returns:
        The same model. `save_pretrained` now writes format 1 (docs/format.md).

    Raises:
        ValueError: if a weight outside its mask is not zero, or a mask does not fit its layer.
    """
    if masks is None:
        if block_shape is None:
            raise ValueError("compress needs masks, or the block_shape of the zero blocks to look for.")
        masks = {}
        for name, module in find_targets(model).items():
            masks[name] = block_norms(weight_view(module).detach(), block_shape) != 0
    for name, mask in masks.items():
        module = model.get_submodule(name)
        if not is_linear(module):
            raise ValueError(f"masks[{name!r}]: not a plain linear but {type(module).__name__}.")
        weight = weight_view(module)
        if mask.ndim != 2 or weight.shape[0] % mask.shape[0] or weight.shape[1] % mask.shape[1]:
            raise ValueError(f"masks[{name!r}]: a mask of {list(mask.shape)} does not tile {list(weight.shape)}.")
        shape = (weight.shape[0] // mask.shape[0], weight.shape[1] // mask.shape[1])
        if (weight.detach()[~expand_mask(mask, shape)] != 0).any():
            raise ValueError(f"masks[{name!r}] drops weights that are not zero.")
        if not mask.all():
            replace_module(
                model, name, BlockSparseLinear.from_dense(weight, mask, shape, module.bias, is_conv1d(module))
            )
    if hasattr(model, "save_pretrained") and compressed_layers(model):
        _attach(model)
    return model


def decompress(model: Any) -> Any:
    """Give plain linears back: same outputs, and a model that saves as a plain dense folder."""
    for name, module in compressed_layers(model):
        replace_module(model, name, _dense(module))
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    return model


def compressed_layers(model: nn.Module) -> list[tuple[str, BlockSparseLinear]]:
    """List the compressed layers of a model by name."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, BlockSparseLinear)]


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another one, training flag included."""
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)


def _dense(module: BlockSparseLinear) -> nn.Module:
    weight = module.dense_weight().detach()
    if module.transposed:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            linear = Conv1D(module.out_features, module.in_features)
        weight = weight.t().contiguous()
    else:
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    linear.bias = module.bias
    return linear


def _attach(model: Any) -> None:
    from hf_sparse.inference.loading import QUANT_METHOD, BlockSparseConfig, BlockSparseQuantizer

    config = BlockSparseConfig(modules={n: m.layer_format().to_dict() for n, m in compressed_layers(model)})
    model.hf_quantizer = BlockSparseQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, QUANT_METHOD

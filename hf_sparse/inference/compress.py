"""A whole model in memory: compressed (pruned blocks left out of storage) and decompressed."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.core.blocks import BlockShape, expand_mask, to_blocks
from hf_sparse.core.packing import QUANT_METHOD
from hf_sparse.core.targets import assign_block_shapes, find_targets, is_conv1d, is_linear, weight_view
from hf_sparse.inference.linear import BlockSparseLinear

logger = logging.getLogger(__name__)


def compress(model: Any, masks: Mapping[str, Tensor] | None = None, block_shape: BlockShape | None = None) -> Any:
    """Leave the pruned blocks of a model out of storage.

    Layers without a pruned block stay as they are. After it `save_pretrained` writes format 1 (docs/format.md).

    Args:
        model: a model whose pruned blocks are zero; changed in place. It need not be a `PreTrainedModel`, but only
            those can be saved and loaded in format 1.
        masks: {module name: [R, C] bool, True = keep}. The blocks of a layer have the shape that makes its mask tile
            its weight. None looks for zero blocks in the default target layers (`core.targets.find_targets`).
        block_shape: (h, w) of the blocks to look for, -1 for the whole dimension; only where `masks` is None.

    Returns:
        The same model.

    Raises:
        ValueError: if a weight outside its mask is not zero, a mask does not fit its layer, or a layer cannot be
            compressed: shared with another, offloaded, no plain linear, compressed already. The model is unchanged.

    Example:
        >>> stack = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        >>> _ = stack[0][0].weight.data[:2].zero_()
        >>> compress(nn.ModuleDict({"layer": stack}), block_shape=(2, 4))["layer"][0][0].layer_format().kept
        1
    """
    if compressed := compressed_layers(model):
        raise ValueError(
            f"{next(iter(compressed))} is compressed already: call hf_sparse.decompress(model) first to compress anew."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"the model is quantized with {model.hf_quantizer.quantization_config.quant_method!r}.")
    if masks is None and block_shape is not None:
        masks = _find_zero_blocks(model, block_shape)
    elif masks is None or block_shape is not None:
        raise ValueError("compress needs either masks, or the block_shape of the zero blocks to look for.")
    replacements = {name: layer for name, mask in masks.items() if (layer := _pack(model, name, mask)) is not None}
    for name, layer in replacements.items():
        replace_module(model, name, layer)
    if not replacements:
        logger.info("compress: no block of %d layers is pruned, the model stays dense.", len(masks))
    elif hasattr(model, "save_pretrained"):
        _attach_quantizer(model)
    return model


def decompress(model: Any) -> Any:
    """Give a compressed model its plain linears back.

    Args:
        model: changed in place; a model without compressed layers stays as it is.

    Returns:
        The same model: same outputs as compressed, and `save_pretrained` writes a plain dense folder.

    Raises:
        ValueError: if a compressed layer is offloaded.

    Example:
        >>> layer = nn.Sequential(BlockSparseLinear.from_dense(torch.eye(4), torch.eye(2).bool(), (2, 2)))
        >>> decompress(layer)
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=False)
        )
    """
    layers = compressed_layers(model)
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise ValueError(
                f"{name} is offloaded, so its weight is not at hand: load the model without disk or CPU offload."
            )
    for name, layer in layers.items():
        replace_module(model, name, _to_linear(layer))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method == QUANT_METHOD:
        _detach_quantizer(model)
    return model


def compressed_layers(model: nn.Module) -> dict[str, BlockSparseLinear]:
    """List the compressed layers of a model by name, in the model's own order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BlockSparseLinear)}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another one; it takes over whether it is in training mode."""
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)


def _find_zero_blocks(model: nn.Module, block_shape: BlockShape) -> dict[str, Tensor]:
    targets = find_targets(model)
    shapes = assign_block_shapes(targets, block_shape)
    # Not by norm: the square of a small weight is zero before the weight is.
    return {
        name: to_blocks(weight_view(module).detach() != 0, shapes[name]).any(dim=3).any(dim=2)
        for name, module in targets.items()
    }


def _pack(model: nn.Module, name: str, mask: Tensor) -> BlockSparseLinear | None:
    module = _find_linear(model, name)
    weight = weight_view(module).detach()
    rows, cols = weight.shape
    if mask.ndim != 2 or mask.dtype != torch.bool or min(mask.shape) == 0:
        raise ValueError(f"masks[{name!r}] must be bool [R, C], found {mask.dtype} of shape {list(mask.shape)}.")
    if rows % mask.shape[0] or cols % mask.shape[1]:
        raise ValueError(
            f"masks[{name!r}] has shape {list(mask.shape)}, which does not divide the weight of {[rows, cols]} into "
            f"blocks of one shape."
        )
    mask = mask.to(weight.device)
    block_shape = (rows // mask.shape[0], cols // mask.shape[1])
    if lost := int(torch.count_nonzero(weight.masked_fill(expand_mask(mask, block_shape), 0))):
        raise ValueError(
            f"{name}: {lost} weights in pruned blocks of {block_shape} are not zero and would be lost. "
            f"Set them to zero before compress, or keep their blocks in masks[{name!r}]."
        )
    if mask.all():
        return None
    return BlockSparseLinear.from_dense(
        weight_view(module), mask, block_shape, bias=module.bias, transposed=is_conv1d(module)
    )


def _find_linear(model: nn.Module, name: str) -> Any:
    everywhere = dict(model.named_modules(remove_duplicate=False))
    if name not in everywhere:
        close = difflib.get_close_matches(name, [n for n, m in everywhere.items() if is_linear(m)], 1, 0.0)
        raise ValueError(f"masks names {name!r}, but the model has no such module; the closest linear is {close}.")
    module = everywhere[name]
    if not is_linear(module):
        raise ValueError(f"masks names {name!r}, which is a {type(module).__name__} and no plain linear.")
    # Two names for one weight would become two weights, or a file with a packed tensor that a dense module reads.
    holders = [n for n, m in everywhere.items() if any(p is module.weight for p in m._parameters.values())]
    if len(holders) > 1:
        raise ValueError(f"{' and '.join(holders)} share one weight: shared weights cannot be compressed.")
    parent = everywhere[name.rpartition(".")[0]]
    if isinstance(parent, nn.TransformerEncoderLayer):
        raise ValueError(f"{name}: nn.TransformerEncoderLayer reads the weight itself, so it cannot be compressed.")
    if module.weight.is_meta:
        raise ValueError(f"{name} is offloaded or on the meta device, so its weight is not at hand.")
    return module


def _to_linear(layer: BlockSparseLinear) -> nn.Module:
    weight = layer.dense_weight().detach()
    linear: Any
    if layer.transposed:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            linear = Conv1D(layer.out_features, layer.in_features)
        weight = weight.t().contiguous()
    else:
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    linear.bias = layer.bias
    return linear


def _attach_quantizer(model: Any) -> None:
    # Both modules need the other; this one is used without transformers, too.
    from hf_sparse.inference.encoder import fuse
    from hf_sparse.inference.loading import BlockSparseConfig, BlockSparseQuantizer

    modules = {name: layer.layer_format().to_dict() for name, layer in compressed_layers(model).items()}
    config = BlockSparseConfig(modules=modules)
    model.hf_quantizer = BlockSparseQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    fuse(model)


def _detach_quantizer(model: Any) -> None:
    from hf_sparse.inference.encoder import unfuse

    unfuse(model)
    model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_is_quantized"):
            del config._is_quantized

"""A whole model in memory: compressed (pruned blocks left out of storage) and decompressed."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.core.blocks import BlockShape, expand_mask, to_blocks
from hf_sparse.core.stored.formats import QUANT_METHOD, LayerFormat
from hf_sparse.core.structure.experts import ExpertsWeight, Prunable, experts_of
from hf_sparse.core.structure.readers import refuse_read_without_call
from hf_sparse.core.structure.targets import (
    assign_block_shapes,
    find_prunable,
    find_targets,
    is_conv1d,
    is_linear,
    tiled_shape,
    weight_view,
)
from hf_sparse.inference.layers.experts import BlockSparseExperts
from hf_sparse.inference.layers.linear import BlockSparseLinear

logger = logging.getLogger(__name__)


def compress(
    model: Any,
    masks: Mapping[str, Tensor] | None = None,
    block_shape: BlockShape | None = None,
    *,
    exclude_modules: str | None = None,
    block_overrides: Mapping[str, BlockShape] | None = None,
) -> Any:
    """Leave the pruned blocks of a model out of storage.

    Layers without a pruned block stay as they are. After it `save_pretrained` writes the format of docs/format.md.

    Args:
        model: a model whose pruned blocks are zero; changed in place. It need not be a `PreTrainedModel`, but only
            those can be saved and loaded.
        masks: {name of a module, or of a parameter of fused experts: [R, C] bool, True = keep}. The blocks of a layer
            have the shape that makes its mask tile its weight, [E * O, I] for experts. None looks for zero blocks in
            the default target layers (`core.structure.targets.find_targets`).
        block_shape: (h, w) of the blocks to look for, -1 for the whole dimension; only where `masks` is None.
        exclude_modules: regular expression, whole name: layers in which no zero blocks are looked for.
        block_overrides: {regular expression of whole names: (h, w)} for layers pruned in blocks of another shape.

    Returns:
        The same model.

    Raises:
        ValueError: if a weight outside its mask is not zero, a mask does not fit its layer, or a layer cannot be
            compressed: shared with another, offloaded, no plain linear, read by its module without a call, compressed
            already. The model is unchanged.

    Example:
        >>> stack = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        >>> _ = stack[0][0].weight.data[:2].zero_()
        >>> compress(nn.ModuleDict({"layer": stack}), block_shape=(2, 4))["layer"][0][0].layer_format().kept
        1
    """
    if compressed := compressed_tensors(model)[0]:
        raise ValueError(
            f"{next(iter(compressed))} is compressed already: call hf_sparse.decompress(model) first to compress anew."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"the model is quantized with {model.hf_quantizer.quantization_config.quant_method!r}.")
    if masks is None and block_shape is not None:
        masks = _find_zero_blocks(model, block_shape, exclude_modules, block_overrides)
    elif masks is None or block_shape is not None or exclude_modules is not None or block_overrides:
        raise ValueError(
            "compress needs either masks, or the block_shape of the zero blocks to look for; exclude_modules and "
            "block_overrides go with the latter."
        )
    packed = {name: found for name, mask in masks.items() if (found := _checked(model, name, mask)) is not None}
    replacements = _replacements(packed)
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
    for name, form in compressed_tensors(model)[0].items():
        if model.get_parameter(form.weight_key(name)).is_meta:
            raise ValueError(
                f"{name} is offloaded, so its weight is not at hand: load the model without disk or CPU offload."
            )
    for name, layer in compressed_layers(model).items():
        replace_module(model, name, _to_linear(layer))
    for name, experts in compressed_experts(model).items():
        replace_module(model, name, experts.to_dense_module())
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method == QUANT_METHOD:
        _detach_quantizer(model)
    return model


def compressed_layers(model: nn.Module) -> dict[str, BlockSparseLinear]:
    """List the compressed linears of a model by name, in the model's own order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BlockSparseLinear)}


def compressed_experts(model: nn.Module) -> dict[str, BlockSparseExperts]:
    """List the modules of compressed experts of a model by name, in the model's own order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BlockSparseExperts)}


def compressed_tensors(model: nn.Module) -> tuple[dict[str, LayerFormat], dict[str, Tensor]]:
    """Give what is compressed in a model, linears and experts, as a file lists it.

    Returns:
        {name: geometry}, in the model's own order; {name of the bitmap tensor: bitmap}.
    """
    formats: dict[str, LayerFormat] = {}
    bitmaps: dict[str, Any] = {}
    for name, module in model.named_modules():
        found = {}
        if isinstance(module, BlockSparseLinear):
            found = {name: module.layer_format()}
        elif isinstance(module, BlockSparseExperts):
            found = {f"{name}.{part}": layer for part, layer in module.layer_formats().items()}
        for full, layer in found.items():
            key = layer.mask_key(full)
            bitmaps[key] = getattr(module, key.rpartition(".")[2])
        formats.update(found)
    return formats, bitmaps


def format_of(target: Prunable, block_shape: BlockShape, kept: int = 0) -> LayerFormat:
    """Give the geometry of a dense target in blocks of a shape.

    Args:
        target: a linear or fused experts.
        block_shape: (h, w), both positive, tiling it.
        kept: number of blocks kept.
    """
    rows, cols = weight_view(target).shape
    experts = target.experts if isinstance(target, ExpertsWeight) else 0
    transposed = not experts and is_conv1d(target)  # type: ignore[arg-type]
    return LayerFormat(
        block_shape=block_shape, kept=kept, dense_shape=(rows, cols), transposed=transposed, experts=experts
    )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another one; it takes over whether it is in training mode."""
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)


def _find_zero_blocks(
    model: nn.Module, block_shape: BlockShape, exclude: str | None, overrides: Mapping[str, BlockShape] | None
) -> dict[str, Tensor]:
    targets = find_targets(model, exclude_modules=exclude)
    shapes = assign_block_shapes(targets, block_shape, overrides)
    # Not by norm: the square of a small weight is zero before the weight is.
    return {
        name: to_blocks(weight_view(module).detach() != 0, shapes[name]).any(dim=3).any(dim=2)
        for name, module in targets.items()
    }


def _checked(model: nn.Module, name: str, mask: Tensor) -> tuple[Prunable, Tensor, LayerFormat] | None:
    """Hold a mask against its layer; None where it keeps all blocks."""
    target = _find_target(model, name)
    weight = weight_view(target).detach()
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
    if tiled_shape(target)[0] % block_shape[0]:
        raise ValueError(
            f"masks[{name!r}] has shape {list(mask.shape)}: blocks of {block_shape} would lie in two of the "
            f"{list(target.weight.shape)} experts."
        )
    if lost := int(torch.count_nonzero(weight.masked_fill(expand_mask(mask, block_shape), 0))):
        raise ValueError(
            f"{name}: {lost} weights in pruned blocks of {block_shape} are not zero and would be lost. "
            f"Set them to zero before compress, or keep their blocks in masks[{name!r}]."
        )
    if mask.all():
        return None
    refuse_read_without_call(model, name)
    return target, mask, format_of(target, block_shape, int(mask.sum()))


def _replacements(packed: Mapping[str, tuple[Prunable, Tensor, LayerFormat]]) -> dict[str, nn.Module]:
    """Make the modules that take the places of dense ones."""
    made: dict[str, nn.Module] = {}
    # Several parameters of one module of experts are replaced at once.
    experts: dict[str, dict[str, tuple[Tensor, LayerFormat]]] = {}
    holders: dict[str, nn.Module] = {}
    for name, (target, mask, layer) in packed.items():
        if isinstance(target, ExpertsWeight):
            owner = name.rpartition(".")[0]
            experts.setdefault(owner, {})[target.part] = (mask, layer)
            holders[owner] = target.module
            continue
        bias: Any = target.bias
        made[name] = BlockSparseLinear.from_dense(
            weight_view(target), mask, layer.block_shape, bias=bias, transposed=layer.transposed
        )
    made.update({name: BlockSparseExperts.from_dense(holders[name], parts) for name, parts in experts.items()})
    return made


def _find_target(model: nn.Module, name: str) -> Any:
    everywhere = dict(model.named_modules(remove_duplicate=False))
    owner = name.rpartition(".")[0]
    module: Any = everywhere.get(name) or dict(experts_of(owner, everywhere.get(owner, nn.Module()))).get(name)
    if module is None:
        close = difflib.get_close_matches(name, find_prunable(model), 1, 0.0)
        raise ValueError(f"masks names {name!r}, but the model has no such module; the closest linear is {close}.")
    if not isinstance(module, ExpertsWeight) and not is_linear(module):
        raise ValueError(f"masks names {name!r}, which is a {type(module).__name__} and no plain linear.")
    # Two names for one weight would become two weights, or a file with a packed tensor that a dense module reads.
    holders = [n for n, m in everywhere.items() if any(p is module.weight for p in m._parameters.values())]
    if len(holders) > 1:
        raise ValueError(f"{' and '.join(holders)} share one weight: shared weights cannot be compressed.")
    if isinstance(everywhere[owner], nn.TransformerEncoderLayer):
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
    from hf_sparse.inference.encoders.fused import fuse
    from hf_sparse.inference.loading import BlockSparseConfig, BlockSparseQuantizer

    config = BlockSparseConfig({name: layer.to_dict() for name, layer in compressed_tensors(model)[0].items()})
    model.hf_quantizer = BlockSparseQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    fuse(model)


def _detach_quantizer(model: Any) -> None:
    from hf_sparse.inference.encoders.fused import unfuse

    unfuse(model)
    model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_is_quantized"):
            del config._is_quantized

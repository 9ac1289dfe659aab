"""Which linear layers are pruned, found from the structure of a model and never from its class name.

A transformer is a stack: an `nn.ModuleList` whose entries are modules of one class with linear layers inside. The
outermost such lists are the stacks; the linears and fused experts inside them are the default targets, without linears
of a single output. Embeddings, poolers and heads stand outside a stack and are therefore left alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from hf_sparse.core.blocks import BlockShape, TilingError, resolve_block_shape
from hf_sparse.core.stored.formats import MASK_SUFFIX
from hf_sparse.core.structure.experts import ExpertsWeight, Prunable, experts_of
from hf_sparse.core.structure.readers import is_read_elsewhere


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is the `Conv1D` of transformers (GPT-2): a linear whose weight is stored [in, out]."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__
    )


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a plain linear layer that can be pruned and replaced.

    Subclasses of `nn.Linear` are left alone: they compute something else, or (as inside `nn.MultiheadAttention`)
    somebody reads their weight without calling them.
    """
    return type(module) is nn.Linear or is_conv1d(module)


def oriented(target: Prunable, tensor: Tensor) -> Tensor:
    """View a tensor that is laid out as the weight of a target as [O, I]: output rows first. Shares memory.

    Args:
        target: a linear, or fused experts, of which all rows stand one below the other: [E * O, I].
        tensor: its weight, gradient, or what an optimizer keeps of it.
    """
    if isinstance(target, ExpertsWeight):
        return tensor.flatten(0, 1)
    return tensor.t() if is_conv1d(target) else tensor


def weight_view(target: Prunable) -> Tensor:
    """Give the weight of a target as [O, I]: output rows first, for `Conv1D` as well. Shares memory."""
    weight: Tensor = target.weight  # type: ignore[assignment]
    return oriented(target, weight)


def grad_view(target: Prunable) -> Tensor | None:
    """Give the gradient of a target's weight as [O, I], or None if it has none. Shares memory."""
    grad: Tensor | None = target.weight.grad  # type: ignore[assignment]
    return None if grad is None else oriented(target, grad)


def tiled_shape(target: Prunable) -> tuple[int, int]:
    """Give the (O, I) that blocks have to tile: that of the weight, of fused experts that of one expert."""
    rows, cols = weight_view(target).shape
    return (rows // target.experts if isinstance(target, ExpertsWeight) else rows), cols


def find_prunable(model: nn.Module) -> dict[str, Prunable]:
    """Find all linears and all fused expert weights of a model, inside layers or not, in the model's own order."""
    found: dict[str, Prunable] = {}
    for name, module in model.named_modules():
        if is_linear(module):
            found[name] = module
        found.update(experts_of(name, module))
    return found


def find_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Find the stacks of repeated transformer layers.

    Returns:
        {name: list}, in the model's own order: "bert.encoder.layer" for BERT, "encoder.block" and "decoder.block"
        for T5, "model.layers" for Llama.
    """
    return _lists_of_layers(model, is_linear)


def find_stacks_or_compressed(model: nn.Module) -> list[str]:
    """Name the stacks of a model, whether its linears are dense or compressed already."""
    names = list(find_stacks(model))
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(_is_compressed(m) for m in module.modules()):
            names.append(name)
    return names


def _is_compressed(module: nn.Module) -> bool:
    return hasattr(module, "weight" + MASK_SUFFIX) or hasattr(module, "layer_formats")


def _lists_of_layers(model: nn.Module, counts: Callable[[nn.Module], bool]) -> dict[str, nn.ModuleList]:
    """Find the outermost lists of modules of one class, in each of which some module counts."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside_a_stack = any(name.startswith(stack + ".") for stack in stacks)
        if isinstance(module, nn.ModuleList) and len(module) and not inside_a_stack:
            one_class = len({type(child) for child in module}) == 1
            # A list of bare linears is a set of heads, not a stack of layers.
            holds_linears = all(any(counts(m) for m in child.modules() if m is not child) for child in module)
            if one_class and holds_linears:
                stacks[name] = module
    return stacks


def find_targets(
    model: nn.Module, target_modules: str | None = None, exclude_modules: str | None = None
) -> dict[str, Prunable]:
    """Choose the linear layers, and the fused experts, to prune.

    Args:
        model: any module tree.
        target_modules: regular expression that has to match the whole name of the module (as in PEFT), or of the
            parameter of fused experts. None takes all of both inside the stacks that `find_stacks` finds, but for
            linears with a single output: gates and scores, of which there is nothing to spare.
        exclude_modules: regular expression, whole name; what it matches is left out.

    Returns:
        {name: target}, in the model's own order, at least one entry; fused experts as
        `core.structure.experts.ExpertsWeight`.

    Raises:
        ValueError: if a pattern is no regular expression, if one matches nothing, or if `target_modules` picks a
            layer whose weight is shared with another module.

    Example:
        >>> layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
        >>> list(find_targets(nn.ModuleDict({"encoder": layers, "head": nn.Linear(4, 2)})))
        ['encoder.0.0', 'encoder.1.0']
    """
    linears = find_prunable(model)
    if not linears:
        _refuse_subclasses(model, linears)
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear or Conv1D layer, so there is nothing to prune. "
            f"Is it compressed already? hf_sparse.decompress(model) gives plain linears back."
        )
    shared = _shared_linears(model, linears)
    if target_modules is None:
        stacks = find_stacks(model)
        if not stacks:
            _refuse_subclasses(model, linears)
            raise ValueError(
                f"{type(model).__name__} has no nn.ModuleList of repeated layers, so the layers to prune cannot be "
                f"found by themselves. Name them with target_modules; the first linears are {_first(linears)}."
            )
        inside = {n: m for n, m in linears.items() if any(n.startswith(s + ".") for s in stacks)}
        usable = {n: m for n, m in inside.items() if n not in shared and not is_read_elsewhere(model, n)}
        targets = {n: m for n, m in usable.items() if weight_view(m).shape[0] > 1}
        if not targets:
            raise ValueError(
                f"{type(model).__name__} has no linear layer that could be pruned inside {_first(stacks)}: their "
                f"weights are shared, or read by a module that does not call the linear, or have a single row."
            )
    else:
        pattern = compile_pattern("target_modules", target_modules)
        targets = {n: m for n, m in linears.items() if pattern.fullmatch(n)}
        if not targets:
            raise ValueError(
                f"target_modules={target_modules!r} matches none of the {len(linears)} linear layers "
                f"(the whole name has to match). The first are {_first(linears)}."
            )
    if exclude_modules is not None:
        pattern = compile_pattern("exclude_modules", exclude_modules)
        excluded = [n for n in targets if pattern.fullmatch(n)]
        if not excluded:
            raise ValueError(
                f"exclude_modules={exclude_modules!r} matches none of the {len(targets)} target layers "
                f"(the whole name has to match). The first are {_first(targets)}."
            )
        targets = {n: m for n, m in targets.items() if n not in set(excluded)}
        if not targets:
            raise ValueError(f"exclude_modules={exclude_modules!r} leaves no layer to prune.")
    if read := [n for n in targets if is_read_elsewhere(model, n)]:
        raise ValueError(
            f"target_modules={target_modules!r} picks {_first(read)}, whose weight nn.TransformerEncoderLayer reads "
            f"by itself, so that it could not be compressed. Leave it out with exclude_modules."
        )
    if tied := [n for n in targets if n in shared]:
        raise ValueError(
            f"target_modules={target_modules!r} picks {_first(tied)}, whose weight is shared with another module; "
            f"pruning it would prune that module too. Leave it out with exclude_modules."
        )
    return targets


def assign_block_shapes(
    targets: Mapping[str, Prunable], block_shape: BlockShape, overrides: Mapping[str, BlockShape] | None = None
) -> dict[str, BlockShape]:
    """Give every target its block shape, with -1 resolved.

    Args:
        targets: {name: linear or fused experts}.
        block_shape: (h, w) of every layer that no override names; may hold -1, the whole dimension of one expert.
        overrides: {regular expression of whole names: (h, w)}.

    Returns:
        {name: (h, w)}, both positive, in the order of `targets`.

    Raises:
        ValueError: if a shape does not tile its layer, an override matches no target, or two with different shapes
            match one.

    Example:
        >>> assign_block_shapes({"q": nn.Linear(8, 4), "k": nn.Linear(8, 4)}, (4, 1), {"k": (1, -1)})
        {'q': (4, 1), 'k': (1, 8)}
    """
    patterns = {p: compile_pattern("block_overrides", p) for p in overrides or {}}
    for pattern, compiled in patterns.items():
        if not any(compiled.fullmatch(name) for name in targets):
            raise ValueError(
                f"block_overrides pattern {pattern!r} matches none of the {len(targets)} target layers "
                f"(the whole name has to match). The first are {_first(targets)}."
            )
    shapes = {}
    for name, module in targets.items():
        matching = {p: (overrides or {})[p] for p, compiled in patterns.items() if compiled.fullmatch(name)}
        if len(set(map(tuple, matching.values()))) > 1:
            raise ValueError(
                f"block_overrides give {name} more than one shape: {matching}. Make the patterns disjoint."
            )
        try:
            shapes[name] = resolve_block_shape(next(iter(matching.values()), block_shape), tiled_shape(module))
        except TilingError as error:
            raise TilingError(
                f"{name}: {error} Or give this layer its own shape in block_overrides, or leave it out with "
                f"exclude_modules."
            ) from error
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return shapes


def compile_pattern(field: str, pattern: str) -> re.Pattern[str]:
    """Compile a regular expression of a config field; the error names the field.

    Example:
        >>> compile_pattern("target_modules", "(")
        Traceback (most recent call last):
        ...
        ValueError: target_modules='(' is not a regular expression: missing ), unterminated subpattern at position 0
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field}={pattern!r} is not a regular expression: {error}") from error


def _refuse_subclasses(model: nn.Module, linears: Mapping[str, Prunable]) -> None:
    """Say so where layers are there, but their linears are none that `is_linear` takes."""
    for stack, layers in _lists_of_layers(model, lambda module: isinstance(module, nn.Linear)).items():
        found = next((n, m) for n, m in layers.named_modules() if isinstance(m, nn.Linear))
        plain = f" The plain ones outside are {_first(linears)}: target_modules picks them." if linears else ""
        raise ValueError(
            f"The linears inside {stack} of {type(model).__name__} are subclasses of nn.Linear, such as "
            f"{stack}.{found[0]}, a {type(found[1]).__name__}. They may compute something else than nn.Linear and are "
            f"not pruned; where they compute the same, put nn.Linear in their places.{plain}"
        )


def _shared_linears(model: nn.Module, linears: dict[str, Prunable]) -> set[str]:
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    # Inside from_pretrained the tie is a list of names and the parameters are not yet one object.
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    names = {key.removesuffix(".weight") for pair in dict(declared).items() for key in pair}
    return {name for name, m in linears.items() if owners[id(m.weight)] > 1 or name in names}


def _first(names: object, count: int = 3) -> str:
    listed = list(names)  # type: ignore[call-overload]
    return ", ".join(listed[:count]) + (f" and {len(listed) - count} more" if len(listed) > count else "")

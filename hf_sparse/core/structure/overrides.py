"""Block shapes of single layers as they are written: on command lines, in JSON and YAML."""

from __future__ import annotations

import json
from typing import Any

from hf_sparse.core.blocks import BlockShape
from hf_sparse.core.structure.targets import compile_pattern


def parse_block_overrides(given: Any) -> dict[str, BlockShape]:
    """Read `block_overrides`.

    Args:
        given: {regular expression: [h, w]}, as JSON or as it is; None = no overrides.

    Returns:
        {regular expression: (h, w)}, sizes positive or -1.

    Raises:
        ValueError: if it is no JSON, not of this form, or one is no regular expression.

    Example:
        >>> parse_block_overrides('{".*query": [16, -1]}')
        {'.*query': (16, -1)}
    """
    if given is None:
        return {}
    try:
        parsed = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise ValueError(f"block_overrides={given!r} is not JSON: {error}") from error
    good = isinstance(parsed, dict) and all(
        isinstance(shape, list | tuple) and len(shape) == 2 and all(map(is_block_size, shape))
        for shape in parsed.values()
    )
    if not good:
        raise ValueError(
            f"block_overrides={given!r} must map regular expressions to [height, width], "
            f'positive integers or -1, as in {{".*query": [16, 16]}}.'
        )
    for pattern in parsed:
        compile_pattern("block_overrides", pattern)
    return {pattern: (shape[0], shape[1]) for pattern, shape in parsed.items()}


def is_block_size(value: object) -> bool:
    """Tell whether a value is one side of a block: a positive integer, or -1 for the whole dimension."""
    return isinstance(value, int) and not isinstance(value, bool) and (value > 0 or value == -1)

"""A dataclass read from JSON, every value checked: unknown keys, wrong types, numbers that are not finite."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hf_sparse.core.stored.packing import FormatError

_T = TypeVar("_T")


def read_dataclass(cls: type[_T], data: Any, where: str = "") -> _T:
    """Build a dataclass from its JSON form.

    Args:
        cls: a dataclass whose fields are scalars, `X | None`, `Literal`, `dict[str, X]`, tuples or such dataclasses.
        data: what `json.loads` gave.
        where: path of `data` inside the file, with a dot at its end, for error messages.

    Raises:
        FormatError: if a key is missing or unknown or a value has the wrong type; names the fact.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Point:
        ...     x: int
        ...     label: str | None = None
        >>> read_dataclass(Point, {"x": 3})
        Point(x=3, label=None)
        >>> read_dataclass(Point, {"x": 3.5})
        Traceback (most recent call last):
        ...
        hf_sparse.core.stored.formats.FormatError: x=3.5 must be int.
    """
    here = where.removesuffix(".") or "the file"
    if not isinstance(data, Mapping):
        raise FormatError(f"{here} must be a JSON object, found {type(data).__name__}.")
    hints = _hints(cls)  # type: ignore[arg-type]
    known = [spec.name for spec in fields(cls)]  # type: ignore[arg-type]
    if unknown := [key for key in data if key not in known]:
        raise FormatError(f"{where}{unknown[0]} is unknown: expected one of {sorted(known)}.")
    values = {key: _read_value(hints[key], value, f"{where}{key}") for key, value in data.items()}
    try:
        return cls(**values)
    except TypeError as error:
        # The only mistake left is a key that is missing, and the constructor says which.
        raise FormatError(f"{here} is incomplete: {error}.") from error


@cache
def _hints(cls: type) -> dict[str, Any]:
    # Python evaluates the text of every annotation anew, which takes half of the time of reading a card.
    return get_type_hints(cls)


def _read_value(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return None if value is None else _read_value(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise FormatError(f"{where}={value!r} must be one of {list(args)}.")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple) or (args[-1] is not Ellipsis and len(value) != len(args)):
            count = "a list" if args[-1] is Ellipsis else f"a list of {len(args)}"
            raise FormatError(f"{where}={value!r} must be {count}.")
        return tuple(_read_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise FormatError(f"{where}={value!r} must be a JSON object.")
        return {_read_value(str, k, where): _read_value(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if is_dataclass(hint) and isinstance(hint, type):
        return read_dataclass(hint, asdict(value) if isinstance(value, hint) else value, f"{where}.")
    return _read_scalar(hint, value, where)


def _read_scalar(hint: Any, value: Any, where: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise FormatError(f"{where}={value!r} must be finite.")
    if hint is Any:
        if value is not None and not isinstance(value, bool | int | float | str | list | tuple | dict):
            raise FormatError(f"{where}={value!r} must be plain JSON.")
        return value
    accepted = (int, float) if hint is float else hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise FormatError(f"{where}={value!r} must be {hint.__name__}.")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        # JSON can name half a character; no file can hold one.
        raise FormatError(f"{where}={value!r} is no text.")
    return value

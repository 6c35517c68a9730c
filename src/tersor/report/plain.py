"""Frozen dataclasses to and from what JSON can hold, checked field by field on the way back."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tersor.errors import BadInput

T = TypeVar("T")
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def to_plain(value: Any) -> Any:
    """Dataclasses become dictionaries, tuples lists, and numbers that JSON lacks the strings NaN, Infinity, -Infinity.

    >>> to_plain((1, float("inf")))
    [1, 'Infinity']
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def from_plain(kind: type[T], value: Any, where: str) -> T:
    """The dataclass ``kind`` from a dictionary that :func:`to_plain` made.

    Raises :class:`~tersor.errors.BadInput` for a missing, unknown or mistyped field; the message names it from
    ``where`` on, like ``report.layers[3].codec``.
    """
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise BadInput(f"{where}.{unknown[0]} is not a field that this version of tersor knows; remove it.")
    given = {}
    for name, declared in fields.items():
        if name in value:
            given[name] = _decode(hints[name], value[name], f"{where}.{name}")
        elif declared.default is dataclasses.MISSING and declared.default_factory is dataclasses.MISSING:
            raise BadInput(f"{where}.{name} is missing from the report data.")
    return kind(**given)


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # Only "X | None" occurs.
        wanted = next(arg for arg in args if arg is not type(None))
        return None if value is None else _decode(wanted, value, where)
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        return _decode_tuple(args, value, where)
    if origin is Mapping:
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        return {key: _decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    return _decode_scalar(hint, value, where)


def _decode_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _wrong(where, "a list", value)
    if args[-1] is Ellipsis:
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(args):
        raise _wrong(where, f"a list of {len(args)}", value)
    return tuple(_decode(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True)))


def _decode_scalar(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise _wrong(where, "one of " + ", ".join(map(repr, get_args(hint))), value)
        return value
    if hint is float and value in _NOT_FINITE:
        return float(value)
    accepted = (int, float) if hint is float else hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise _wrong(where, _NAMES.get(hint, str(hint)), value)
    return value


def _wrong(where: str, expected: str, found: Any) -> BadInput:
    shown = repr(found)
    return BadInput(f"{where} must be {expected}, found {shown if len(shown) <= 60 else shown[:57] + '...'}.")

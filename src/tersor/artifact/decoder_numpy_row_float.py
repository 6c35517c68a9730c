"""Decode ``m2fp<b>:e<E>m<M>:<group>`` with NumPy alone; see ``SPEC.md``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

HEAD = r"m2fp[468]"
_TEXT = re.compile(r"m2fp([468]):e([1-5])m(\d):(?:row|g([1-9]\d{0,5}))")


def parts(text: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Part name to (dtype, shape) for a weight ``(rows, columns)``. Raises ValueError for what cannot be."""
    bits, _, groups = _read(text, columns)
    return {
        "codes": ("U8", (rows, (columns * bits + 7) // 8)),
        "shift": ("U8", (rows, (groups + 1) // 2)),
        "super": ("F16", (rows, 1)),
    }


def decode(text: str, arrays: Mapping[str, Array], rows: int, columns: int) -> Array:
    """The float32 weight ``(rows, columns)``.

    >>> arrays = {"codes": np.array([[0x1F, 0x72]], np.uint8), "shift": np.array([[0x20]], np.uint8)}
    >>> decode("m2fp4:e2m1:g2", {**arrays, "super": np.array([[3]], np.float16)}, 1, 4).tolist()
    [[-18.0, 1.5, 0.75, 4.5]]
    """
    bits, exponent_bits, groups = _read(text, columns)
    each = np.unpackbits(arrays["codes"], axis=1, bitorder="little")[:, : columns * bits]
    code = (each.reshape(rows, columns, bits).astype(np.int64) << np.arange(bits)).sum(2)
    mantissa_bits = bits - 1 - exponent_bits
    sign = 1.0 - 2.0 * (code >> (bits - 1))
    field = code >> mantissa_bits & 2**exponent_bits - 1
    fraction = (code & 2**mantissa_bits - 1) / 2**mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1
    number = sign * np.ldexp((field > 0) + fraction, np.maximum(field, 1) - bias)
    shift = np.stack([arrays["shift"] & 15, arrays["shift"] >> 4], axis=2).reshape(rows, -1)[:, :groups]
    scale = np.ldexp(arrays["super"].astype(np.float32), -shift.astype(np.int64)).astype(np.float32)
    values: Array = number.astype(np.float32).reshape(rows, groups, columns // groups) * scale[:, :, None]
    return values.reshape(rows, columns)


def _read(text: str, columns: int) -> tuple[int, int, int]:
    """Bits of a code, bits of its exponent, groups in a row."""
    match = _TEXT.fullmatch(text)
    if match is None or 1 + int(match[2]) + int(match[3]) != int(match[1]):
        raise ValueError(f"codec '{text[:80]}' is not of the form m2fp<b>:e<E>m<M>:g<n>|row")
    group = int(match[4]) if match[4] else columns
    if group == 0 or columns % group:
        raise ValueError(f"a group of {group} does not divide {columns} columns")
    return int(match[1]), int(match[2]), columns // group

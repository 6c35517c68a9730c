"""Decode ``bin…`` and ``fdb…``, sums of binary planes, with NumPy alone; see ``SPEC.md``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

HEAD = r"bin[2-4]?|fdb"
_TEXT = re.compile(r"(?:bin([2-4])?|(fdb)):(?:row|g([1-9]\d{0,5}))(?::(bf16|s8))?")


def parts(text: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Part name to (dtype, shape) for a weight ``(rows, columns)``. Raises ValueError for what cannot be."""
    planes, _, groups, scales = _read(text, columns)
    codes: dict[str, tuple[str, tuple[int, ...]]] = {"codes": ("U8", (rows, (columns * planes + 7) // 8))}
    if scales == "s8":
        return {**codes, "scale": ("U8", (rows, groups * planes)), "super": ("F16", (rows, 1))}
    return {**codes, "scale": ("BF16" if scales == "bf16" else "F16", (rows, groups * planes))}


def decode(text: str, arrays: Mapping[str, Array], rows: int, columns: int) -> Array:
    """The float32 weight ``(rows, columns)``.

    >>> arrays = {"codes": np.array([[0b11_10_01_00]], np.uint8), "scale": np.array([[1, 0.25]], np.float16)}
    >>> decode("bin2:row", arrays, 1, 4).tolist()
    [[-1.25, 0.75, -0.75, 1.25]]
    >>> decode("fdb:row", arrays, 1, 4).tolist()
    [[0.0, -1.0, 0.25, -0.75]]
    """
    planes, dual, groups, scales = _read(text, columns)
    each = np.unpackbits(arrays["codes"], axis=1, bitorder="little")[:, : columns * planes]
    bits = each.reshape(rows, groups, columns // groups, planes).astype(np.float32)
    scale = _scale(arrays, scales).reshape(rows, groups, 1, planes)
    values: Array = np.zeros((rows, groups, columns // groups), np.float32)
    for plane in range(planes):
        signs = bits[..., plane] * np.float32(2 * plane - 1) if dual else bits[..., plane] * np.float32(2) - 1
        term = signs * scale[..., plane]
        values = term if plane == 0 else values + term
    return values.reshape(rows, columns)


def _read(text: str, columns: int) -> tuple[int, bool, int, str]:
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(f"codec '{text[:80]}' is not of the form bin[2-4]|fdb:g<n>|row[:bf16|:s8]")
    group = int(match[3]) if match[3] else columns
    if group == 0 or columns % group:
        raise ValueError(f"a group of {group} does not divide {columns} columns")
    planes = 2 if match[2] else int(match[1] or 1)
    return planes, bool(match[2]), columns // group, match[4] or "fp16"


def _scale(arrays: Mapping[str, Array], scales: str) -> Array:
    if scales == "s8":
        return arrays["scale"].astype(np.float32) * arrays["super"].astype(np.float32)
    if scales == "bf16":
        return (arrays["scale"].astype(np.uint32) << 16).view(np.float32)
    return arrays["scale"].astype(np.float32)

"""Decode ``ternary:…`` with NumPy alone; see ``SPEC.md``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

HEAD = r"ternary"
_TEXT = re.compile(r"ternary:(?:row|g([1-9]\d{0,5}))(?::(bf16|s8))?")


def parts(text: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Part name to (dtype, shape) for a weight ``(rows, columns)``. Raises ValueError for what cannot be."""
    groups, scales = _read(text, columns)
    codes: dict[str, tuple[str, tuple[int, ...]]] = {"codes": ("U8", (rows, (columns + 4) // 5))}
    if scales == "s8":
        return {**codes, "scale": ("U8", (rows, groups)), "super": ("F16", (rows, 1))}
    return {**codes, "scale": ("BF16" if scales == "bf16" else "F16", (rows, groups))}


def decode(text: str, arrays: Mapping[str, Array], rows: int, columns: int) -> Array:
    """The float32 weight ``(rows, columns)``.

    >>> arrays = {"codes": np.array([[2 + 0 * 3 + 1 * 9]], np.uint8), "scale": np.array([[0.5]], np.float16)}
    >>> decode("ternary:row", arrays, 1, 3).tolist()
    [[0.5, -0.5, 0.0]]
    """
    groups, scales = _read(text, columns)
    digits = arrays["codes"][:, :, None] // np.array([1, 3, 9, 27, 81], np.uint8) % 3
    signs = digits.reshape(rows, -1)[:, :columns].astype(np.float32) - np.float32(1)
    scale = _scale(arrays, scales)
    values: Array = signs.reshape(rows, groups, columns // groups) * scale[:, :, None]
    return values.reshape(rows, columns)


def _read(text: str, columns: int) -> tuple[int, str]:
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(f"codec '{text[:80]}' is not of the form ternary:g<n>|row[:bf16|:s8]")
    group = int(match[1]) if match[1] else columns
    if group == 0 or columns % group:
        raise ValueError(f"a group of {group} does not divide {columns} columns")
    return columns // group, match[2] or "fp16"


def _scale(arrays: Mapping[str, Array], scales: str) -> Array:
    if scales == "s8":
        return arrays["scale"].astype(np.float32) * arrays["super"].astype(np.float32)
    if scales == "bf16":
        return (arrays["scale"].astype(np.uint32) << 16).view(np.float32)
    return arrays["scale"].astype(np.float32)

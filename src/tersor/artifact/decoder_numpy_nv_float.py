"""Decode ``nvfp4:s<n>`` with NumPy alone; see ``SPEC.md``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

HEAD = r"nvfp4"
_TEXT = re.compile(r"nvfp4:s(\d|1\d|2[0-4])")
_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def parts(text: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Part name to (dtype, shape) for a weight ``(rows, columns)``. Raises ValueError for what cannot be."""
    _read(text, columns)
    return {"codes": ("U8", (rows, columns // 2)), "scale": ("U8", (rows, columns // 16))}


def decode(text: str, arrays: Mapping[str, Array], rows: int, columns: int) -> Array:
    """The float32 weight ``(rows, columns)``.

    >>> arrays = {"codes": np.full((1, 8), 0xF1, np.uint8), "scale": np.array([[0x38]], np.uint8)}
    >>> decode("nvfp4:s1", arrays, 1, 16)[0, :3].tolist()
    [0.25, -3.0, 0.25]
    """
    shift = _read(text, columns)
    code = np.stack([arrays["codes"] & 15, arrays["codes"] >> 4], axis=2).reshape(rows, columns)
    number = np.where(code > 7, -_MAGNITUDES[code & 7], _MAGNITUDES[code & 7])
    bits = arrays["scale"].astype(np.int64)
    field, fraction = bits >> 3 & 15, (bits & 7) / 8
    scale = np.ldexp((field > 0) + fraction, np.maximum(field, 1) - 7 - shift)
    values: Array = number.reshape(rows, columns // 16, 16) * scale.astype(np.float32)[:, :, None]
    return values.reshape(rows, columns)


def _read(text: str, columns: int) -> int:
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(f"codec '{text[:80]}' is not of the form nvfp4:s<n>, n from 0 to 24")
    if columns % 16:
        raise ValueError(f"a group of 16 does not divide {columns} columns")
    return int(match[1])

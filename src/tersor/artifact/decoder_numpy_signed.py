"""Decode ``sint<b>:…`` with NumPy alone; see ``SPEC.md``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

HEAD = r"sint[2-8]"
_TEXT = re.compile(r"sint([2-8]):(?:row|g([1-9]\d{0,5}))(?::(bf16))?(:a8s?)?")


def parts(text: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Part name to (dtype, shape) for a weight ``(rows, columns)``. Raises ValueError for what cannot be."""
    bits, groups, scales = _read(text, columns)
    inputs: dict[str, tuple[str, tuple[int, ...]]] = {"input_scale": ("BF16", (1,))} if text.endswith(":a8s") else {}
    return {"codes": ("U8", (rows, (columns * bits + 7) // 8)), "scale": (scales, (rows, groups)), **inputs}


def decode(text: str, arrays: Mapping[str, Array], rows: int, columns: int) -> Array:
    """The float32 weight ``(rows, columns)``.

    >>> arrays = {"codes": np.array([[0xF0, 0x08]], np.uint8), "scale": np.array([[-0.5]], np.float16)}
    >>> decode("sint4:row", arrays, 1, 3).tolist()
    [[4.0, -3.5, -0.0]]
    """
    bits, groups, scales = _read(text, columns)
    each = np.unpackbits(arrays["codes"], axis=1, bitorder="little")[:, : columns * bits]
    code = (each.reshape(rows, columns, bits).astype(np.int64) << np.arange(bits)).sum(2)
    number = (code - 2 ** (bits - 1)).astype(np.float32).reshape(rows, groups, columns // groups)
    scale = arrays["scale"]
    if scales == "BF16":
        scale = (scale.astype(np.uint32) << 16).view(np.float32)
    values: Array = number * scale.astype(np.float32)[:, :, None]
    return values.reshape(rows, columns)


def _read(text: str, columns: int) -> tuple[int, int, str]:
    """Bits of a code, groups in a row, type of the scales."""
    match = _TEXT.fullmatch(text)
    if match is None or (match[4] and (match[1] != "8" or match[2])):
        raise ValueError(f"codec '{text[:80]}' is not of the form sint<b>:g<n>|row[:bf16], nor sint8:row[:bf16]:a8[s]")
    group = int(match[2]) if match[2] else columns
    if group == 0 or columns % group:
        raise ValueError(f"a group of {group} does not divide {columns} columns")
    return int(match[1]), columns // group, "BF16" if match[3] else "F16"

"""Decode ``e8p:row`` with NumPy alone; see ``SPEC.md``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

HEAD = r"e8p"


def parts(text: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Part name to (dtype, shape) for a weight ``(rows, columns)``. Raises ValueError for what cannot be."""
    if text != "e8p:row":
        raise ValueError(f"codec '{text[:80]}' is not e8p:row")
    if columns % 8:
        raise ValueError(f"vectors of 8 columns do not divide {columns}")
    return {"codes": ("U8", (rows, columns // 4)), "scale": ("F16", (rows, 1))}


@lru_cache(maxsize=1)
def patterns() -> Array:
    """The 256 patterns of digits ``(256, 8)``; a magnitude is its digit and a half."""
    inner, outer = [], []
    for digits in product(range(3), repeat=8):
        ones, twos = digits.count(1), digits.count(2)
        if ones + 3 * twos <= 4:
            inner.append(digits)
        elif (ones, twos) == (5, 0):
            outer.append(digits)
    return np.array(inner + outer[:29])


def decode(text: str, arrays: Mapping[str, Array], rows: int, columns: int) -> Array:
    """The float32 weight ``(rows, columns)``.

    >>> arrays = {"codes": np.array([[0, 1]], np.uint8), "scale": np.array([[2]], np.float16)}
    >>> decode("e8p:row", arrays, 1, 8).tolist()
    [[-0.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, -0.5]]
    """
    parts(text, rows, columns)
    pairs = arrays["codes"].reshape(rows, columns // 8, 2).astype(np.int64)
    word = pairs[:, :, 0] + 256 * pairs[:, :, 1]
    digits = patterns()[word % 256]
    negative = word[:, :, None] >> np.arange(8, 15) & 1
    last = (digits.sum(2) + negative.sum(2)) % 2
    signs = 1 - 2 * np.concatenate([negative, last[:, :, None]], 2)
    shift = np.where(word >> 15, -0.25, 0.25)
    vectors = ((digits + 0.5) * signs + shift[:, :, None]).astype(np.float32)
    values: Array = vectors.reshape(rows, columns) * arrays["scale"].astype(np.float32)
    return values

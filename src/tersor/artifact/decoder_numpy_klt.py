"""NumPy decoding of ``klt``, a codec in a stored basis; see ``SPEC.md``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Parts = dict[str, tuple[str, tuple[int, ...]]]

HEAD = r"klt(4|8|16|32|64)?"
RECURSES = True
"""Its functions are also given the same functions for codecs of any family."""


def parts(text: str, rows: int, columns: int, recurse: Callable[[str, int, int], Parts]) -> Parts:
    """Part name to (dtype, shape). ``recurse``: the same for any codec. Raises ValueError for what cannot be."""
    size, inner = _taken_apart(text, columns)
    angles = ("I8", (columns // size, size * (size - 1) // 2))
    return {"angles": angles, **{"k_" + name: part for name, part in recurse(inner, rows, columns).items()}}


def decode(
    text: str,
    arrays: Mapping[str, Array],
    rows: int,
    columns: int,
    recurse: Callable[[str, Mapping[str, Array], int, int], Array],
) -> Array:
    """The float32 weight ``(rows, columns)``. ``recurse``: the same for any codec."""
    size, inner = _taken_apart(text, columns)
    turned = recurse(inner, {n[2:]: array for n, array in arrays.items() if n.startswith("k_")}, rows, columns)
    weight: Array = turned.reshape(rows, columns // size, size).copy()
    number = arrays["angles"].astype(np.float64)
    whole = number * number + 16384
    cosine = ((16384 - number * number) / whole).astype(np.float32)
    sine = (256 * number / whole).astype(np.float32)
    last = cosine.shape[1]
    for stage in range(2 * size - 4, -1, -1):
        row = max(0, stage - size + 2)
        first, low = last - (stage // 2 - row + 1), size - 2 - stage + 2 * row
        c, s = cosine[:, first:last], sine[:, first:last]
        high = low + 2 * (last - first)
        near, far = weight[:, :, low:high:2].copy(), weight[:, :, low + 1 : high : 2].copy()
        weight[:, :, low:high:2] = near * c - far * s
        weight[:, :, low + 1 : high : 2] = far * c + near * s
        last = first
    whole_rows: Array = weight.reshape(rows, columns)
    return whole_rows


def _taken_apart(text: str, columns: int) -> tuple[int, str]:
    """Columns of a block, and the text of the codec inside."""
    match = re.fullmatch(rf"{HEAD}\((.*)\)(:weights)?", text)
    size = int(match[1] or columns) if match else 0
    if match is None or size < 2 or columns % size:
        raise ValueError(f"codec '{text[:80]}' cannot be read, or its blocks do not divide {columns} columns")
    return size, match[2]

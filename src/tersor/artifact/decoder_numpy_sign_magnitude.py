"""Decode ``bitstack…``, a stack of signs and low-rank magnitudes, with NumPy alone; see ``SPEC.md``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

HEAD = r"bitstack[1-8]"
_TEXT = re.compile(r"bitstack([1-8]):k([1-9]\d{0,4})(:plain)?")


def parts(text: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Part name to (dtype, shape) for a weight ``(rows, columns)``. Raises ValueError for what cannot be."""
    stages, rank, plain = _read(text, columns)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for stage in range(stages):
        found[f"signs{stage}"] = ("U8", (rows, (columns + 7) // 8))
        found[f"left{stage}"] = ("F16", (rows, rank))
        found[f"right{stage}"] = ("F16", (rank, columns))
    return found if plain else {**found, "scale": ("F16", (columns,))}


def decode(text: str, arrays: Mapping[str, Array], rows: int, columns: int) -> Array:
    """The float32 weight ``(rows, columns)``.

    >>> arrays = {"signs0": np.array([[0b01]], np.uint8), "left0": np.array([[0.5]], np.float16)}
    >>> arrays["right0"] = np.array([[3, 1]], np.float16)
    >>> decode("bitstack1:k1:plain", arrays, 1, 2).tolist()
    [[1.5, -0.5]]
    """
    stages, rank, plain = _read(text, columns)
    total: Array = np.zeros((rows, columns), np.float32)
    for stage in range(stages):
        left, right = arrays[f"left{stage}"].astype(np.float32), arrays[f"right{stage}"].astype(np.float32)
        size = left[:, :1] * right[0]
        for index in range(1, rank):
            size = size + left[:, index : index + 1] * right[index]
        size = np.abs(size)
        signs = np.unpackbits(arrays[f"signs{stage}"], axis=1, bitorder="little")[:, :columns]
        term = np.where(signs > 0, size, -size)
        total = term if stage == 0 else total + term
    return total if plain else total * arrays["scale"].astype(np.float32)


def _read(text: str, columns: int) -> tuple[int, int, bool]:
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(f"codec '{text[:80]}' is not of the form bitstack<1-8>:k<rank>[:plain]")
    if int(match[2]) > columns:
        raise ValueError(f"a rank of {match[2]} is more than {columns} columns")
    return int(match[1]), int(match[2]), match[3] is not None

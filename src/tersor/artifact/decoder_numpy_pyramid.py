"""Decode ``pvq<rate>:n<columns>`` with NumPy alone; see ``SPEC.md``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

HEAD = r"pvq[1-6]"
_TEXT = re.compile(r"pvq([1-6]):n(\d{1,2})")


def parts(text: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Part name to (dtype, shape) for a weight ``(rows, columns)``. Raises ValueError for what cannot be."""
    dim, _, bits = _read(text, columns)
    return {"codes": ("U8", (rows, (columns // dim * bits + 7) // 8)), "scale": ("F16", (rows, 1))}


def decode(text: str, arrays: Mapping[str, Array], rows: int, columns: int) -> Array:
    """The float32 weight ``(rows, columns)``.

    >>> arrays = {"codes": np.array([[10, 0]], np.uint8), "scale": np.array([[0.5]], np.float16)}
    >>> decode("pvq2:n8", arrays, 1, 8).tolist()
    [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 5.0]]
    """
    dim, pulses, bits = _read(text, columns)
    code = _unpack(arrays["codes"], bits, columns // dim).reshape(-1)
    shape = shapes(code >> 8, dim, pulses).astype(np.float32)
    gain = (code & 255).astype(np.float32)
    # Sums of squares are whole numbers below 2^24, so that their order does not matter.
    unit = shape * (gain / np.sqrt(np.square(shape).sum(1, dtype=np.float32)))[:, None]
    values: Array = unit.reshape(rows, columns) * arrays["scale"].astype(np.float32)
    return values


@lru_cache(maxsize=64)
def ways(dim: int, pulses: int) -> int:
    """Integer vectors of ``dim`` columns whose magnitudes sum to ``pulses``."""
    if pulses == 0:
        return 1
    row = [1] + [0] * pulses
    for _ in range(dim):
        new = [1]
        for k in range(1, pulses + 1):
            new.append(row[k] + row[k - 1] + new[k - 1])
        row = new
    return row[pulses]


def shapes(number: Array, dim: int, pulses: int) -> Array:
    """Vectors ``(n, dim)`` from their numbers: by the first column's magnitude, positive first, then by the rest."""
    left = np.full(len(number), pulses)
    result = np.zeros((len(number), dim), np.int64)
    for column in range(dim):
        rest = dim - column - 1
        table = np.full((pulses + 1, pulses + 1), np.iinfo(np.int64).max)
        for k in range(pulses + 1):
            before = 0
            for m in range(k + 1):
                table[k, m] = before
                before += ways(rest, k - m) * (1 if m == 0 else 2)
        size = (table[left] <= number[:, None]).sum(1) - 1
        number = number - table[left, size]
        left = left - size
        half = np.array([ways(rest, k) for k in range(pulses + 1)])[left]
        negative = (size > 0) & (number >= half)
        number = np.where(negative, number - half, number)
        result[:, column] = np.where(negative, -size, size)
    return result


def _read(text: str, columns: int) -> tuple[int, int, int]:
    """Columns of a vector, pulses, bits of a code."""
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(f"codec '{text[:80]}' is not of the form pvq<rate>:n<columns>")
    rate, dim = int(match[1]), int(match[2])
    if not 2 <= dim <= 48 or rate * dim > 56 or 2 * dim > 2 ** max(rate * dim - 8, 0):
        raise ValueError(f"codec '{text[:80]}' does not exist")
    if columns % dim:
        raise ValueError(f"vectors of {dim} columns do not divide {columns}")
    pulses = 1
    while ways(dim, pulses + 1) <= 1 << (rate * dim - 8):
        pulses += 1
    return dim, pulses, 8 + (ways(dim, pulses) - 1).bit_length()


def _unpack(stream: Array, bits: int, count: int) -> Array:
    """Code j of a row is bits ``j·bits …`` of the row's little-endian stream of bits."""
    each = np.unpackbits(stream, axis=1, bitorder="little")[:, : count * bits]
    codes: Array = (each.reshape(len(stream), count, bits).astype(np.int64) << np.arange(bits)).sum(2)
    return codes

"""Decode ``vq<bits>x<columns>[:r<stages>]`` with NumPy alone; see ``SPEC.md``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

HEAD = r"vq\d{1,2}x\d{1,2}"
_TEXT = re.compile(r"vq(\d{1,2})x(\d{1,2})(?::r([2-4]))?")


def parts(text: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Part name to (dtype, shape) for a weight ``(rows, columns)``. Raises ValueError for what cannot be."""
    bits, dim, stages = _read(text, columns)
    return {
        "codes": ("U8", (rows, (columns // dim * bits * stages + 7) // 8)),
        "scale": ("F16", (rows, 1)),
        "codebook": ("F16", (stages, 2**bits, dim)),
    }


def decode(text: str, arrays: Mapping[str, Array], rows: int, columns: int) -> Array:
    """The float32 weight ``(rows, columns)``. The codebook belongs to the whole layer, whatever rows are given.

    >>> book = np.array([[[1, 2], [3, 4]]], np.float16)
    >>> arrays = {"codes": np.array([[0b10]], np.uint8), "scale": np.array([[0.5]], np.float16), "codebook": book}
    >>> decode("vq1x2", arrays, 1, 4).tolist()
    [[0.5, 1.0, 1.5, 2.0]]
    """
    bits, dim, stages = _read(text, columns)
    book = arrays["codebook"].astype(np.float32)
    code = _unpack(arrays["codes"], bits * stages, columns // dim)
    values = book[0][code % 2**bits]
    for stage in range(1, stages):
        values = values + book[stage][(code >> stage * bits) % 2**bits]
    return np.asarray(values.reshape(rows, columns) * arrays["scale"].astype(np.float32))


def _read(text: str, columns: int) -> tuple[int, int, int]:
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(f"codec '{text[:80]}' is not of the form vq<bits>x<columns>[:r<stages>]")
    bits, dim, stages = int(match[1]), int(match[2]), int(match[3] or 1)
    if not (1 <= bits <= 14 and 2 <= dim <= 16 and bits * stages <= 30):
        raise ValueError(f"codec '{text[:80]}' does not exist")
    if columns % dim:
        raise ValueError(f"vectors of {dim} columns do not divide {columns}")
    return bits, dim, stages


def _unpack(stream: Array, bits: int, count: int) -> Array:
    """Code j of a row is bits ``j·bits …`` of the row's little-endian stream of bits."""
    each = np.unpackbits(stream, axis=1, bitorder="little")[:, : count * bits]
    codes: Array = (each.reshape(len(stream), count, bits).astype(np.int64) << np.arange(bits)).sum(2)
    return codes

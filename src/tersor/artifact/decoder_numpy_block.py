"""Decode ``block<b>:<rows>x<columns>|layer[:shift][:fp16]`` with NumPy alone; see ``SPEC.md``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

HEAD = r"block[2-8]"
_TEXT = re.compile(r"block([2-8]):(?:(\d{1,6})x(\d{1,6})|layer)(:shift)?(:fp16)?")


def parts(text: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Part name to (dtype, shape) for a weight ``(rows, columns)``. Raises ValueError for what cannot be."""
    match, tile, width = _read(text, rows, columns)
    blocks = (-(-rows // tile), columns // width)
    return {
        "codes": ("U8", (rows, (columns * int(match[1]) + 7) // 8)),
        **({"scale": ("F16", blocks)} if match[5] else {"exponent": ("U8", blocks)}),
        **({"shift": ("U8", blocks)} if match[4] else {}),
    }


def decode(text: str, arrays: Mapping[str, Array], rows: int, columns: int) -> Array:
    """The float32 weight ``(rows, columns)``.

    >>> arrays = {"codes": np.array([[0x1F], [0x80]], np.uint8), "exponent": np.array([[126]], np.uint8)}
    >>> decode("block4:2x2", arrays, 2, 2).tolist()
    [[3.5, -3.5], [-4.0, 0.0]]
    """
    match, tile, width = _read(text, rows, columns)
    bits = int(match[1])
    each = np.unpackbits(arrays["codes"], axis=1, bitorder="little")[:, : columns * bits]
    code = (each.reshape(rows, columns, bits).astype(np.int64) << np.arange(bits)).sum(2) - 2 ** (bits - 1)

    def spread(blocks: Array) -> Array:
        return blocks.repeat(tile, 0)[:rows].repeat(width, 1)

    if match[4]:
        code = code + spread(arrays["shift"].astype(np.int64) - 128)
    if match[5]:
        scale = arrays["scale"].astype(np.float32)
    else:
        scale = np.ldexp(np.float32(1), arrays["exponent"].astype(np.int64) - 127).astype(np.float32)
    return np.asarray(code.astype(np.float32) * spread(scale))


def _read(text: str, rows: int, columns: int) -> tuple[re.Match[str], int, int]:
    """The text taken apart; rows and columns of a block."""
    match = _TEXT.fullmatch(text)
    if match is None or (match[2] and 0 in (int(match[2]), int(match[3]))):
        raise ValueError(f"codec '{text[:80]}' is not of the form block<b>:<rows>x<columns>|layer[:shift][:fp16]")
    width = int(match[3] or max(columns, 1))
    if columns % width:
        raise ValueError(f"blocks of {width} columns do not divide {columns} columns")
    return match, max(min(int(match[2]), rows) if match[2] else rows, 1), width

"""Entropy-coded trellis weights in plain NumPy: codecs ``ectcq<rate>`` and ``ectcq<rate>:t<states>``.

Needs nothing of tersor. SPEC.md describes the format; see :func:`decode`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

HEAD = r"ectcq(\d(?:\.\d{1,3})?)"
"""What the head of such a codec's text matches."""

SYMBOLS, REACH, ESCAPE, LANES = 32, 15, 31, 32
POLYNOMIALS = {
    1: (0, 0),
    4: (5, 2),
    8: (11, 4),
    16: (19, 4),
    32: (37, 8),
    64: (67, 20),
    128: (157, 86),
    256: (333, 242),
}
"""``h0`` and ``h1`` by the number of states."""


def parts(text: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The stored tensors: names, safetensors dtypes and shapes."""
    milli, _ = _numbers(text)
    whole, least = milli * rows * columns // 8000, 4 * min(columns, LANES)
    aside = _aside(rows, columns)
    if rows < 128:
        count = max(whole - (_size(_aside(1024, columns)) + least) * rows // 1024, 0) + least
    else:
        count = whole - _size(aside)
    return {**aside, "stream": ("U8", (count,))}


def decode(text: str, arrays: Mapping[str, Any], rows: int, columns: int) -> Any:
    """Float32 weights ``(rows, columns)``. Raises ValueError when the stream ends early."""
    _, states = _numbers(text)
    model, column = arrays["model"], arrays["column"]
    kind, low = (column >> 5).astype(np.int64), model[:, -1].astype(np.int64)
    frequency = _frequencies(model[:, : 2 * SYMBOLS].reshape(-1, 2, SYMBOLS))
    number = _numbers_of(arrays["stream"], (rows, columns), kind, frequency, low, states)
    nibbles = np.stack([arrays["row"] & 15, arrays["row"] >> 4], 1).reshape(-1)[:rows]
    row_table = np.array([2.0 ** (-i / 4) for i in range(16)], np.float32)
    column_table = np.array([2.0 ** ((i - 20) / 4) for i in range(32)], np.float32)
    shrink = np.zeros((len(model), 5), np.float32)
    shrink[:, 1:] = model[:, 2 * SYMBOLS : 2 * SYMBOLS + 4].astype(np.float32) / np.float32(256)
    row = arrays["scale"] * row_table[nibbles]
    step = row[:, None] * column_table[column & 31]
    inward = np.sign(number).astype(np.float32) * shrink[kind, np.minimum(abs(number), 4)]
    return step * (number.astype(np.float32) - inward)


def _aside(rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    classes = max(min((rows if rows >= 128 else 1024) * columns >> 15, 8), 1)
    return {
        "row": ("U8", ((rows + 1) // 2,)),
        "column": ("U8", (columns,)),
        "model": ("U8", (classes, 2 * SYMBOLS + 5)),
        "scale": ("F32", (1,)),
    }


def _size(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    return sum((4 if dtype == "F32" else 1) * int(np.prod(shape)) for dtype, shape in tensors.values())


def _numbers(text: str) -> tuple[int, int]:
    match = re.fullmatch(HEAD + r"(?::t(\d+))?", text)
    if not match:
        raise ValueError(f"{text!r} is not an entropy-coded trellis codec")
    return round(float(match[1]) * 1000), int(match[2] or 8)


def _frequencies(codes: Any) -> Any:
    """Frequencies ``(classes, 2, 32)`` that add up to 4096, from one byte each."""
    code = codes.astype(np.int64)
    weight = np.where(code > 0, (16 + (code & 15)) << (code >> 4), 0)
    weight[..., REACH] += weight.sum(-1) == 0
    share = np.where(weight > 0, np.maximum(weight * 4096 // weight.sum(-1, keepdims=True), 1), 0)
    largest = share.argmax(-1)[..., None]
    missing = 4096 - share.sum(-1, keepdims=True)
    np.put_along_axis(share, largest, np.take_along_axis(share, largest, -1) + missing, -1)
    return share


def _numbers_of(stream: Any, shape: tuple[int, int], kind: Any, frequency: Any, low: Any, states: int) -> Any:
    """Grid numbers int64 of ``shape``, read from the stream."""
    rows, columns = shape
    h0, h1 = POLYNOMIALS[states]
    lanes = min(columns, LANES)
    data = stream.tobytes()
    x = np.frombuffer(data[: 4 * lanes], "<u4").astype(np.int64)
    words = np.frombuffer(data[4 * lanes : len(data) // 2 * 2], "<u2").astype(np.int64)
    before = np.cumsum(frequency, -1) - frequency
    symbol_of = np.array([[np.repeat(np.arange(SYMBOLS), table) for table in pair] for pair in frequency])
    state = np.zeros(columns, np.int64)
    numbers = np.empty(shape, np.int64)
    read = 0

    def advance(who: Any, share: Any, start: Any) -> None:
        nonlocal read
        x[who] = share * (x[who] >> 12) + (x[who] & 4095) - start
        empty = who[x[who] < 65536]
        if read + len(empty) > len(words):
            raise ValueError("the stream ends before its last symbol")
        x[empty] = x[empty] << 16 | words[read : read + len(empty)]
        read += len(empty)

    def raw(who: Any, bits: Any) -> Any:
        value = (x[who] & 4095) >> (12 - bits)
        advance(who, 1 << (12 - bits), value << (12 - bits))
        return value

    for row in range(rows):
        for first in range(0, columns, LANES):
            here = slice(first, min(first + LANES, columns))
            table, union = kind[here], state[here] & 1
            everyone = np.arange(len(table))
            symbol = symbol_of[table, union, x[everyone] & 4095]
            advance(everyone, frequency[table, union, symbol], before[table, union, symbol])
            index = symbol - REACH
            more = np.flatnonzero((low[table] > 0) & (symbol != ESCAPE))
            if len(more):
                bits = low[table[more]]
                index[more] = (index[more] << bits) + raw(more, bits)
            far = np.flatnonzero(symbol == ESCAPE)
            if len(far):
                high = raw(far, 8)
                index[far] = ((high << 8 | raw(far, 8)) ^ 32768) - 32768
            numbers[row, here] = 2 * index + union
            if states > 1:
                state[here] = state[here] >> 1 ^ union * (h0 >> 1) ^ (index & 1) * (h1 >> 1)
    return numbers

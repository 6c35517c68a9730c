"""Entropy-coded trellis weights in plain NumPy: codecs ``ectcq<rate>`` and ``ectcq<rate>:t<states>``.

Needs nothing of tersor. SPEC.md describes the format; see :func:`decode`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

HEAD = r"ectcq(\d(?:\.\d{1,3})?)"
"""What the head of such a codec's text matches."""

SYMBOLS, REACH, ESCAPE = 32, 15, 31
POWERS = np.array([round(2.0 ** (31 - i / 16)) for i in range(16)], np.int64)
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
    count = milli * rows * columns // 8000
    if rows < 128:
        usual = 780 + columns + 11 * max(min(columns >> 4, 12), 1)
        count = max(count - usual * rows // 1024, 0) + usual
    return {"stream": ("U8", (count,))}


def decode(text: str, arrays: Mapping[str, Any], rows: int, columns: int) -> Any:
    """Float32 weights ``(rows, columns)``. Raises ValueError when the stream ends early."""
    _, states = _numbers(text)
    data = arrays["stream"].tobytes()
    if len(data) < 12:
        raise ValueError("the stream ends before its head does")
    scale, count, shift, row_bits, first, step_bits, level_bits, base = struct.unpack_from("<fBBBBBBh", data)
    at, fields = 12, []
    for amount, bits in ((rows, row_bits), (columns, step_bits), (columns, level_bits)):
        size = (amount * bits + 7) // 8
        if bits > 8 or len(data) < at + size:
            raise ValueError("the stream ends before its levels do")
        fields.append(_unpacked(data[at : at + size], bits, amount))
        at += size
    if len(data) < at + 11 * count or not count or shift > 15:
        raise ValueError("the stream ends before its tables do")
    table = np.array(list(struct.iter_unpack("<hhhBBBBB", data[at : at + 11 * count])), np.int64)
    step = fields[1] + first
    level = fields[2] + base - 2 * step
    kind = np.clip((fields[0][:, None] + level) >> shift, 0, count - 1)
    low = table[:, 3] & 15
    number = _numbers_of(data[at + 11 * count :], kind, _frequencies(table[:, :3], low, table[:, 3] >> 4), low, states)
    shrink = np.zeros((count, 5), np.float32)
    shrink[:, 1:] = table[:, 4:].astype(np.float32) / np.float32(256)
    column_table = np.array([2.0 ** ((i - 20) / 4) for i in range(32)], np.float32)
    inward = np.sign(number).astype(np.float32) * shrink[kind, np.minimum(abs(number), 4)]
    return np.float32(scale) * column_table[step & 31] * (number.astype(np.float32) - inward)


def _unpacked(data: bytes, bits: int, amount: int) -> Any:
    """``amount`` whole numbers of ``bits`` bits, lowest bit first."""
    flat = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: amount * bits].astype(np.int64)
    return (flat.reshape(amount, bits) << np.arange(bits)).sum(1) if bits else np.zeros(amount, np.int64)


def _numbers(text: str) -> tuple[int, int]:
    match = re.fullmatch(HEAD + r"(?::t(\d+))?", text)
    if not match:
        raise ValueError(f"{text!r} is not an entropy-coded trellis codec")
    return round(float(match[1]) * 1000), int(match[2] or 8)


def _frequencies(bits: Any, low: Any, escape: Any) -> Any:
    """Frequencies ``(contexts, 2, 32)`` that add up to 4096, from three parameters ``(contexts, 3)`` each."""
    a, b, c = (bits[:, i, None, None] for i in range(3))
    raw = low[:, None, None]
    number = abs(((2 * np.arange(-REACH, REACH + 1) + 1) << raw) - 1 + np.arange(2)[:, None])
    units = (a * number * number >> 2 * raw) + (b * number >> raw) + c * (number == 0)
    quantum = (units - units.min(2, keepdims=True)) >> 8
    power = POWERS[quantum & 15] >> np.minimum(quantum >> 4, 63)
    rare = np.where(escape > 0, 1 << np.maximum(escape - 1, 0), 0)[:, None, None]
    total = power.sum(2, keepdims=True)
    share = (2 * power * (4096 - rare) + total) // (2 * total)
    largest = share.argmax(2)[..., None]
    missing = 4096 - rare - share.sum(2, keepdims=True)
    np.put_along_axis(share, largest, np.take_along_axis(share, largest, 2) + missing, 2)
    return np.concatenate([share, np.broadcast_to(rare, (len(bits), 2, 1))], 2)


def _numbers_of(data: bytes, kinds: Any, frequency: Any, low: Any, states: int) -> Any:
    """Grid numbers int64 of contexts ``kinds (rows, columns)``, read from what follows the tables."""
    rows, columns = kinds.shape
    h0, h1 = POLYNOMIALS[states]
    lanes = min(max(1 << max(rows * columns >> 14, 1).bit_length() - 1, 1), 32)
    if len(data) < 4 * lanes:
        raise ValueError("the stream ends before its lanes begin")
    x = np.frombuffer(data[: 4 * lanes], "<u4").astype(np.int64)
    words = np.frombuffer(data[4 * lanes : len(data) // 2 * 2], "<u2").astype(np.int64)
    before = np.cumsum(frequency, -1) - frequency
    symbol_of = np.array([[np.repeat(np.arange(SYMBOLS), table) for table in pair] for pair in frequency])
    state = np.zeros(columns, np.int64)
    numbers = np.empty(kinds.shape, np.int64)
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
        for first in range(0, columns, lanes):
            here = slice(first, min(first + lanes, columns))
            table, union = kinds[row, here], state[here] & 1
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

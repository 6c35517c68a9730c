"""Decode ``coded(<codec>):<rate>`` with NumPy alone: codes out of a range coder's streams; see ``SPEC.md``.

The codes are put back into the form that the inner codec stores them in, and decoded with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Parts = dict[str, tuple[str, tuple[int, ...]]]

HEAD = "coded"
RECURSES = True
"""Its functions are also given the same functions for codecs of any family."""
_TEXT = re.compile(r"coded\(((?:int([1-8])|fp([468]):e([1-5])m\d|ternary):[^(),]+)\):(\d(?:\.\d{1,3})?)")
_SIZE = {"U8": 1, "F16": 2, "BF16": 2, "I32": 4}
SYMBOLS, REACH, ESCAPE, LANES = 32, 15, 31, 32


def parts(text: str, rows: int, columns: int, recurse: Callable[[str, int, int], Parts]) -> Parts:
    """Part name to (dtype, shape). ``recurse``: the same for any codec."""
    match = _read(text)
    whole = round(float(match[5]) * 1000) * rows * columns // 8000
    aside, least = _aside(match, rows, columns, recurse), _least(match, rows, columns)
    if rows < 128:
        share = (_bytes(_aside(match, 1024, columns, recurse)) + _least(match, 1024, columns)) * rows // 1024
        count = max(whole - share, 0) + least
    else:
        count = whole - _bytes(aside)
    if count < least:
        raise ValueError(f"codec '{text[:80]}' is too small for {rows} x {columns} weights")
    return {**aside, "stream": ("U8", (count,))}


def decode(
    text: str,
    arrays: Mapping[str, Array],
    rows: int,
    columns: int,
    recurse: Callable[[str, Mapping[str, Array], int, int], Array],
) -> Array:
    """The float32 weight ``(rows, columns)``. Raises ValueError when a stream ends early."""
    match = _read(text)
    model, stream, tile = arrays["model"].astype(np.int64), arrays["stream"].tobytes(), _tile(rows)
    kind = np.stack([arrays["class"] & 15, arrays["class"] >> 4], 1).reshape(-1)[:rows].astype(np.int64)
    if rows and kind.max() >= len(model):
        raise ValueError(f"a row is of class {kind.max()}, and there are {len(model)}")
    frequency, low = _frequencies(model[:, :SYMBOLS]), model[:, SYMBOLS]
    index = np.zeros((rows, columns), np.int64)
    for which, start in enumerate(arrays["start"].tolist()):
        here = slice(which * tile, min((which + 1) * tile, rows))
        if not 0 <= start <= len(stream):
            raise ValueError(f"tile {which} begins at byte {start} of a stream of {len(stream)}")
        index[here] = _indices(stream[start:], columns, kind[here], frequency, low).T
    inner = {name.removeprefix("c_"): array for name, array in arrays.items() if name.startswith("c_")}
    return recurse(match[1], {**inner, "codes": _stored(match, index, inner)}, rows, columns)


def _read(text: str) -> re.Match[str]:
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(f"codec '{text[:80]}' is not of the form coded(<int, fp or ternary codec>):<rate>")
    return match


def _tile(rows: int) -> int:
    return max(-(-rows // max(-(-rows // 256), 1)), 1)


def _least(match: re.Match[str], rows: int, columns: int) -> int:
    tile = _tile(rows)
    symmetric = match[2] is not None and "asym" not in match[1]
    return 4 * -(-rows // tile) * min(tile, LANES) + (rows * columns * 65 // 512 if symmetric else 0)


def _aside(match: re.Match[str], rows: int, columns: int, recurse: Callable[[str, int, int], Parts]) -> Parts:
    classes = max(min((rows if rows >= 128 else 1024) * columns >> 15, 8), 1)
    inner = recurse(match[1], rows, columns)
    return {
        **{"c_" + name: part for name, part in inner.items() if name != "codes"},
        "class": ("U8", ((rows + 1) // 2,)),
        "model": ("U8", (classes, SYMBOLS + 1)),
        "start": ("I32", (-(-rows // _tile(rows)),)),
    }


def _bytes(tensors: Parts) -> int:
    return sum(_SIZE[dtype] * int(np.prod(shape)) for dtype, shape in tensors.values())


def _frequencies(code: Array) -> Array:
    """Frequencies ``(classes, 32)`` that add up to 4096, from one byte each."""
    weight = np.where(code > 0, (16 + (code & 15)) << (code >> 4), 0)
    weight[:, REACH] += weight.sum(1) == 0
    share = np.where(weight > 0, np.maximum(weight * 4096 // weight.sum(1, keepdims=True), 1), 0)
    share[np.arange(len(share)), share.argmax(1)] += 4096 - share.sum(1)
    return share


def _indices(data: bytes, columns: int, kind: Array, frequency: Array, low: Array) -> Array:
    """Indices ``(columns, rows)`` of a tile, column after column."""
    rows = len(kind)
    lanes = min(rows, LANES)
    if len(data) < 4 * lanes:
        raise ValueError("a stream is shorter than the states of its lanes")
    x = np.frombuffer(data[: 4 * lanes], "<u4").astype(np.int64)
    words = np.frombuffer(data[4 * lanes : len(data) // 2 * 2], "<u2").astype(np.int64)
    before = np.cumsum(frequency, 1) - frequency
    symbol_of = np.stack([np.repeat(np.arange(SYMBOLS), table) for table in frequency])
    indices = np.empty((columns, rows), np.int64)
    read = 0

    def advance(who: Array, share: Array, start: Array) -> None:
        nonlocal read
        x[who] = share * (x[who] >> 12) + (x[who] & 4095) - start
        empty = who[x[who] < 65536]
        if read + len(empty) > len(words):
            raise ValueError("a stream ends before its last code")
        x[empty] = x[empty] << 16 | words[read : read + len(empty)]
        read += len(empty)

    def raw(who: Array, bits: Array) -> Array:
        value: Array = (x[who] & 4095) >> (12 - bits)
        advance(who, 1 << (12 - bits), value << (12 - bits))
        return value

    for column in range(columns):
        for first in range(0, rows, LANES):
            table = kind[first : first + LANES]
            everyone = np.arange(len(table))
            symbol = symbol_of[table, x[everyone] & 4095]
            advance(everyone, frequency[table, symbol], before[table, symbol])
            index = symbol - REACH
            more = np.flatnonzero((low[table] > 0) & (symbol != ESCAPE))
            if len(more):
                index[more] = (index[more] << low[table[more]]) + raw(more, low[table[more]])
            far = np.flatnonzero(symbol == ESCAPE)
            if len(far):
                eight = np.full(len(far), 8)
                high = raw(far, eight)
                index[far] = ((high << 8 | raw(far, eight)) ^ 32768) - 32768
            indices[column, first : first + len(table)] = index
    return indices


def _stored(match: re.Match[str], index: Array, inner: Mapping[str, Array]) -> Array:
    """Indices as the inner codec stores its codes, uint8."""
    rows, columns = index.shape
    if match[1].startswith("ternary"):
        digits = np.pad(np.clip(index + 1, 0, 2), ((0, 0), (0, -columns % 5))).reshape(rows, -(-columns // 5), 5)
        return np.asarray((digits * np.array([1, 3, 9, 27, 81])).sum(2).astype(np.uint8))
    bits = int(match[2] or match[3])
    if match[3]:
        order = _ascending(bits, int(match[4]))
        codes = order[np.clip(index + len(order) // 2, 0, len(order) - 1)]
    elif "zero" in inner:
        groups = inner["scale"].shape[1]
        each = np.unpackbits(inner["zero"], axis=1, bitorder="little")[:, : groups * bits]
        zero = (each.reshape(rows, groups, bits).astype(np.int64) << np.arange(bits)).sum(2)
        codes = np.clip(index + zero.repeat(columns // groups, 1), 0, 2**bits - 1)
    else:
        codes = np.clip(index + 2 ** (bits - 1), 0, 2**bits - 1)
    each = (codes[:, :, None] >> np.arange(bits) & 1).astype(np.uint8)
    return np.packbits(each.reshape(rows, columns * bits), axis=1, bitorder="little")


def _ascending(bits: int, exponent_bits: int) -> Array:
    """The codes of a small float in the order of their values, without those that must not occur."""
    code = np.arange(2**bits)
    mantissa_bits = bits - 1 - exponent_bits
    field = code >> mantissa_bits & 2**exponent_bits - 1
    usable = code != 2 ** (bits - 1)
    if (bits, exponent_bits) == (8, 4):
        usable &= code & 127 != 127
    if (bits, exponent_bits) == (8, 5):
        usable &= field != 31
    size = (code & 2 ** (bits - 1) - 1).astype(np.int64)  # magnitudes ascend with the bits below the sign
    ordered = np.argsort(np.where(code >> (bits - 1), -size, size)[usable], kind="stable")
    return np.asarray(code[usable][ordered])

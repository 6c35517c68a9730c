"""Decode llama.cpp's tensor types (``q4_k``, ``iq4_xs``, …) with NumPy alone; see ``SPEC.md``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

CURVED = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


@dataclass(frozen=True)
class Kind:
    """``layout``: the fields of a block in the order of their bytes; see :func:`fields`."""

    block: int
    group: int
    zero: int
    layout: str


KINDS = {
    "q8_0": Kind(32, 32, 0, "d codes.signed:32"),
    "q4_0": Kind(32, 32, 8, "d codes.4x16:16"),
    "q4_1": Kind(32, 32, 0, "d minus codes.4x16:16"),
    "q5_0": Kind(32, 32, 16, "d codes.1x1:4+4 codes.4x16:16"),
    "q5_1": Kind(32, 32, 0, "d minus codes.1x1:4+4 codes.4x16:16"),
    "iq4_nl": Kind(32, 32, 0, "d codes.4x16:16"),
    "q2_k": Kind(256, 16, 0, "both.4x16:16 codes.2x32:64 d dmin"),
    "q3_k": Kind(256, 16, 4, "codes.1x32:32+2 codes.2x32:64 step.4x8:8 step.2x4:4+4 d"),
    "q4_k": Kind(256, 32, 0, "d dmin six codes.4x32:128"),
    "q5_k": Kind(256, 32, 0, "d dmin six codes.1x32:32+4 codes.4x32:128"),
    "q6_k": Kind(256, 16, 32, "codes.4x64:128 codes.2x32:64+4 step.signed:16 d"),
    "iq4_xs": Kind(256, 32, 0, "d step.2x1:2+4 step.4x1:4 codes.4x16:128"),
    "tq1_0": Kind(256, 256, 1, "digits d"),
    "tq2_0": Kind(256, 256, 1, "codes.2x32:64 d"),
}
FIXED = {"d": 2, "dmin": 2, "minus": 2, "six": 12, "digits": 52}
HEAD = "|".join(KINDS)


def parts(text: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Part name to (dtype, shape) for a weight ``(rows, columns)``. Raises ValueError for what cannot be."""
    if text not in KINDS:
        raise ValueError(f"codec '{text[:80]}' has options, which {HEAD.replace('|', ', ')} have not")
    kind = KINDS[text]
    if columns % kind.block:
        raise ValueError(f"blocks of {kind.block} do not divide {columns} columns")
    return {"blocks": ("U8", (rows, columns // kind.block * sum(size for _, size, _, _ in fields(kind))))}


def decode(text: str, arrays: Mapping[str, Array], rows: int, columns: int) -> Array:
    """The float32 weight ``(rows, columns)``.

    >>> block = np.array([[0, 0x3C, *[0x80] * 16]], np.uint8)        # d = 1; codes 0, then codes 8
    >>> decode("q4_0", {"blocks": block}, 1, 32)[0, 15:17].tolist()
    [-8.0, 0.0]
    """
    parts(text, rows, columns)
    kind = KINDS[text]
    count = rows * columns // kind.block
    numbers = read(kind, arrays["blocks"].reshape(count, -1))
    codes = numbers["codes"]
    unit = CURVED[codes] if text.startswith("iq4") else (codes - kind.zero).astype(np.float32)
    scale = numbers["d"]
    if "step" in numbers:
        step = numbers["step"] - (32 if text in ("q3_k", "iq4_xs") else 0)
        scale = scale * step.astype(np.float32)
    weight: Array = unit.reshape(count, -1, kind.group) * scale[:, :, None]
    if "dmin" in numbers:
        least = numbers["dmin"]
        weight = weight - (least * numbers["low"].astype(np.float32) if "low" in numbers else least)[:, :, None]
    return weight.reshape(rows, columns)


def fields(kind: Kind) -> list[tuple[str, int, str, int]]:
    """Name, bytes, form and shift of each field. ``codes.2x32:64+4``: 64 bytes of 2 bits in runs of 32, times 2^4."""
    found = []
    for word in kind.layout.split():
        head, _, size = word.partition(":")
        name, _, form = head.partition(".")
        nbytes, _, shift = size.partition("+")
        found.append((name, int(nbytes) if nbytes else FIXED[name], form, int(shift or 0)))
    return found


def read(kind: Kind, blocks: Array) -> dict[str, Array]:
    """The numbers that blocks ``(n, bytes)`` hold."""
    numbers: dict[str, Array] = {}
    start = 0
    for name, nbytes, form, shift in fields(kind):
        stream = np.ascontiguousarray(blocks[:, start : start + nbytes])
        start += nbytes
        if name in ("d", "dmin"):
            numbers[name] = stream.view("<f2").astype(np.float32)
        elif name == "minus":
            numbers["dmin"] = -stream.view("<f2").astype(np.float32)
        elif name == "six":
            numbers["step"], numbers["low"] = sixes(stream.astype(np.int64))
        elif name == "digits":
            numbers["codes"] = digits(stream.astype(np.int64))
        elif form == "signed":
            numbers[name] = stream.view(np.int8).astype(np.int64)
        else:
            bits, stride = map(int, form.split("x"))
            runs = stream.reshape(len(stream), -1, 1, stride) >> np.arange(0, 8, bits, dtype=np.uint8)[:, None]
            plane = (runs & 2**bits - 1).reshape(len(stream), -1).astype(np.int64) << shift
            if name == "both":
                numbers["step"], numbers["low"] = np.split(plane, 2, 1)
            else:
                numbers[name] = numbers.get(name, 0) + plane
    return numbers


def sixes(stream: Array) -> tuple[Array, Array]:
    """Eight steps and eight lows of 6 bits in 12 bytes."""
    first, second, third = np.split(stream, 3, 1)
    step = np.concatenate([first & 63, third & 15 | first >> 6 << 4], 1)
    return step, np.concatenate([second & 63, third >> 4 | second >> 6 << 4], 1)


def digits(stream: Array) -> Array:
    """Digits to the base 3: each byte a fraction of 256, whose first digit is that of ``3 · byte / 256``."""
    found = []
    for low, high, count, width in ((0, 32, 5, 32), (32, 48, 5, 16), (48, 52, 4, 4)):
        turned = stream[:, low:high].reshape(len(stream), -1, 1, width) * 3 ** np.arange(count)[:, None] & 255
        found.append((turned * 3 >> 8).reshape(len(stream), -1))
    return np.concatenate(found, 1)

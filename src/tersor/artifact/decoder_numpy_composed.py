"""NumPy decoding of codecs made of others (``rot``, ``sum``), and of ``sparse`` and ``lowrank``; see ``SPEC.md``.

Sums are taken in a fixed order in float32, so that the result is the same bits everywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Parts = dict[str, tuple[str, tuple[int, ...]]]

HEAD = r"rot|sum|sparse\d{1,2}(\.\d{1,6})?|lowrank\d{1,5}"
RECURSES = True
"""Its functions are also given the same functions for codecs of any family."""


def split(text: str, separator: str) -> list[str]:
    """``text`` cut at separators outside parentheses."""
    pieces, depth = [""], 0
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces]


def head_of(text: str) -> tuple[str, list[str], list[str]]:
    """A codec's text as its head, the arguments in parentheses, and the options behind."""
    first, *options = split(text, ":")
    head, _, inner = first.partition("(")
    return head, split(inner[:-1], ",") if inner else [], options


def _inner(text: str) -> list[tuple[str, str]]:
    """Prefix and text of the codecs inside a ``rot`` or ``sum``."""
    head, arguments, _ = head_of(text)
    return [("r_" if head == "rot" else f"t{index}_", inner) for index, inner in enumerate(arguments)]


def parts(text: str, rows: int, columns: int, recurse: Callable[[str, int, int], Parts]) -> Parts:
    """Part name to (dtype, shape). ``recurse``: the same for any codec."""
    head, arguments, _ = head_of(text)
    if head in ("rot", "sum"):
        if len(arguments) < (1 if head == "rot" else 2):
            raise ValueError(f"codec '{text[:80]}' has too few codecs inside")
        return {
            prefix + name: part
            for prefix, inner in _inner(text)
            for name, part in recurse(inner, rows, columns).items()
        }
    if head.startswith("sparse"):
        count, low, ones_and_zeros = _sizes(head, rows, columns)
        return {
            "values": ("F16", (count,)),
            "low": ("U8", ((count * low + 7) // 8,)),
            "high": ("U8", ((ones_and_zeros + 7) // 8,)),
        }
    rank = int(head[7:])
    if arguments:
        return {
            f"{side}_{name}": part
            for side, size in (("left", rows), ("right", columns))
            for name, part in recurse(arguments[0], rank, size).items()
        }
    return {"left": ("F16", (rows, rank)), "right": ("F16", (rank, columns))}


def decode(
    text: str,
    arrays: Mapping[str, Array],
    rows: int,
    columns: int,
    recurse: Callable[[str, Mapping[str, Array], int, int], Array],
) -> Array:
    """The float32 weight ``(rows, columns)``. ``recurse``: the same for any codec."""
    head, arguments, options = head_of(text)
    if head in ("rot", "sum"):
        terms = [
            recurse(inner, {n.removeprefix(p): a for n, a in arrays.items() if n.startswith(p)}, rows, columns)
            for p, inner in _inner(text)
        ]
        if head == "rot":
            return unrotate(terms[0], int(options[0].removeprefix("seed")) if options else 0)
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total
    if head.startswith("sparse"):
        flat = np.zeros(rows * columns, np.float32)
        flat[_places(head, arrays, rows, columns)] = arrays["values"].astype(np.float32)
        return flat.reshape(rows, columns)
    left, right = _factors(head, arguments, arrays, rows, columns, recurse)
    weight = np.zeros((rows, columns), np.float32)
    for index in range(left.shape[1]):
        weight = weight + left[:, index : index + 1] * right[index]
    return weight


def _sizes(head: str, rows: int, columns: int) -> tuple[int, int, int]:
    """Of ``sparse``: kept weights, bits of the low part of a number, and bits of the part ``high``."""
    count = max(round(rows * columns * float(head[6:]) / 100), 1)
    low = max((rows * columns // count).bit_length() - 1, 1)
    return count, low, count + ((rows * columns - 1) >> low)


def _places(head: str, arrays: Mapping[str, Array], rows: int, columns: int) -> Array:
    """Of ``sparse``: the numbers of the kept weights, counted through all rows."""
    count, low, ones_and_zeros = _sizes(head, rows, columns)
    ones = np.flatnonzero(np.unpackbits(arrays["high"], bitorder="little")[:ones_and_zeros])
    if len(ones) != count:
        raise ValueError(f"expected the places of {count} kept weights, found those of {len(ones)}")
    places: Array = (ones - np.arange(count)) << low
    bits = np.unpackbits(arrays["low"], bitorder="little")[: count * low].reshape(count, low)
    for place in range(low):
        places |= bits[:, place].astype(np.int64) << place
    if places[-1] >= rows * columns or (np.diff(places) <= 0).any():
        raise ValueError(f"places of kept weights must ascend and lie below {rows * columns}")
    return places


def _factors(
    head: str,
    arguments: list[str],
    arrays: Mapping[str, Array],
    rows: int,
    columns: int,
    recurse: Callable[[str, Mapping[str, Array], int, int], Array],
) -> tuple[Array, Array]:
    """Both factors of a ``lowrank`` float32: as they are stored, or each component a row in a codec of their own."""
    if not arguments:
        return arrays["left"].astype(np.float32), arrays["right"].astype(np.float32)
    across, down = (
        recurse(arguments[0], {n.removeprefix(p): a for n, a in arrays.items() if n.startswith(p)}, int(head[7:]), size)
        for p, size in (("left_", rows), ("right_", columns))
    )
    return across.T, down


def unrotate(rows: Array, seed: int) -> Array:
    """Each row of ``(n, size)`` times the transposed rotation: cosine part, butterflies, signs."""
    count, size = rows.shape
    power = size & -size
    odd = size // power
    mixed = rows.reshape(count, odd, power)
    if odd > 1:
        table = np.array(
            [
                [
                    math.sqrt((1 if i == 0 else 2) / odd) * math.cos(math.pi * (2 * j + 1) * i / (2 * odd))
                    for j in range(odd)
                ]
                for i in range(odd)
            ],
            np.float64,
        ).astype(np.float32)
        total = table[0][None, :, None] * mixed[:, :1]
        for index in range(1, odd):
            total = total + table[index][None, :, None] * mixed[:, index : index + 1]
        mixed = total
    half = 1
    while half < power:
        pairs = mixed.reshape(count, odd, power // (2 * half), 2, half)
        first, second = pairs[:, :, :, 0], pairs[:, :, :, 1]
        mixed = np.stack([first + second, first - second], 3)
        half *= 2
    flat = mixed.reshape(count, size) * np.float32(1.0 / math.sqrt(power))
    turned: Array = flat * np.array(signs(size, seed), np.float32)
    return turned


def signs(size: int, seed: int) -> list[int]:
    """Bit 63 of splitmix64's outputs from ``seed``, as signs."""
    mask = (1 << 64) - 1
    found = []
    for index in range(1, size + 1):
        z = (seed + index * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(-1 if (z ^ (z >> 31)) >> 63 else 1)
    return found


def matches(text: str) -> bool:
    """Whether this file decodes a codec's text."""
    return re.fullmatch(HEAD, head_of(text)[0]) is not None

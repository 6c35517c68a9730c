"""NumPy decoding of ``cols``, ``weights``, ``colscale`` and ``sparse<n>of<m>``, around other codecs; ``SPEC.md``."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Parts = dict[str, tuple[str, tuple[int, ...]]]

HEAD = r"cols|weights|colscale|sparse\d{1,2}of\d{1,2}"
RECURSES = True
"""Its functions are also given the same functions for codecs of any family."""

_AMOUNT = re.compile(r"[1-9]\d{0,6}|0\.\d{1,6}")


def parts(text: str, rows: int, columns: int, recurse: Callable[[str, int, int], Parts]) -> Parts:
    """Part name to (dtype, shape). ``recurse``: the same for any codec. Raises ValueError for what cannot be."""
    own: Parts = {}
    kind = _kind(text)
    if kind == "cols":
        own["mask"] = ("U8", (1, (columns + 7) // 8))
    elif kind == "weights":
        own["mask"] = ("U8", (rows, (columns + 7) // 8))
    elif kind == "colscale":
        own["column"] = ("F16", (columns,))
    else:
        own["patterns"] = ("U8", (rows, (columns // _sizes(text)[1] * _pattern_bits(text) + 7) // 8))
    inner = {
        prefix + n: part for prefix, t, width in _inner(text, columns) for n, part in recurse(t, rows, width).items()
    }
    return {**own, **inner}


def decode(
    text: str,
    arrays: Mapping[str, Array],
    rows: int,
    columns: int,
    recurse: Callable[[str, Mapping[str, Array], int, int], Array],
) -> Array:
    """The float32 weight ``(rows, columns)``. ``recurse``: the same for any codec."""
    found = [
        recurse(inner, {n.removeprefix(p): a for n, a in arrays.items() if n.startswith(p)}, rows, width)
        for p, inner, width in _inner(text, columns)
    ]
    kind = _kind(text)
    if kind == "colscale":
        scaled: Array = found[0] * arrays["column"].astype(np.float32)
        return scaled
    weight = np.zeros((rows, columns), np.float32)
    if kind == "cols":
        chosen = np.unpackbits(arrays["mask"][0], bitorder="little")[:columns].astype(bool)
        if chosen.sum() != found[0].shape[1]:
            raise ValueError(f"expected a mask of {found[0].shape[1]} columns, found one of {chosen.sum()}")
        weight[:, chosen], weight[:, ~chosen] = found
        return weight
    if kind == "weights":
        each = np.unpackbits(arrays["mask"], axis=1, bitorder="little")[:, :columns].astype(bool)
        wrong = each.sum(1) != found[0].shape[1]
        if wrong.any():
            raise ValueError(f"expected {found[0].shape[1]} weights a row in the mask, found {each[wrong][0].sum()}")
        weight[each], weight[~each] = (values.ravel() for values in found)
        return weight
    kept, group = _sizes(text)
    subsets = np.array(list(itertools.combinations(range(group), kept)))
    groups, bits = columns // group, _pattern_bits(text)
    each = np.unpackbits(arrays["patterns"], axis=1, bitorder="little")[:, : groups * bits]
    numbers = each.reshape(rows, groups, bits).astype(np.int64) @ (1 << np.arange(bits))
    if numbers.size and numbers.max() >= len(subsets):
        raise ValueError(f"expected numbers of subsets below {len(subsets)}, found {numbers.max()}")
    places = (subsets[numbers] + group * np.arange(groups)[:, None]).reshape(rows, groups * kept)
    np.put_along_axis(weight, places, found[0], axis=1)
    return weight


def _kind(text: str) -> str:
    return re.split(r"[:(]", text, maxsplit=1)[0]


def _sizes(text: str) -> tuple[int, int]:
    """``n`` and ``m`` of ``sparse<n>of<m>``."""
    kept, group = (int(number) for number in _kind(text).removeprefix("sparse").split("of"))
    if not 1 <= kept < group <= 16:
        raise ValueError(f"codec '{text[:80]}' keeps at least 1 and fewer than all of at most 16 columns")
    return kept, group


def _pattern_bits(text: str) -> int:
    kept, group = _sizes(text)
    return (math.comb(group, kept) - 1).bit_length()


def _inner(text: str, columns: int) -> list[tuple[str, str, int]]:
    """Prefix, text and columns of the codecs inside."""
    kind = _kind(text)
    arguments, options = _arguments(text)
    if kind == "cols":
        amounts = [option for option in options if _AMOUNT.fullmatch(option)]
        if len(arguments) != 2 or len(amounts) != 1:
            raise ValueError(f"codec '{text[:80]}' is not of the form cols(<codec>,<codec>):<amount>")
        amount = float(amounts[0])
        count = max(round(columns * amount), 1) if amount < 1 else int(amount)
        if count >= columns:
            raise ValueError(f"codec '{text[:80]}' sets {count} of {columns} columns apart")
        return [("a_", arguments[0], count), ("b_", arguments[1], columns - count)]
    if kind == "weights":
        shares = [float(option) for option in options if _AMOUNT.fullmatch(option)]
        if len(arguments) != 2 or len(shares) != 1 or not 0 < shares[0] < 1:
            raise ValueError(f"codec '{text[:80]}' is not of the form weights(<codec>,<codec>):0.<share>")
        count = max(round(columns * shares[0]), 1)
        if count >= columns:
            raise ValueError(f"codec '{text[:80]}' sets {count} of {columns} weights of a row apart")
        return [("a_", arguments[0], count), ("b_", arguments[1], columns - count)]
    if kind == "colscale":
        if len(arguments) != 1:
            raise ValueError(f"codec '{text[:80]}' is not of the form colscale(<codec>)")
        return [("c_", arguments[0], columns)]
    kept, group = _sizes(text)
    if columns % group or len(arguments) > 1 or options:
        raise ValueError(f"codec '{text[:80]}' cannot be read, or its group does not divide {columns} columns")
    return [("v_", arguments[0] if arguments else "fp16", columns // group * kept)]


def _arguments(text: str) -> tuple[list[str], list[str]]:
    """What stands in the outer parentheses, cut at its commas, and the options behind them."""
    depth, pieces, behind = 0, [""], ""
    for letter in text[len(_kind(text)) :]:
        depth -= letter == ")"
        if depth == 0:
            behind += letter.replace(")", "")
        elif letter == "," and depth == 1:
            pieces.append("")
        else:
            pieces[-1] += letter
        depth += letter == "("
    return [piece.strip() for piece in pieces if piece], [o for o in behind.replace("(", "").split(":") if o]

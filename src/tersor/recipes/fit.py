"""Finding the member of a family of codecs that comes closest to a number of bits from below."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from tersor.allocators import Exact
from tersor.codecs import parse
from tersor.contracts import RatePoint, Shape
from tersor.errors import Infeasible
from tersor.recipes.recipe import NothingFits


def rate(text: str, shape: Shape) -> float | None:
    """Bits per weight of a codec, everything counted; None when it cannot take the shape."""
    codec = parse(text)
    return codec.bits(shape) / (shape[0] * shape[1]) if codec.accepts(shape) else None


def fullest(texts: Iterable[str], bits: float, shape: Shape) -> str:
    """Of some codecs, the one with most bits that are still no more than ``bits``; the first of equals.

    >>> fullest(["int3:row", "int3:g64", "int3:g32"], 3.25, (64, 128))
    'int3:g64'
    """
    best, most = None, -1.0
    listed = list(texts)
    for text in listed:
        found = rate(text, shape)
        if found is not None and most < found <= bits + 1e-9:
            best, most = text, found
    if best is None:
        smallest = ", ".join(listed[:4]) or "no codec"
        raise NothingFits(f"None of {smallest} takes a layer of {shape[0]} x {shape[1]} within {bits:.3f} bits each.")
    return best


def groups(columns: int, least: int = 16) -> list[int]:
    """Group sizes of at least ``least`` that divide a row, coarse to fine."""
    return [size for size in range(columns // 2, least - 1, -1) if columns % size == 0]


def grouped(form: str, columns: int, least: int = 16) -> list[str]:
    """A codec text at every group size, the whole row first: ``form`` has ``{}`` where the group goes.

    >>> grouped("int3:{}", 96, 32)
    ['int3:row', 'int3:g48', 'int3:g32']
    """
    return [form.format("row"), *(form.format(f"g{size}") for size in groups(columns, least))]


def integer(bits: float) -> int:
    """Whole bits of codes, the rest being for side information."""
    return max(1, min(8, int(bits)))


def largest(text: Callable[[int], str], top: int, bits: float, shape: Shape) -> str | None:
    """``text(n)`` for the largest ``n`` from 1 to ``top`` that fits, sizes rising with ``n``; None if none does."""
    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        found = rate(text(middle), shape)
        if found is not None and found <= bits + 1e-9:
            low = middle
        else:
            high = middle - 1
    return text(low) if low else None


def least_loss(
    texts: Mapping[str, Iterable[str]], bits: float, shapes: Mapping[str, Shape], loss: Callable[[str, str], float]
) -> dict[str, str]:
    """One of the ``texts`` for each layer with the least sum of losses, at most ``bits`` per weight in all."""
    curves = {}
    for name, choices in texts.items():
        sizes = {text: -(-parse(text).bits(shapes[name]) // 8) for text in choices}
        curves[name] = [RatePoint(size, loss(name, text), text) for text, size in sizes.items()]
    try:
        found = Exact().allocate(curves, int(bits * sum(rows * columns for rows, columns in shapes.values()) / 8))
    except Infeasible as error:
        raise NothingFits(str(error)) from error
    return {name: point.choice for name, point in found.items()}


def with_outliers(
    dense: Iterable[str], bits: float, shape: Shape, *, least: float = 0.0, by: str = "", again: str = ""
) -> str:
    """``sum(sparse<p>,<dense>)`` with the largest ``p`` for the first of ``dense`` that leaves room for ``least`` %.

    ``by``: how outliers are chosen, ``:magnitude`` or as the codec does. Where none leaves room for a single outlier,
    the fullest dense codec alone.
    """
    listed = list(dense)
    for text in listed:

        def both(count: int, text: str = text) -> str:
            return f"sum(sparse{count / 1000:g}{by},{text}){again}"

        enough = rate(both(max(round(1000 * least), 1)), shape)
        if enough is not None and enough <= bits + 1e-9:
            return largest(both, 50_000, bits, shape) or text
    return fullest(listed, bits, shape)


def with_low_rank(
    dense: Iterable[str], bits: float, shape: Shape, *, factors: str = "", plain: bool = False, again: str = ""
) -> str:
    """``sum(<dense>,lowrank<r>)`` with the largest rank over the first of ``dense`` that leaves room for any.

    ``factors``: the codec of the factors; float16 where it is empty.
    """
    listed = list(dense)
    suffix = (f"({factors})" if factors else "") + (":plain" if plain else "")
    for text in listed:
        found = largest(lambda rank, text=text: f"sum({text},lowrank{rank}{suffix}){again}", min(shape), bits, shape)  # type: ignore[misc]
        if found is not None:
            return found
    return fullest(listed, bits, shape)

"""Points of embeddings and heads whose stretches of rows may have different codecs (:mod:`tersor.codecs.rows`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tersor.codecs import RowStretches
from tersor.contracts import Codec, Shape

LEAST_ROWS = 4096
"""Fewer rows than this are not worth stretches: their headers would cost as much as they save."""


@dataclass(frozen=True)
class Measured:
    """One stretch of rows with the loss that each of the candidates would cost there."""

    start: int
    stop: int
    losses: Sequence[float]


def stretch_stops(rows: int) -> tuple[int, ...]:
    """Where stretches end: an eighth, a half, all. On the reference model's embedding, whose token frequencies fall
    steadily with the row, three stretches are worth 0.84 bits a weight there; five would be worth 0.91."""
    return (rows // 8, rows // 2, rows) if rows >= LEAST_ROWS else (rows,)


def combine(shape: Shape, codecs: Sequence[Codec], measured: Sequence[Measured]) -> dict[str, float]:
    """Total loss of every candidate for all rows alike, and of the best mixtures of them, by the codec's text.

    The best mixtures are those on the lower convex hull: beginning with the smallest codec everywhere, the step with
    the greatest fall in loss per byte is taken, whichever stretch it is in, until none is left.
    """
    points = {str(codec): sum(stretch.losses[index] for stretch in measured) for index, codec in enumerate(codecs)}
    if len(measured) == 1:
        return points
    hulls = []
    for stretch in measured:
        sizes = [codec.bits((stretch.stop - stretch.start, shape[1])) // 8 for codec in codecs]
        hulls.append(_hull(sizes, stretch.losses))
    at = [0] * len(hulls)
    while True:
        picks = [hull[place][2] for hull, place in zip(hulls, at, strict=True)]
        if len(set(picks)) > 1:
            mixture = RowStretches(tuple(stretch.stop for stretch in measured), tuple(codecs[pick] for pick in picks))
            points[str(mixture)] = sum(hull[place][1] for hull, place in zip(hulls, at, strict=True))
        steps = [
            ((hull[place][1] - hull[place + 1][1]) / (hull[place + 1][0] - hull[place][0]), number)
            for number, (hull, place) in enumerate(zip(hulls, at, strict=True))
            if place + 1 < len(hull)
        ]
        if not steps:
            return points
        at[max(steps)[1]] += 1


def _hull(sizes: Sequence[int], losses: Sequence[float]) -> list[tuple[int, float, int]]:
    """Lower convex hull of (bytes, loss), with the index of each point, by ascending bytes and falling loss."""
    hull: list[tuple[int, float, int]] = []
    for size, loss, index in sorted(zip(sizes, losses, range(len(sizes)), strict=True)):
        if hull and loss >= hull[-1][1]:
            continue
        while hull and size == hull[-1][0]:
            hull.pop()
        while len(hull) > 1:
            (first, high, _), (middle, low, _) = hull[-2], hull[-1]
            if (high - low) * (size - middle) > (low - loss) * (middle - first):
                break
            hull.pop()
        hull.append((size, loss, index))
    return hull

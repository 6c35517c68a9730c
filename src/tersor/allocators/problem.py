"""Curves checked, dominated points removed, and laid out as flat arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tersor.contracts import RatePoint
from tersor.errors import BadInput, Infeasible

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """One point is to be chosen for each key, at most ``budget`` bytes in all.

    Keys are sorted by name and the points of a key by bytes, so that no answer depends on the order in which curves
    or points were given. Within a key more bytes always mean strictly less distortion. The points of key ``k`` are
    ``first[k] .. first[k + 1] - 1`` in the flat arrays; ``owner`` says which key a point belongs to.
    """

    keys: tuple[str, ...]
    points: tuple[RatePoint, ...]
    nbytes: Ints
    distortion: Floats
    owner: Ints
    first: Ints
    budget: int

    def size(self, picks: Ints) -> int:
        """Bytes of a choice; ``picks``: position of each key's point in the flat arrays."""
        return int(self.nbytes[picks].sum())

    def cost(self, picks: Ints) -> float:
        """Total distortion of a choice, correctly rounded."""
        return math.fsum(self.distortion[picks])

    def answer(self, picks: Ints, order: Mapping[str, object]) -> dict[str, RatePoint]:
        """The chosen points by key, in the order of the mapping that the user gave."""
        chosen = {key: self.points[pick] for key, pick in zip(self.keys, picks, strict=True)}
        return {key: chosen[key] for key in order}


def pose(curves: Mapping[str, Sequence[RatePoint]], budget: int) -> Problem:
    """Check curves and budget and drop the points that no best choice needs.

    Raises :class:`~tersor.errors.BadInput` for an empty curve or a point whose bytes or distortion are negative or
    not finite, and :class:`~tersor.errors.Infeasible` when even the smallest points exceed the budget.
    """
    keys = tuple(sorted(curves))
    points: list[RatePoint] = []
    first = [0]
    for key in keys:
        points += frontier(key, curves[key])
        first.append(len(points))
    smallest = sum(points[start].nbytes for start in first[:-1])
    if smallest > budget:
        raise Infeasible(
            f"a budget of {budget} bytes is too small: the smallest choice for these {len(keys)} entries takes "
            f"{smallest} bytes; give at least that, or allow smaller codecs",
            smallest=smallest,
        )
    return Problem(
        keys=keys,
        points=tuple(points),
        nbytes=np.array([p.nbytes for p in points], dtype=np.int64),
        distortion=np.array([p.distortion for p in points], dtype=np.float64),
        owner=np.repeat(np.arange(len(keys)), np.diff(first)),
        first=np.array(first, dtype=np.int64),
        budget=int(budget),
    )


def frontier(key: str, curve: Sequence[RatePoint]) -> list[RatePoint]:
    """The points of one curve that are not dominated: bytes rising, distortion strictly falling.

    Of two equal points the one whose ``choice`` comes first in the alphabet stays.

    >>> curve = [RatePoint(9, 1.0, "b"), RatePoint(9, 1.0, "a"), RatePoint(5, 3.0, "c"), RatePoint(7, 4.0, "d")]
    >>> [point.choice for point in frontier("q_proj", curve)]
    ['c', 'a']
    """
    if not curve:
        raise BadInput(f"the rate-distortion curve of {key!r} has no point; give at least one codec that fits it")
    for point in curve:
        if point.nbytes < 0 or not (math.isfinite(point.distortion) and point.distortion >= 0):
            raise BadInput(
                f"the rate-distortion curve of {key!r} has a bad point for {point.choice!r}: expected bytes >= 0 and a "
                f"finite distortion >= 0, found {point.nbytes} bytes and distortion {point.distortion}"
            )
    kept: list[RatePoint] = []
    for point in sorted(curve, key=lambda p: (p.nbytes, p.distortion, p.choice)):
        if not kept or point.distortion < kept[-1].distortion:
            kept.append(point)
    return kept

"""A limit on time beside the one on bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tersor.allocators.highs import Limits, choose
from tersor.allocators.lagrangian import Lagrangian
from tersor.contracts import Allocator, RatePoint
from tersor.errors import BadInput

Picks = dict[str, int]

_STEEPEST = 1e9
"""The highest price that is tried, as a multiple of the loss a unit of time without a price."""
_CLOSE = 1.02
"""How near the price is to the least one that does, as a ratio."""
_TOLERANCE = 2e-6
"""By how much, relatively, the solver may be over a limit, and a little."""
_SEARCH = Limits(gap=1e-3, nodes=500, seconds=None)


def allocate_within(
    allocator: Allocator,
    curves: Mapping[str, Sequence[RatePoint]],
    budget: int,
    times: Mapping[str, Sequence[float]],
    most: float,
) -> dict[str, RatePoint]:
    """One point per key, at most ``budget`` bytes and ``most`` units of time in all, and little total distortion.

    ``times``: of each point of each curve, in the order of its points; none is negative. Where the answer of
    ``allocator`` keeps the limit, that is it. Otherwise every point first costs its distortion and a price for its
    time, the lowest that keeps the limit, found by bisection. As one entry may be a fifth of a model, a price can leave
    much of the time unused; an integer programme with both limits then looks for something better.

    Raises what allocators raise, and :class:`~tersor.errors.BadInput` where no price keeps the limit.
    """

    def lost(picks: Picks) -> float:
        return sum(curves[key][pick].distortion for key, pick in picks.items())

    free = _priced(allocator, curves, budget, times, 0.0)
    best = free
    if _taken(times, free) > most:
        best = _cheapest_price(curves, budget, times, most, max(lost(free), 1e-12) / _taken(times, free))
        found = _search(curves, budget, times, most, lost(best))
        if found is not None and _taken(times, found) <= most and lost(found) < lost(best):
            best = found
    return {key: curves[key][pick] for key, pick in best.items()}


def _taken(times: Mapping[str, Sequence[float]], picks: Picks) -> float:
    return sum(times[key][pick] for key, pick in picks.items())


def _priced(
    allocator: Allocator,
    curves: Mapping[str, Sequence[RatePoint]],
    budget: int,
    times: Mapping[str, Sequence[float]],
    price: float,
) -> Picks:
    """Positions of an allocator's points where a unit of time costs ``price``."""
    priced = {
        key: [
            RatePoint(point.nbytes, point.distortion + price * time, str(index))
            for index, (point, time) in enumerate(zip(points, times[key], strict=True))
        ]
        for key, points in curves.items()
    }
    return {key: int(point.choice) for key, point in allocator.allocate(priced, budget).items()}


def _cheapest_price(
    curves: Mapping[str, Sequence[RatePoint]],
    budget: int,
    times: Mapping[str, Sequence[float]],
    most: float,
    unit: float,
) -> Picks:
    """The choice at the lowest price that keeps the limit; ``unit``: a price of the right order."""

    def at(price: float) -> tuple[Picks, float]:
        picks = _priced(Lagrangian(), curves, budget, times, price)
        return picks, _taken(times, picks)

    low, high = 0.0, 1e-3 * unit
    best, taken = at(high)
    while taken > most:
        low, high = high, 4 * high
        if high > _STEEPEST * unit:
            raise BadInput(
                f"no choice of {budget} bytes is as quick as is asked for, a time of {most:.6g}: the quickest that was "
                f"found takes {taken:.6g}; allow more bytes, more time or quicker codecs"
            )
        best, taken = at(high)
    while low > 0 and high > _CLOSE * low:
        middle = (low * high) ** 0.5
        picks, taken = at(middle)
        if taken <= most:
            high, best = middle, picks
        else:
            low = middle
    return best


def _search(
    curves: Mapping[str, Sequence[RatePoint]],
    budget: int,
    times: Mapping[str, Sequence[float]],
    most: float,
    scale: float,
) -> Picks | None:
    """The integer programme with both limits, checked in whole bytes; None when nothing was found that keeps them."""
    keys = sorted(curves)
    points = [(key, index) for key in keys for index in range(len(curves[key]))]
    owner = np.repeat(np.arange(len(keys)), [len(curves[key]) for key in keys])
    nbytes = np.array([curves[key][index].nbytes for key, index in points], dtype=np.float64)
    time = np.array([times[key][index] for key, index in points], dtype=np.float64)
    cost = np.array([curves[key][index].distortion for key, index in points]) / max(scale, 1e-300)
    extra = np.stack([nbytes / budget, time / most])
    for room in (1.0, 1 - _TOLERANCE, 1 - 4 * _TOLERANCE):
        chosen = choose(owner, extra, cost, room=[room, room], limits=_SEARCH)
        if chosen is None:
            return None
        if int(nbytes[chosen].sum()) <= budget and float(time[chosen].sum()) <= most:
            return dict(points[position] for position in chosen)
    return None

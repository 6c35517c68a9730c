"""The allocation problem with fractions allowed: one price per byte for the whole model.

Once a layer may mix two neighbouring points of the lower convex hull of its curve, the best allocation is found by
taking hull segments in the order of distortion saved per byte until the budget is used up (Shoham and Gersho, 1988,
"Efficient bit allocation for an arbitrary set of quantizers"). At most one segment is taken in part. Without that part
it is a feasible choice; with it, a bound that no choice can beat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tersor.allocators.problem import Floats, Ints, Problem, pose
from tersor.contracts import RatePoint


@dataclass(frozen=True)
class Relaxation:
    """``price``: distortion saved by one more byte. ``bound``: no choice within the budget has less distortion.

    ``picks``: the feasible choice described above. ``excess``: for every point, how much a choice is at least above
    ``bound`` if it contains that point (its reduced cost); zero on the hull at the current price.
    """

    price: float
    bound: float
    picks: Ints
    excess: Floats


def relax(problem: Problem) -> Relaxation:
    """Solve the problem with fractions allowed.

    The price is found by bisection over the slopes of the hull segments, which are the only prices at which anything
    changes; segments that have the very price of the last one are taken in the order of keys while they fit.
    """
    lower, upper = _hull_segments(problem)
    extra = problem.nbytes[upper] - problem.nbytes[lower]
    slope = (problem.distortion[lower] - problem.distortion[upper]) / extra
    left = problem.budget - problem.size(problem.first[:-1])
    prices = np.unique(slope)
    low, high = 0, len(prices)
    while low < high:  # the smallest price at which everything worth more than it, or as much, fits
        middle = (low + high) // 2
        if int(extra[slope >= prices[middle]].sum()) <= left:
            high = middle
        else:
            low = middle + 1
    price = float(prices[low - 1]) if low > 0 else 0.0

    picks = problem.first[:-1].copy()
    taken = np.nonzero(slope > price)[0] if low > 0 else np.arange(len(slope))
    np.maximum.at(picks, problem.owner[upper[taken]], upper[taken])
    left -= int(extra[taken].sum())
    for segment in np.nonzero(slope == price)[0] if low > 0 else ():
        key = problem.owner[upper[segment]]
        if extra[segment] <= left and picks[key] == lower[segment]:
            picks[key] = upper[segment]
            left -= int(extra[segment])

    priced = problem.distortion + price * problem.nbytes
    least = np.minimum.reduceat(priced, problem.first[:-1]) if len(problem.keys) else priced
    bound = max(0.0, math.fsum([*least, -price * problem.budget]))
    return Relaxation(price=price, bound=bound, picks=picks, excess=priced - least[problem.owner])


def lower_bound(curves: Mapping[str, Sequence[RatePoint]], budget: int) -> float:
    """A total distortion that no choice of at most ``budget`` bytes can go below.

    Raises as :meth:`tersor.allocators.Lagrangian.allocate` does.
    """
    return relax(pose(curves, budget)).bound


def _hull_segments(problem: Problem) -> tuple[Ints, Ints]:
    """Ends of the segments of all keys' lower convex hulls, as positions in the flat arrays."""
    lower: list[int] = []
    upper: list[int] = []
    nbytes, distortion = problem.nbytes.tolist(), problem.distortion.tolist()
    for start, stop in zip(problem.first[:-1].tolist(), problem.first[1:].tolist(), strict=True):
        hull: list[int] = []
        for point in range(start, stop):
            while len(hull) > 1 and _is_above(nbytes, distortion, hull[-2], hull[-1], point):
                hull.pop()
            hull.append(point)
        lower += hull[:-1]
        upper += hull[1:]
    return np.array(lower, dtype=np.int64), np.array(upper, dtype=np.int64)


def _is_above(nbytes: list[int], distortion: list[float], a: int, b: int, c: int) -> bool:
    """Whether ``b`` is on or above the straight line from ``a`` to ``c``."""
    before = (distortion[a] - distortion[b]) / (nbytes[b] - nbytes[a])
    after = (distortion[b] - distortion[c]) / (nbytes[c] - nbytes[b])
    return before <= after

"""Fast allocation: one price per byte, then the bytes that are left over are spent by local search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tersor.allocators.problem import Ints, Problem, pose
from tersor.allocators.relaxation import Relaxation, relax
from tersor.contracts import Allocator, RatePoint

_ROUNDS = 1000
"""Exchanges tried at most; far fewer are ever found, this only bounds the time."""


@dataclass(frozen=True)
class Lagrangian(Allocator):
    """The choice at the best price per byte, improved until no change of one or two entries helps.

    How good: the total distortion exceeds the best possible by less than one step of one entry (the cheapest hull
    segment that no longer fits). With many entries that is little; :class:`~tersor.allocators.Exact` closes the rest.
    How tight: no single entry can move to a better point within the bytes left over.

    The answer does not depend on the order of the curves or of their points. Takes well under a second for hundreds
    of entries with dozens of points each.
    """

    def allocate(self, curves: Mapping[str, Sequence[RatePoint]], budget: int) -> dict[str, RatePoint]:
        """One point per key, at most ``budget`` bytes in all.

        Raises :class:`~tersor.errors.Infeasible` (with the least possible budget) and
        :class:`~tersor.errors.BadInput` (naming the key) for an empty curve or a point that is not finite.
        """
        problem = pose(curves, budget)
        return problem.answer(improve(problem, relax(problem)), curves)


def improve(problem: Problem, relaxation: Relaxation) -> Ints:
    """The relaxation's choice after filling and exchanging; never worse, never over budget."""
    picks = fill(problem, relaxation.picks)
    within_reach = _useful(problem, relaxation, picks)
    for _ in range(_ROUNDS):
        exchanged = _exchange(problem, picks, within_reach)
        if exchanged is None:
            break
        picks = fill(problem, exchanged)
    return picks


def fill(problem: Problem, picks: Ints) -> Ints:
    """Spend the bytes left over: again and again the step up that fits and saves most distortion per byte."""
    picks = picks.copy()
    left = problem.budget - problem.size(picks)
    while True:
        extra = problem.nbytes - problem.nbytes[picks][problem.owner]
        fits = np.nonzero((extra > 0) & (extra <= left))[0]
        if not len(fits):
            return picks
        saved = (problem.distortion[picks][problem.owner] - problem.distortion)[fits]
        best = fits[np.argmax(saved / extra[fits])]
        picks[problem.owner[best]] = best
        left -= int(extra[best])


def core(problem: Problem, relaxation: Relaxation, best: float) -> Ints:
    """The points that a choice with less distortion than ``best`` can contain; all others are out of the question."""
    room = (best - relaxation.bound) * (1 + 1e-9) + 1e-12 * best
    return np.nonzero((relaxation.excess <= room) & (problem.distortion <= best))[0]


def _useful(problem: Problem, relaxation: Relaxation, picks: Ints) -> Ints:
    points = core(problem, relaxation, problem.cost(picks))
    others: Ints = points[points != picks[problem.owner[points]]]
    return others


def _exchange(problem: Problem, picks: Ints, points: Ints) -> Ints | None:
    """The best pair of one step up and one step down of another key that fits and lowers the total; None if none does.

    Steps up are met in the order of the bytes they lack, most first, while the two cheapest steps down (of different
    keys) that free as much are kept at hand.
    """
    owner = problem.owner[points]
    extra = problem.nbytes[points] - problem.nbytes[picks[owner]]
    saved = problem.distortion[picks[owner]] - problem.distortion[points]
    left = problem.budget - problem.size(picks)
    steps = list(zip(extra.tolist(), saved.tolist(), owner.tolist(), points.tolist(), strict=True))
    ups = sorted((step for step in steps if step[0] > left), reverse=True)
    downs = sorted(step for step in steps if step[0] < 0)  # the one that frees most comes first

    best, found = 1e-12 * problem.cost(picks), None
    cheapest: list[tuple[float, int, int]] = []
    position = 0
    for lacking, gain, key, up in ups:
        while position < len(downs) and -downs[position][0] >= lacking - left:
            _, loss, down_key, down = downs[position]
            cheapest = _two_cheapest([*cheapest, (-loss, down_key, down)])
            position += 1
        for loss, down_key, down in cheapest:
            if down_key != key:
                if gain - loss > best:
                    best, found = gain - loss, (key, up, down_key, down)
                break
    if found is None:
        return None
    exchanged: Ints = picks.copy()
    exchanged[[found[0], found[2]]] = found[1], found[3]
    return exchanged


def _two_cheapest(steps: list[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    """The cheapest step, and the cheapest of any other key."""
    steps = sorted(steps)
    others = [step for step in steps if step[1] != steps[0][1]]
    return [steps[0], *others[:1]]

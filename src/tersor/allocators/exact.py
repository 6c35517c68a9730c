"""Allocation as an integer programme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tersor.allocators.highs import Limits, choose
from tersor.allocators.lagrangian import core, fill, improve
from tersor.allocators.problem import Ints, Problem, pose
from tersor.allocators.relaxation import relax
from tersor.contracts import Allocator, RatePoint
from tersor.errors import BadInput


@dataclass(frozen=True)
class Exact(Allocator):
    """The best choice within the budget, to a relative ``gap`` of its total distortion.

    First comes the answer of :class:`~tersor.allocators.Lagrangian` and the bound that the relaxation gives. Where the
    two are closer than ``gap``, that is the answer. Otherwise whatever point would lift the total above it is out
    (usually all but a few), and HiGHS solves the integer programme over the rest.

    ``gap``: how far the answer may be above the best possible, relative to it. ``nodes``: how many nodes the search
    may visit; the same curves give the same choice with it, whatever the machine. ``time_limit``: seconds, None for no
    limit; with one, the speed of the machine may matter. Where a limit ends the search, the best choice known by then
    is returned, at worst that of ``Lagrangian``, and the gap is whatever it is; few plans come near the default limit.
    """

    gap: float = 1e-4
    nodes: int = 1000
    time_limit: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.gap < 1:
            raise BadInput(f"gap must be at least 0 and below 1, found {self.gap}; 1e-4 is usual")
        if self.nodes < 1:
            raise BadInput(f"nodes must be at least 1, found {self.nodes}; 1000 is usual")
        if self.time_limit is not None and not self.time_limit > 0:
            raise BadInput(f"time_limit must be above 0 seconds, found {self.time_limit}; None means no limit")

    def allocate(self, curves: Mapping[str, Sequence[RatePoint]], budget: int) -> dict[str, RatePoint]:
        """One point per key, at most ``budget`` bytes in all, least total distortion.

        Raises :class:`~tersor.errors.Infeasible` (with the least possible budget) and
        :class:`~tersor.errors.BadInput` (naming the key) for an empty curve or a point that is not finite.
        """
        problem = pose(curves, budget)
        relaxation = relax(problem)
        picks = improve(problem, relaxation)
        best = problem.cost(picks)
        if best - relaxation.bound > self.gap * best:
            found = self._search(problem, picks, core(problem, relaxation, best))
            if found is not None and problem.cost(found) < best:
                picks = found
        return problem.answer(picks, curves)

    def _search(self, problem: Problem, picks: Ints, points: Ints) -> Ints | None:
        """The best choice among ``points``, or None when the solver found none.

        The solver works with tolerances, so its answer is checked in whole bytes; should it be over, the search is
        repeated with that much less to spend.
        """
        owner = problem.owner[points]
        base = np.full(len(problem.keys), np.iinfo(np.int64).max)
        np.minimum.at(base, owner, problem.nbytes[points])
        extra = problem.nbytes[points] - base[owner]
        unit = max(1, math.gcd(*extra.tolist()))
        room = problem.budget - int(base.sum())
        cost = problem.distortion[points] / problem.cost(picks)
        limits = Limits(gap=self.gap, nodes=self.nodes, seconds=self.time_limit)
        for _ in range(3):
            chosen = choose(owner, (extra // unit)[None].astype(float), cost, room=[room // unit], limits=limits)
            if chosen is None:
                return None
            found = picks.copy()
            found[owner[chosen]] = points[chosen]
            over = problem.size(found) - problem.budget
            if over <= 0:
                return fill(problem, found)
            room -= over
        return None

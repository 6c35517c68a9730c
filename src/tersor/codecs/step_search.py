"""The step at which entropy-coded numbers just fit their bytes."""

from __future__ import annotations

WASTE = 0.0015
"""The share of the bytes that may stay empty without another attempt."""


_NEAR = 0.01
"""Octaves between two steps that are all but equal: they should differ by a hundredth of a bit."""


class StepSearch:
    """The step for a rate: secants in log2 of the step, kept between the nearest steps known to be too small or large.

    The rate falls by at most about one bit an octave.
    """

    def __init__(self, start: float, wanted: float) -> None:
        self.at = start
        self.wanted = wanted * (1 - WASTE / 2)
        self.slope = -1.0
        self.below: tuple[float, float] | None = None
        self.above: tuple[float, float] | None = None

    def learn(self, rate: float) -> bool:
        """Move on after ``rate`` was found; True when that was near enough."""
        here = self.at
        if rate > self.wanted:
            self.below, other = (here, rate), self.below
        else:
            self.above, other = (here, rate), self.above
        pair = (self.below, self.above) if self.below and self.above else (other, (here, rate))
        if pair[0] and pair[1] and abs(pair[0][0] - pair[1][0]) > 1e-5:
            slope = (pair[1][1] - pair[0][1]) / (pair[1][0] - pair[0][0])
            self.slope = min(max(slope, -2.5), -0.2)
        self.at = here + min(max((self.wanted - rate) / self.slope, -3.0), 3.0)
        if self.below and self.above and self.below[0] < self.above[0]:
            low, high = self.below[0], self.above[0]
            self.at = min(max(self.at, low + 0.1 * (high - low)), high - 0.1 * (high - low))
        return abs(rate - self.wanted) < 0.004 * self.wanted

    @property
    def stuck(self) -> bool:
        """Whether the rate jumps over the wanted one between two steps that are all but equal."""
        if self.below is None or self.above is None:
            return False
        near = abs(self.above[0] - self.below[0]) < _NEAR
        return near and self.below[1] - self.above[1] > 0.01 * self.wanted

    def forget(self) -> None:
        """Keep the slope, not the points: they were another layer's."""
        self.below = self.above = None

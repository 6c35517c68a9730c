"""Scales of llama.cpp's blocks before any rounding of weights: searched for, stored in two levels, and searched again.

First each group gets the real scale (and minimum) with the least weighted error, by a search over clip ranges with
least squares for the codes that each gives. Then ``d`` is the one under whose multiples these lie best, and last the
small integers and ``d`` are moved in turn, codes rounded anew each time, as long as the error falls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from tersor.codecs.gguf_layout import Kind

_LEAST, _MOST = 2.0**-24, 65504.0
_CHUNK = 1 << 17
"""Weights that are fitted at one time, so that what is read again stays near the processor."""
_TRIES = 20
"""Sizes of ``d`` that are tried, of either sign where the integers have both."""
_ROUNDS = 2
"""Turns of integers and ``d``."""
_CLIPS = {2: 0.55, 4: 0.35, 8: 0.55, 16: 0.70, 32: 0.84, 64: 0.90, 255: 0.97}
"""The smallest share of a group's range that is tried, by the greatest number of levels that it is for."""


def to_half(number: Tensor) -> Tensor:
    """The nearest numbers that float16 holds, as float32; infinities become the greatest ones."""
    return number.clamp(-_MOST, _MOST).to(torch.float16).to(torch.float32)


def to_scale(number: Tensor) -> Tensor:
    """:func:`to_half`, but never 0: scales are divided by."""
    sign = torch.where(number < 0, -1.0, 1.0)
    return sign * to_half(number.abs().nan_to_num(0.0).clamp(min=_LEAST))


@dataclass(frozen=True)
class Fitted:
    """For ``n`` blocks: ``d``, ``dmin (n, 1)``, ``step``, ``low (n, groups)``; 1 and 0 where a type has none."""

    d: Tensor
    dmin: Tensor
    step: Tensor
    low: Tensor

    @property
    def scale(self) -> Tensor:
        return self.d * self.step

    @property
    def offset(self) -> Tensor:
        return self.dmin * self.low

    def where(self, better: Tensor, other: Fitted) -> Fitted:
        """This one for the blocks ``better (n,)``, ``other`` for the rest."""
        pairs = ((self.d, other.d), (self.dmin, other.dmin), (self.step, other.step), (self.low, other.low))
        return Fitted(*(torch.where(better[:, None], one, two) for one, two in pairs))


def fit(
    kind: Kind,
    weight: Tensor,
    importance: Tensor,
    nearest: Callable[[Tensor, Tensor], Tensor],
    ratios: Sequence[float] = (),
) -> Fitted:
    """Scales of blocks ``weight (n, groups, group)``; ``importance``: the same or ``(1, 1, 1)``, above 0.

    ``nearest``: grid points for weights in units of the scale, and importance. ``ratios``: scales to begin with,
    relative to a group's root mean square; else its range says.
    """
    step = max(_CHUNK // kind.block, 1)
    pieces = []
    for start in range(0, max(len(weight), 1), step):
        here = slice(start, start + step)
        share = importance if len(importance) == 1 else importance[here]
        pieces.append(_Search(kind, weight[here], share, nearest, ratios).run())
    names = ("d", "dmin", "step", "low")
    return Fitted(*(torch.cat([getattr(piece, name) for piece in pieces]) for name in names))


class _Search:
    """The search for a few blocks ``weight (n, groups, group)``."""

    def __init__(
        self,
        kind: Kind,
        weight: Tensor,
        importance: Tensor,
        nearest: Callable[[Tensor, Tensor], Tensor],
        ratios: Sequence[float],
    ) -> None:
        self.kind, self.x, self.h, self.nearest, self.ratios = kind, weight, importance, nearest, ratios
        self.hx = importance * weight
        self.mass = importance.expand_as(weight).sum(2)
        self.pull = self.hx.sum(2)
        self.energy = (self.hx * weight).sum(2)

    def run(self) -> Fitted:
        scale, offset = self.free()
        if self.kind.steps is None:
            ones = torch.ones_like(scale)
            return Fitted(to_scale(scale), to_half(offset), ones, ones if self.kind.offset else ones * 0)
        found = self.stored(scale, offset)
        loss = self.loss(found).sum(1)
        for _ in range(1 if self.ratios else _ROUNDS):
            tried = self.supers(self.integers(found))
            now = self.loss(tried).sum(1)
            found, loss = tried.where(now < loss, found), torch.minimum(now, loss)
        return found if self.ratios else self.integers(found)

    def unit(self, scale: Tensor, offset: Tensor) -> Tensor:
        """The nearest grid points, before scaling, under ``scale`` and ``offset (n, groups)``."""
        moved = self.x + offset[:, :, None] if self.kind.offset else self.x
        return self.nearest(moved / scale[:, :, None], self.h)

    def loss(self, fitted: Fitted) -> Tensor:
        """Weighted squared error of each group ``(n, groups)``, codes rounded to nearest."""
        scale, offset = fitted.scale[:, :, None], fitted.offset[:, :, None]
        error = self.x - (self.unit(fitted.scale, fitted.offset) * scale - offset)
        return (self.h * error * error).sum(2)

    def solve(self, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Least squares for fixed grid points: scale, offset and the squared error, each ``(n, groups)``."""
        weighted = self.h * unit
        square, cross = (weighted * unit).sum(2), (self.hx * unit).sum(2)
        plain = cross / square.clamp(min=1e-38)
        zero = torch.zeros_like(plain)
        if not self.kind.offset:
            return plain, zero, self.energy - plain * cross
        first = weighted.sum(2)
        inner = square - first * first / self.mass
        scale = (cross - first * self.pull / self.mass) / inner.clamp(min=1e-38)
        offset = (scale * first - self.pull) / self.mass
        usable = (inner > 1e-6 * square) & ((offset >= 0) | (self.kind.lows is None))
        scale, offset = torch.where(usable, scale, plain), torch.where(usable, offset, zero)
        loss = self.energy - scale * cross + offset * self.pull
        return scale, offset, loss

    def free(self) -> tuple[Tensor, Tensor]:
        """The best real scale and offset of each group."""
        scale = torch.zeros(self.x.shape[:2])
        offset, best = torch.zeros_like(scale), self.energy.clone()
        for tried, shift in self.ranges():
            scale, offset, best = self.improve(tried, shift, scale, offset, best)
        for _ in range(2):
            scale, offset, best = self.improve(torch.where(scale == 0, 1.0, scale), offset, scale, offset, best)
        # A group of zeros, or one without a better scale than 0, takes part in no choice of d.
        return scale, offset

    def improve(
        self, tried: Tensor, shift: Tensor, scale: Tensor, offset: Tensor, best: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The better of what was found and of least squares on the codes under ``tried`` and ``shift``."""
        new, other, loss = self.solve(self.unit(tried, shift))
        better = (loss < best) & ((new > 0) | (self.kind.lows is None))
        return torch.where(better, new, scale), torch.where(better, other, offset), torch.where(better, loss, best)

    def ranges(self) -> list[tuple[Tensor, Tensor]]:
        """Scales and offsets to begin with: the groups' own ranges, clipped more and less."""
        kind = self.kind
        if self.ratios:
            root = self.x.square().mean(2).sqrt().clamp(min=1e-30)
            return [(root * ratio, torch.zeros_like(root)) for ratio in self.ratios]
        clip = next(share for levels, share in _CLIPS.items() if kind.levels <= levels)
        top = kind.levels - 1
        if kind.offset:
            low, high = self.x.amin(2), self.x.amax(2)
            if kind.lows is not None:
                low, high = low.clamp(max=0), high.clamp(min=0)
            shares = [clip + (1 - clip) * i / 6 for i in range(7)]
            pairs = [pair for pair in product(shares, shares) if top < 4 or abs(pair[0] - pair[1]) < 0.55 * (1 - clip)]
            return [(((high * b - low * a) / top).clamp(min=1e-30), -low * a) for a, b in pairs]
        high = self.x.abs().amax(2).clamp(min=1e-30)
        reach = -kind.table[0] if kind.table else kind.zero
        count = 15 if kind.levels <= 32 else 6
        zero = torch.zeros_like(high)
        signs = (1.0,) if kind.levels == 2 * kind.zero + 1 else (1.0, -1.0)
        return [
            (high * (sign * (clip + (1.08 - clip) * i / (count - 1)) / reach), zero)
            for i in range(count)
            for sign in signs
        ]

    def stored(self, scale: Tensor, offset: Tensor) -> Fitted:
        """``d`` and ``dmin`` whose multiples lie nearest to given scales and offsets, by their weight in the error."""
        kind = self.kind
        safe = torch.where(scale == 0, 1.0, scale)
        unit = self.unit(safe, offset)
        bend = (self.h * unit * unit).sum(2)
        d, step = _multiples(scale, bend, kind.ends, kind.nearest_step)
        if kind.lows is None:
            return Fitted(d, torch.zeros_like(d), step, torch.zeros_like(step))
        # With the scale as it is stored, the best offset is another one.
        moved = ((d * step * (self.h * unit).sum(2) - self.pull) / self.mass).clamp(min=0)
        dmin, low = _multiples(torch.where(scale == 0, offset, moved), self.mass, kind.lows, None)
        return Fitted(d, dmin, step, low)

    def integers(self, found: Fitted) -> Fitted:
        """Steps and lows of each group moved by one where that lowers its error."""
        kind = self.kind
        best = self.loss(found)
        step, low = found.step, found.low
        for by, lower in product((0, -1, 1), (0, -1, 1) if kind.lows else (0,)):
            if by == lower == 0:
                continue
            tried = kind.nearest_step(found.step + by * kind.factor)
            tried = torch.where(tried == 0, found.step, tried)
            other = (found.low + lower).clamp(*(kind.lows or (0, 0)))
            loss = self.loss(Fitted(found.d, found.dmin, tried, other))
            better = loss < best
            best = torch.where(better, loss, best)
            step, low = torch.where(better, tried, step), torch.where(better, other, low)
        return Fitted(found.d, found.dmin, step, low)

    def supers(self, found: Fitted) -> Fitted:
        """``d`` and ``dmin`` by least squares over the block, all else as it is."""
        unit = self.unit(found.scale, found.offset) * found.step[:, :, None]
        weighted = self.h * unit
        square, cross = (weighted * unit).sum((1, 2)), (self.hx * unit).sum((1, 2))
        d, dmin = cross / square.clamp(min=1e-38), found.dmin[:, 0]
        if self.kind.lows is not None:
            first, mass = (weighted.sum(2) * found.low).sum(1), (self.mass * found.low.square()).sum(1)
            pull = (self.pull * found.low).sum(1)
            inner = square - first * first / mass.clamp(min=1e-38)
            both = (inner > 1e-6 * square) & (mass > 0)
            d = torch.where(both, (cross - first * pull / mass.clamp(min=1e-38)) / inner.clamp(min=1e-38), d)
            d = to_scale(d)
            dmin = torch.where(mass > 0, (d * first - pull) / mass.clamp(min=1e-38), dmin).clamp(min=0)
        return Fitted(to_scale(d)[:, None], to_half(dmin)[:, None], found.step, found.low)


def _multiples(
    wanted: Tensor, bend: Tensor, ends: tuple[float, float], nearest: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """``d (n, 1)`` and multipliers with the least ``Σ bend (wanted − d · multiplier)²`` of some.

    Multipliers are what ``nearest`` gives, but never 0; without it integers from ``ends``, 0 and a ``d`` of 0 included.
    """
    at = wanted.abs().argmax(1, keepdim=True)
    peak = wanted.gather(1, at)
    best = torch.full_like(peak, torch.inf)
    found, whole = to_scale(peak / ends[1]), torch.ones_like(wanted)
    for top in (
        end * (1.12 - 0.4 * i / (_TRIES - 1)) for end in {ends[1], min(ends[0], 0)} - {0} for i in range(_TRIES)
    ):
        if nearest is None:
            d = to_half(peak / top)
            number = torch.where(d == 0, 0.0, wanted / torch.where(d == 0, 1.0, d)).round_().clamp_(*ends)
        else:
            d = to_scale(peak / top)
            number = nearest(wanted / d)
            sign = torch.where((wanted * d < 0) & (ends[0] < 0), -1.0, 1.0)
            number = torch.where(number == 0, sign, number)
        loss = (bend * (wanted - d * number).square()).sum(1, keepdim=True)
        better = loss < best
        best = torch.where(better, loss, best)
        found, whole = torch.where(better, d, found), torch.where(better, number, whole)
    return found, whole

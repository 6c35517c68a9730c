"""What an entropy coder needs to know of a layer: how often each symbol of each context comes up.

Numbers of one context are nearly Gaussian, so their frequencies need three parameters and not 62: the bits of number
``n`` are ``a n² + b n + c [n = 0]`` and a constant. Frequencies follow from these by whole-number arithmetic alone, so
that every decoder finds the same table. What is rarer than that has a code of its own, the escape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.kernels.reference_rans import ESCAPE, REACH, SYMBOLS, TOTAL, TOTAL_BITS

SHRINKS = 4
"""Sizes of grid numbers that have a shrinkage of their own: 1, 2, 3, and all above."""
POWERS = tuple(round(2.0 ** (31 - i / 16)) for i in range(16))
"""``2^(31 - i/16)``, rounded."""
UNIT = 4096.0
"""Units of the parameters in one bit."""
MOST_LOW = 10
_ESCAPED = 16
_ITERATIONS = 25
_IMAGINED = 4.0
"""Numbers of a Gaussian that are counted besides those that came up, so that a context with none has a table too."""


@dataclass(frozen=True, eq=False)
class Tables:
    """``bits (n, 3)``: ``a, b, c`` of each context. ``low (n,)``: raw bits. ``escape (n,)``: 0, or 1 + log2 of the
    escape's frequency. All int64.
    """

    bits: Tensor
    low: Tensor
    escape: Tensor

    def frequencies(self) -> Tensor:
        """``(n, 2, 32)`` int64 that add up to 4096. Symbols that are too rare for it have 0."""
        quantum = self._units() >> 8
        power = torch.tensor(POWERS, device=quantum.device)[quantum & 15] >> (quantum >> 4).clamp(max=63)
        rare = torch.where(self.escape > 0, 1 << (self.escape - 1).clamp(min=0), 0)[:, None, None]
        total = power.sum(2, keepdim=True)
        share = (2 * power * (TOTAL - rare) + total) // (2 * total)
        largest = share.argmax(2, keepdim=True)
        share = share.scatter_add(2, largest, TOTAL - rare - share.sum(2, keepdim=True))
        return torch.cat([share, rare.expand(-1, 2, 1)], 2)

    def prices(self) -> Tensor:
        """Bits of every symbol, raw bits included, ``(n, 2, 32)`` float32; rare ones are priced as escapes."""
        units = self._units().double() / UNIT
        bits = units + torch.log2(torch.exp2(-units).sum(2, keepdim=True)) + self.low[:, None, None]
        most = (TOTAL_BITS - (self.escape - 1).double() + _ESCAPED)[:, None, None]
        # A symbol that is too rare for a frequency gets one when it is used more: its price is not the escape's.
        return torch.cat([torch.minimum(bits, most), most.expand(-1, 2, 1)], 2).float()

    def costs(self, counts: Tensor) -> Tensor:
        """Bits that symbols of these counts ``(n, 2, 32)`` take, ``(n,)`` float64; infinite where one has no code."""
        share = self.frequencies()
        listed = share[:, :, :ESCAPE] > 0
        rare = torch.where(listed, 0, counts[:, :, :ESCAPE]).sum((1, 2)) + counts[:, :, ESCAPE].sum(1)
        own = (TOTAL_BITS - torch.log2(share[:, :, :ESCAPE].clamp(min=1).double())) + self.low[:, None, None]
        each = TOTAL_BITS - (self.escape - 1).double() + _ESCAPED
        none = torch.where(self.escape > 0, 0.0, torch.inf)
        return (torch.where(listed, counts[:, :, :ESCAPE], 0) * own).sum((1, 2)) + torch.where(
            rare > 0, rare * each + none, 0.0
        )

    def _units(self) -> Tensor:
        """What each of the 31 symbols takes beyond the cheapest, ``(n, 2, 31)`` int64, in 4096ths of a bit."""
        number = _numbers(self.low)
        low = self.low[:, None, None]
        a, b, c = (self.bits[:, i, None, None] for i in range(3))
        units = (a * number * number >> 2 * low) + (b * number >> low) + c * (number == 0)
        return units - units.amin(2, keepdim=True)


def _numbers(low: Tensor) -> Tensor:
    """The size of the number in the middle of each symbol's, ``(n, 2, 31)`` int64."""
    top = torch.arange(-REACH, REACH + 1, device=low.device)
    union = torch.arange(2, device=low.device)[:, None]
    return ((2 * top + 1 << low[:, None, None]) - 1 + union).abs()


def count(codes: Tensor, contexts: Tensor, low: Tensor) -> Tensor:
    """How often each symbol comes up, ``(n, 2, 32)`` int64, in grid numbers of contexts, both ``(rows, columns)``."""
    found = torch.zeros(len(low) * 2 * SYMBOLS, dtype=torch.int64)
    for some, kinds in zip(torch.split(codes, 256), torch.split(contexts, 256), strict=True):
        kind, number = kinds.long(), some.long()
        top = (number >> 1) >> low[kind]
        symbol = torch.where(top.abs() > REACH, ESCAPE, top + REACH)
        place = (kind * 2 + (number & 1)) * SYMBOLS + symbol
        found += torch.bincount(place.flatten(), minlength=len(found))
    return found.reshape(len(low), 2, SYMBOLS)


def gaussian(spread: Tensor) -> Tables:
    """Tables for Gaussians of ``spread (n,)`` grid numbers: where it starts."""
    low = torch.ceil(torch.log2((1.9 * spread / REACH).clamp(min=1e-9))).clamp(0, MOST_LOW).long()
    a = 0.5 * 1.442695 * (2.0**low / spread.clamp(min=0.3)).square() * UNIT
    bits = torch.stack([torch.round(a).clamp(max=32767).long(), torch.zeros_like(low), torch.zeros_like(low)], 1)
    return Tables(bits, low, torch.ones_like(low))


def fit(counts: Tensor, low: Tensor) -> Tables:
    """The tables under which numbers of these ``counts (n, 2, 32)`` take least, by Newton's method, and their escapes.

    The logarithm of what they take is convex in the three parameters (an exponential family).
    """
    number = _numbers(low).double()
    weight = counts[:, :, :ESCAPE].double()
    amount = weight.sum((1, 2)).clamp(min=1)
    spread = ((weight * number.square()).sum((1, 2)) / amount).sqrt().clamp(min=0.25)[:, None, None]
    size = number / spread
    features = torch.stack([size.square(), size, (number == 0).double()], 3)
    normal = torch.softmax(-0.5 * size.square(), 2)
    weight = weight + _IMAGINED * normal
    found = torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64).expand(len(low), 3).clone()
    total, seen = weight.sum(2), (weight[..., None] * features).sum((1, 2))

    def loss(at: Tensor) -> Tensor:
        energy = (features * at[:, None, None]).sum(3)
        return (seen * at).sum(1) + (total * torch.logsumexp(-energy, 2)).sum(1)

    best, damping = loss(found), torch.full((len(low),), 1e-3, dtype=torch.float64)
    for _ in range(_ITERATIONS):
        chance = torch.softmax(-(features * found[:, None, None]).sum(3), 2)
        mean = (chance[..., None] * features).sum(2)
        slope = seen - (total[..., None] * mean).sum(1)
        second = torch.einsum("nus,nusi,nusj->nuij", chance, features, features)
        second = second - mean[..., None] * mean[..., None, :]
        curve = (total[..., None, None] * second).sum(1)
        curve = curve + (damping * total.sum(1))[:, None, None] * torch.eye(3, dtype=torch.float64)
        trial = found - torch.linalg.solve(curve, slope[..., None])[..., 0]
        value = loss(trial)
        better = value < best
        done = bool((best - value < 1e-7 * best.abs()).all())
        found = torch.where(better[:, None], trial, found)
        best = torch.where(better, value, best)
        damping = torch.where(better, damping * 0.2, damping * 8).clamp(1e-9, 1e3)
        if done:
            break
    scale = 2.0 ** low.double() / spread[:, 0, 0]
    bits = found * 1.4426950408889634 * UNIT * torch.stack([scale.square(), scale, torch.ones_like(scale)], 1)
    return _with_escapes(torch.round(bits).clamp(-32767, 32767).long(), low, counts)


def _with_escapes(bits: Tensor, low: Tensor, counts: Tensor) -> Tables:
    """Escapes as frequent as symbols are that have no frequency, a power of two; 0 where all have one."""
    escape = torch.zeros_like(low)
    amount = counts.sum((1, 2)).clamp(min=1)
    for _ in range(2):  # what the escape takes may leave further symbols with none
        listed = Tables(bits, low, escape).frequencies()[:, :, :ESCAPE] > 0
        rare = torch.where(listed, 0, counts[:, :, :ESCAPE]).sum((1, 2)) + counts[:, :, ESCAPE].sum(1)
        wanted = 1 + torch.round(torch.log2((TOTAL * rare / amount).clamp(min=1.0))).clamp(max=11).long()
        escape = torch.where(rare > 0, torch.maximum(wanted, escape), escape)
    listed = Tables(bits, low, escape).frequencies()[:, :, :ESCAPE] > 0
    rare = torch.where(listed, 0, counts[:, :, :ESCAPE]).sum((1, 2)) + counts[:, :, ESCAPE].sum(1)
    return Tables(bits, low, torch.where(rare > 0, escape.clamp(min=1), escape))


def shrinkage(number: Tensor, wanted: Tensor, contexts: Tensor, count_of_contexts: int) -> Tensor:
    """The mean distance towards zero of ``wanted`` from its grid ``number (rows, columns)``, by context and size.

    ``(n, 5)`` float32 in whole 256ths, for sizes 0 (always 0), 1, 2, 3 and 4 or more.
    """
    size = number.abs().clamp(max=SHRINKS)
    place = (contexts.long() * (SHRINKS + 1) + size).flatten()
    inward = (number.abs() - wanted * number.sign()).clamp(-2, 2).flatten().double()
    cells = count_of_contexts * (SHRINKS + 1)
    total = torch.bincount(place, inward, minlength=cells)
    mean = total / torch.bincount(place, minlength=cells).clamp(min=1)
    shrink = (torch.round(mean * 256).clamp(0, 255) / 256).float().reshape(count_of_contexts, SHRINKS + 1)
    shrink[:, 0] = 0
    return shrink

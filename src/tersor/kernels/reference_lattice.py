"""Plain torch version of the nearest words of E8P: its specification, and what runs where nothing was compiled.

The codebook (QuIP#, arXiv:2402.04396, §4.2) is ``D̂ ± ¼`` with ``D̂`` the vectors of eight half-integers whose sum is
even; see :mod:`tersor.codecs.lattice`. A word's magnitudes before the shift are ``digit + ½`` with digits 0, 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, reduce
from itertools import product

import torch
from torch import Tensor

CLASSES = ((0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (0, 1), (1, 1))
"""Patterns of squared norm up to 10: how many of the eight magnitudes are 3/2 and 5/2; all others are 1/2."""
OUTER = 29
"""Patterns of squared norm 12 that fill the table up to 256: the first ones of five 3/2 and three 1/2."""
MOST = 1e18
"""Magnitudes above, and what is no number, count as this much: sums of squares stay finite, and all choices defined."""


@lru_cache(maxsize=1)
def patterns() -> Tensor:
    """The 256 patterns ``(256, 8)`` as digits: magnitude ``digit + ½``. Lexicographic, those of norm 12 last."""
    inner, outer = [], []
    for digits in product(range(3), repeat=8):
        ones, twos = digits.count(1), digits.count(2)
        if (ones, twos) in CLASSES:
            inner.append(digits)
        elif (ones, twos) == (5, 0):
            outer.append(digits)
    return torch.tensor(inner + outer[:OUTER])


@lru_cache(maxsize=1)
def _tables() -> tuple[Tensor, Tensor, Tensor]:
    """Class digits in descending order ``(7, 8)``, outer digits ``(29, 8)``, pattern number by base 3."""
    classes = [[2] * twos + [1] * ones + [0] * (8 - ones - twos) for ones, twos in CLASSES]
    digits = patterns()
    number = torch.zeros(3**8, dtype=torch.int64)
    number[(digits * 3 ** torch.arange(8)).sum(1)] = torch.arange(256)
    return torch.tensor(classes), digits[256 - OUTER :], number


def nearest_half(target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest word before its shift: for ``target (n, 8)`` the squared distances, digits and signs (1: negative).

    Exact. Of each class the best member has its largest magnitudes where the target's are; when the signs of the
    target make an odd sum, one must change, and that is best at the least magnitude. The outer patterns are not all
    of their class, so each is tried. Ties: the first class, then the first outer pattern; within a class the larger
    digits to the first columns, and a changed sign to the last, in an outer pattern to the first.
    """
    classes, outer, _ = _tables()
    negative = target < 0
    magnitude = target.abs().fmin(torch.tensor(MOST))
    size, order = magnitude.sort(dim=1, descending=True, stable=True)
    odd = (negative.sum(1) & 1).bool()
    # With all magnitudes ½; of twice Σ m·d less Σ d (d + 1) / 2, digits make it less. All sums are in a fixed order.
    flat = _in_order((magnitude - 0.5).square().T)
    first = [torch.zeros_like(flat), size[:, 0]]
    for column in range(1, 4):
        first.append(first[-1] + size[:, column])
    gains = []
    for ones, twos in CLASSES:
        gain = first[ones + twos] + first[twos] - (ones + 3 * twos)
        gains.append(gain - torch.where(odd != bool(ones & 1), size[:, 7], 0.0))
    # Column by column, of each outer pattern (n, 29).
    columns = list(zip(magnitude.T[:, :, None], outer.T.float(), strict=True))
    raised = [here * digits for here, digits in columns]
    turning = reduce(torch.minimum, (here * (2 * digits + 1) for here, digits in columns))
    halves = _in_order(raised[:4]) + _in_order(raised[4:])
    outside = halves - 5.0 - torch.where(odd[:, None], 0.0, turning)
    gain, choice = torch.cat([torch.stack(gains, 1), outside], 1).max(1)
    count = len(CLASSES)
    is_inner = (choice < count)[:, None]
    ranked = torch.zeros_like(order).scatter_(1, order, classes[choice.clamp(max=count - 1)])
    digits = torch.where(is_inner, ranked, outer[(choice - count).clamp(min=0)])
    wrong = (negative.sum(1) + digits.sum(1)) & 1
    # A sign is changed where |t| · s is least; with inner patterns that is a least magnitude, as the sort has it.
    turned = torch.where(is_inner[:, 0], order[:, 7], (magnitude * (2 * digits + 1)).argmin(1))
    negative = negative ^ (torch.nn.functional.one_hot(turned, 8) & wrong[:, None]).bool()
    return flat - 2 * gain, digits, negative


def _in_order(terms: Iterable[Tensor]) -> Tensor:
    """The sum of all, from the first to the last."""
    return reduce(torch.add, terms)


def nearest_words(target: Tensor) -> Tensor:
    """Words ``(n,)`` int32 of E8P nearest to ``target (n, 8)`` float32; of two shifts as near, +¼."""
    number = _tables()[2]
    up, down = nearest_half(target - 0.25), nearest_half(target + 0.25)
    lower = down[0] < up[0]
    digits = torch.where(lower[:, None], down[1], up[1])
    negative = torch.where(lower[:, None], down[2], up[2])
    pattern = number[(digits * 3 ** torch.arange(8)).sum(1)]
    signs = (negative[:, :7].long() << torch.arange(8, 15)).sum(1)
    return (pattern + signs + (lower.long() << 15)).to(torch.int32)

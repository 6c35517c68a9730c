"""The E8 lattice at two bits a weight: the codebook E8P of QuIP# (arXiv:2402.04396, §4.2).

The lattice is taken as ``D̂ ± ¼`` with ``D̂`` the vectors of eight half-integers whose sum is even. A word of 16 bits is
a pattern of magnitudes (one of 256), seven signs (the eighth makes the sum even) and the shift.

>>> E8P().bits((64, 128)) // 8                    # 64 * 16 words of 2 bytes + 64 scales of 2 bytes
2176
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from tersor.codecs.text import Words, reads
from tersor.codecs.vector import RowScaled

_CLASSES = ((0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (0, 1), (1, 1))
"""Patterns of squared norm up to 10: how many of the eight magnitudes are 3/2 and 5/2; all others are 1/2."""
_OUTER = 29
"""Patterns of squared norm 12 that fill the table up to 256: the first ones of five 3/2 and three 1/2."""


@lru_cache(maxsize=1)
def patterns() -> Tensor:
    """The 256 patterns ``(256, 8)`` as digits: magnitude ``digit + ½``. Lexicographic, those of norm 12 last."""
    inner, outer = [], []
    for digits in product(range(3), repeat=8):
        ones, twos = digits.count(1), digits.count(2)
        if (ones, twos) in _CLASSES:
            inner.append(digits)
        elif (ones, twos) == (5, 0):
            outer.append(digits)
    return torch.tensor(inner + outer[:_OUTER])


@lru_cache(maxsize=1)
def codewords() -> Tensor:
    """All 65536 words ``(65536, 8)`` float32: bits 0–7 pattern, 8–14 signs of columns 0–6, 15 shift by −¼."""
    code = torch.arange(1 << 16)
    digits = patterns()[code & 255]
    negative = (code[:, None] >> torch.arange(8, 15)) & 1
    # A sign change moves the sum by an odd number, and the sum of magnitudes is 4 + (digit sum).
    last = (digits.sum(1) + negative.sum(1)) & 1
    signs = 1.0 - 2.0 * torch.cat([negative, last[:, None]], 1)
    return (digits + 0.5) * signs + (0.25 - 0.5 * (code >> 15))[:, None]


@lru_cache(maxsize=1)
def _search_tables() -> tuple[Tensor, Tensor, Tensor]:
    """Class magnitudes in descending order ``(7, 8)``, outer magnitudes ``(29, 8)``, pattern number by base 3."""
    classes = [[2.5] * twos + [1.5] * ones + [0.5] * (8 - ones - twos) for ones, twos in _CLASSES]
    digits = patterns()
    number = torch.zeros(3**8, dtype=torch.int64)
    number[(digits * 3 ** torch.arange(8)).sum(1)] = torch.arange(256)
    return torch.tensor(classes), digits[256 - _OUTER :] + 0.5, number


def nearest_half(target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest word before its shift: for ``target (n, 8)`` the squared distances, digits and signs (1: negative).

    Exact. Of each class the best member has its largest magnitudes where the target's are; when the signs of the
    target make an odd sum, one must change, and that is best at the least magnitude. The outer patterns are not all
    of their class, so each is tried.
    """
    classes, outer, _ = _search_tables()
    negative = target < 0
    size, order = target.abs().sort(dim=1, descending=True, stable=True)
    odd = (negative.sum(1, keepdim=True) & 1).bool()
    parity = torch.tensor([ones & 1 for ones, _ in _CLASSES]).bool()
    inside = 2 * (size @ classes.T) - classes.square().sum(1)
    inside = inside - torch.where(odd != parity, 2 * size[:, 7:], 0.0)
    magnitude = target.abs()
    cheapest = (magnitude[:, :1] * outer[:, 0]).clone()
    for column in range(1, 8):
        cheapest = torch.minimum(cheapest, magnitude[:, column : column + 1] * outer[:, column])
    outside = 2 * (magnitude @ outer.T) - 12.0 - torch.where(odd, 0.0, 4 * cheapest)
    score, choice = torch.cat([inside, outside], 1).max(1)
    count = len(_CLASSES)
    is_inner = choice < count
    ranked = torch.zeros_like(target).scatter_(1, order, classes[choice.clamp(max=count - 1)])
    chosen = torch.where(is_inner[:, None], ranked, outer[(choice - count).clamp(min=0)])
    wrong = odd[:, 0] != torch.where(is_inner, parity[choice.clamp(max=count - 1)], True)
    # One column of least |t| · s; with inner patterns it is a least magnitude, as the sort would have it.
    turned = (magnitude * chosen).argmin(1)
    turned = torch.where(is_inner, order[:, 7], turned)
    negative = negative ^ (torch.nn.functional.one_hot(turned, 8).bool() & wrong[:, None])
    return magnitude.square().sum(1) - score, (chosen - 0.5).long(), negative


@dataclass(frozen=True)
class E8P(RowScaled):
    """16 bits for eight weights, and a float16 scale per row."""

    span: ClassVar[int] = 8

    def __str__(self) -> str:
        return "e8p:row"

    @property
    def code_bits(self) -> int:
        return 16

    @property
    def ratios(self) -> tuple[float, ...]:
        # For a Gaussian the best scale is about .97 of its standard deviation; heavy tails want more.
        return (0.8, 0.9, 0.97, 1.06, 1.2, 1.4)

    def unit(self, codes: Tensor) -> Tensor:
        return codewords().to(codes.device)[codes.long()]

    def closest(self, target: Tensor) -> Tensor:
        number = _search_tables()[2]
        up, down = nearest_half(target - 0.25), nearest_half(target + 0.25)
        lower = down[0] < up[0]
        digits = torch.where(lower[:, None], down[1], up[1])
        negative = torch.where(lower[:, None], down[2], up[2])
        pattern = number[(digits * 3 ** torch.arange(8)).sum(1)]
        signs = (negative[:, :7].long() << torch.arange(8, 15)).sum(1)
        return (pattern + signs + (lower.long() << 15)).to(torch.int32)


@reads("e8p", form="e8p:row", heads=("e8p",))
def _read(words: Words) -> E8P:
    if words.options != ("row",) or words.arguments:
        raise words.refuse("E8P has one scale per row, written e8p:row.")
    return E8P()

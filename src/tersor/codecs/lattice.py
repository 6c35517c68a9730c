"""The E8 lattice at two bits a weight: the codebook E8P of QuIP# (arXiv:2402.04396, §4.2).

The lattice is taken as ``D̂ ± ¼`` with ``D̂`` the vectors of eight half-integers whose sum is even. A word of 16 bits is
a pattern of magnitudes (one of 256), seven signs (the eighth makes the sum even) and the shift.

>>> E8P().bits((64, 128)) // 8                    # 64 * 16 words of 2 bytes + 64 scales of 2 bytes
2176
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from tersor.codecs.text import Words, reads
from tersor.codecs.vector import RowScaled
from tersor.kernels.lattice import nearest_words
from tersor.kernels.reference_lattice import patterns

__all__ = ["E8P", "codewords", "patterns"]


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
        # An eighth of the time of indexing.
        return torch.nn.functional.embedding(codes, codewords().to(codes.device))

    def closest(self, target: Tensor) -> Tensor:
        return nearest_words(target)


@reads("e8p", form="e8p:row", heads=("e8p",))
def _read(words: Words) -> E8P:
    if words.options != ("row",) or words.arguments:
        raise words.refuse("E8P has one scale per row, written e8p:row.")
    return E8P()

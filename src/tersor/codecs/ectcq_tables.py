"""What an entropy coder needs to know of a layer: classes of columns, frequencies of symbols, shrinkage.

Frequencies are stored as one byte each, a float of 4 bits of exponent and 4 of mantissa, and made to add up to 4096 by
whole-number arithmetic alone, so that every decoder finds the same table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.kernels.reference_rans import ESCAPE, REACH, SYMBOLS, TOTAL, TOTAL_BITS

SHRINKS = 4
"""Sizes of grid numbers that have a shrinkage of their own: 1, 2, 3, and all above."""

MODEL_BYTES = 2 * SYMBOLS + SHRINKS + 1
"""Bytes of one class: two tables of frequencies, the shrinkages, the number of raw bits."""

_FULL = 1 << 19
_UNSEEN = 0.3
"""What a symbol that never came up counts as, where it is priced."""


def frequency_codes(counts: Tensor) -> Tensor:
    """Counts ``(..., 32)`` to one byte each, uint8; 0 for what never comes up."""
    share = counts.double() / counts.amax(-1, keepdim=True).clamp(min=1) * _FULL
    exponent = torch.floor(torch.log2(share.clamp(min=16) / 16)).clamp(0, 15)
    mantissa = torch.round(share / 2**exponent) - 16
    exponent, mantissa = torch.where(mantissa == 16, exponent + 1, exponent), torch.where(mantissa == 16, 0.0, mantissa)
    code = (exponent * 16 + mantissa).clamp(1, 255)
    return torch.where(counts > 0, code, 0.0).to(torch.uint8)


def frequencies(codes: Tensor) -> Tensor:
    """Bytes ``(..., 32)`` to frequencies int64 that add up to 4096. Byte ``16 e + m`` stands for ``(16 + m) 2^e``.

    ``max(1, floor(4096 w / Σ w))`` where ``w > 0``; what is missing goes to the first of the largest. A table of zeros
    has only symbol 15, the number 0.
    """
    code = codes.long()
    weight = torch.where(code > 0, (16 + (code & 15)) << (code >> 4), 0)
    empty = weight.sum(-1, keepdim=True) == 0
    zero = torch.arange(SYMBOLS, device=codes.device) == REACH
    weight = torch.where(empty & zero, 1, weight)
    share = torch.where(weight > 0, (weight * TOTAL // weight.sum(-1, keepdim=True)).clamp(min=1), 0)
    largest = share.argmax(-1, keepdim=True)
    return share.scatter_add(-1, largest, TOTAL - share.sum(-1, keepdim=True))


def count(codes: Tensor, classes: Tensor, low: Tensor) -> Tensor:
    """How often each symbol comes up, ``(classes, 2, 32)`` int64, in grid numbers ``(rows, columns)``."""
    top = (codes >> 1) >> low[classes]
    symbol = torch.where(top.abs() > REACH, ESCAPE, top + REACH)
    place = (classes * 2 + (codes & 1)) * SYMBOLS + symbol
    return torch.bincount(place.flatten(), minlength=len(low) * 2 * SYMBOLS).reshape(len(low), 2, SYMBOLS)


def costs(counts: Tensor, raw: Tensor) -> Tensor:
    """Bits that symbols of these counts ``(..., 32)`` take, with the frequencies that would be stored.

    ``raw``: raw bits of symbols that are not the escape, broadcast against the counts' leading axes.
    """
    stored = frequencies(frequency_codes(counts)).clamp(min=1).double()
    more = torch.where(torch.arange(SYMBOLS) == ESCAPE, 16, raw[..., None])
    return (counts * (TOTAL_BITS - torch.log2(stored) + more)).sum(-1)


def prices(counts: Tensor, low: Tensor) -> Tensor:
    """Bits of every symbol, ``(classes, 2, 32)`` float32, seen or not."""
    total = counts.sum(2, keepdim=True) + SYMBOLS * _UNSEEN
    more = torch.where(torch.arange(SYMBOLS) == ESCAPE, 16, low[:, None, None])
    return (torch.log2(total / (counts + _UNSEEN)) + more).float()


def gaussian_prices(spread: Tensor, low: Tensor) -> Tensor:
    """Bits of every symbol, were each class a Gaussian of ``spread (classes,)`` grid numbers: where it starts."""
    width = 2.0 ** low[:, None, None]
    index = (torch.arange(SYMBOLS) - REACH) * width + (width - 1) / 2
    number = 2 * index + torch.tensor([0.0, 1.0])[:, None]
    sigma = spread[:, None, None].clamp(min=0.3)
    bits = torch.log2(sigma * 1.2533) + number.square() / (2 * sigma.square()) * 1.442695
    bits = torch.where(torch.arange(SYMBOLS) == ESCAPE, 14.0 + 16.0, bits)
    return bits.clamp(0.05, 30.0).float()


def shrinkage(number: Tensor, wanted: Tensor, classes: Tensor, count_of_classes: int) -> Tensor:
    """The mean distance towards zero of ``wanted`` from its grid ``number (rows, columns)``, by class and size.

    ``(classes, 5)`` float32 in whole 256ths, for sizes 0 (always 0), 1, 2, 3 and 4 or more.
    """
    size = number.abs().clamp(max=SHRINKS)
    place = (classes * (SHRINKS + 1) + size).flatten()
    inward = (number.abs() - wanted * number.sign()).clamp(-2, 2).flatten().double()
    cells = count_of_classes * (SHRINKS + 1)
    total = torch.bincount(place, inward, minlength=cells)
    mean = total / torch.bincount(place, minlength=cells).clamp(min=1)
    shrink = (torch.round(mean * 256).clamp(0, 255) / 256).float().reshape(count_of_classes, SHRINKS + 1)
    shrink[:, 0] = 0
    return shrink


def classify(level: Tensor, count_of_classes: int) -> tuple[Tensor, Tensor]:
    """Classes of columns by their ``level (columns,)``: Lloyd's algorithm in one dimension, started at quantiles.

    Returns int64 ``(columns,)`` and the classes' mean levels, ascending.
    """
    quantile = (torch.arange(count_of_classes) + 0.5) / count_of_classes
    centre = torch.quantile(level.double(), quantile.double())
    for _ in range(10):
        member = torch.bucketize(level.double(), (centre[1:] + centre[:-1]) / 2)
        amount = torch.bincount(member, minlength=count_of_classes)
        total = torch.bincount(member, level.double(), minlength=count_of_classes)
        centre = torch.where(amount > 0, total / amount.clamp(min=1), centre).sort().values
    return torch.bucketize(level.double(), (centre[1:] + centre[:-1]) / 2), centre.float()

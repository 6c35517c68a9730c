"""Plain torch versions of :mod:`tersor.kernels.products_floats`: their specification.

Each gives the weight ``(rows, columns)`` float32 that the product multiplies by: to the bit, as one sees from inputs of
a single 1. Sums differ from those in float64 by the rounding of float32 sums.
"""

from __future__ import annotations

import torch
from torch import Tensor


def codebook(codes: Tensor, scale: Tensor, book: Tensor, columns: int) -> Tensor:
    """The weight of :func:`tersor.kernels.products_floats.codebook`; the arguments are the same."""
    stages, entries, unit = book.shape
    index = (entries - 1).bit_length()
    number = _unpack(codes, index * stages, columns // unit)
    values = book[0].float()[number & entries - 1]
    for stage in range(1, stages):
        values = values + book[stage].float()[number >> stage * index & entries - 1]
    return values.flatten(1) * scale.float()


def e8p(codes: Tensor, scale: Tensor, patterns: Tensor, columns: int) -> Tensor:
    """The weight of :func:`tersor.kernels.products_floats.e8p`; the arguments are the same."""
    word = _unpack(codes, 16, columns // 8)
    digits = patterns.long()[word & 255]
    negative = word[..., None] >> torch.arange(8, 15) & 1
    last = (digits.sum(2) + negative.sum(2)) & 1
    signs = 1.0 - 2.0 * torch.cat([negative, last[..., None]], 2)
    moved = 0.25 - 0.5 * (word >> 15)
    return ((digits + 0.5) * signs + moved[..., None]).flatten(1) * scale.float()


def _unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """Little-endian codes of ``bits`` bits from bytes ``(rows, n)``: ``(rows, count)`` int64."""
    plane = (stream[:, :, None].long() >> torch.arange(8) & 1).flatten(1)[:, : count * bits]
    return (plane.reshape(len(stream), count, bits) << torch.arange(bits)).sum(2)

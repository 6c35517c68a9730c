"""Plain torch versions of :mod:`tersor.kernels.products_floats`: their specification.

Each gives the weight ``(rows, columns)`` float32 that the product multiplies by: to the bit, as one sees from inputs of
a single 1. Sums differ from those in float64 by the rounding of float32 sums.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def grid(codes: Tensor, scale: Tensor, zero: Tensor, *, bits: int, columns: int, tile: int = 1) -> Tensor:
    """The weight of :func:`tersor.kernels.products_floats.grid`; the arguments are the same."""
    which = torch.arange(len(codes)) // tile
    number = _unpack(codes, bits, columns).reshape(len(codes), scale.shape[1], columns // scale.shape[1])
    return ((number.float() - zero[which][:, :, None]) * scale[which][:, :, None]).flatten(1)


def spread(patterns: Tensor, subsets: Tensor, group: int, inner: Tensor) -> Tensor:
    """The weight of :func:`tersor.kernels.products_floats.spread`, of the weight ``inner`` that is inside."""
    groups = inner.shape[1] // subsets.shape[1]
    number = _unpack(patterns, (len(subsets) - 1).bit_length(), groups)
    at = (subsets.long()[number] + torch.arange(groups)[:, None] * group).flatten(1)
    return torch.zeros(len(inner), groups * group).scatter_(1, at, inner)


def magnitudes(signs: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The weight of :func:`tersor.kernels.products_floats.magnitudes`; the arguments are the same."""
    total = None
    for plus, rows, columns in zip(signs, left, right, strict=True):
        size = rows.float()[:, :1] * columns.float()[0]
        for k in range(1, len(columns)):
            size = size + rows.float()[:, k : k + 1] * columns.float()[k]
        size = torch.where(_unpack(plus, 1, columns.shape[1]) == 1, size.abs(), -size.abs())
        total = size if total is None else total + size
    assert total is not None
    return total


def pyramid(codes: Tensor, gains: Tensor, scale: Tensor, *, bits: int, dim: int, middle: int) -> Tensor:
    """The weight of :func:`tersor.kernels.products_floats.pyramid`; the arguments are the same."""
    whole = _unpack(codes, bits, dim * gains.shape[1]).reshape(*gains.shape, dim).float() - middle
    # Torch's own roots in float32 may be off by a last bit, and what the codec decodes to then is too.
    stretch = gains.float() / whole.double().square().sum(2).sqrt().float()
    return (whole * stretch[:, :, None]).flatten(1) * scale.float()


def _unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """Little-endian codes of ``bits`` bits from bytes ``(rows, n)``: ``(rows, count)`` int64."""
    plane = (stream[:, :, None].long() >> torch.arange(8) & 1).flatten(1)[:, : count * bits]
    return (plane.reshape(len(stream), count, bits) << torch.arange(bits)).sum(2)

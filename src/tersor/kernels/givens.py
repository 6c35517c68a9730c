"""Orthonormal matrices as products of plane rotations, each stored in 8 bits: any basis, up to signs, nearly.

A matrix of size ``n`` is taken apart into ``n (n − 1) / 2`` rotations of neighbouring coordinates, as in a QR
factorization by Givens rotations. They run in ``2 n − 3`` stages whose rotations are of separate coordinates. A
rotation is a whole number ``k`` from −128 to 127, the tangent of half its angle in 128ths:

    cos = (16384 − k²) / (16384 + k²),    sin = 256 k / (16384 + k²),

so angles from −90 to 89.6 degrees, which is all of them up to signs, in steps of 0.45 to 0.9 degrees. No cosine is
computed: division is the same everywhere, and a cosine is not. Whatever the numbers, the matrix is orthonormal.

Products and sums are taken one at a time, so that the result for a row is the same bits whatever rows are with it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

UNIT = 128


def count(size: int) -> int:
    """How many rotations a matrix of ``size`` has."""
    return size * (size - 1) // 2


@lru_cache(maxsize=16)
def stages(size: int) -> tuple[tuple[int, int, int, int], ...]:
    """For each stage: the number of its first rotation, of its last plus one, its first coordinate, and the first of
    the rows of the matrix that it clears. Its rotations are of coordinates ``low, low + 1``, then ``low + 2, low + 3``…
    """
    found, first = [], 0
    for stage in range(2 * size - 3):
        row = max(0, stage - size + 2)
        last = first + stage // 2 - row + 1
        found.append((first, last, size - 2 - stage + 2 * row, row))
        first = last
    return tuple(found)


def turn(rows: Tensor, angles: Tensor) -> Tensor:
    """``rows (n, in)`` float32 or float64 times the block-diagonal ``Q`` of ``angles (blocks, count)`` int8."""
    moving = _columns(rows, len(angles))
    cosine, sine = _pairs(angles, rows.dtype)
    for first, last, low, _ in stages(moving.shape[1]):
        _rotate(moving, low, cosine[:, first:last], sine[:, first:last])
    return moving.reshape(rows.shape[1], len(rows)).T.contiguous()


def unturn(rows: Tensor, angles: Tensor) -> Tensor:
    """The inverse of :func:`turn`: ``rows (n, in)`` times ``Qᵀ``."""
    moving = _columns(rows, len(angles))
    cosine, sine = _pairs(angles, rows.dtype)
    for first, last, low, _ in reversed(stages(moving.shape[1])):
        _rotate(moving, low, cosine[:, first:last], -sine[:, first:last])
    return moving.reshape(rows.shape[1], len(rows)).T.contiguous()


def factored(bases: Tensor) -> Tensor:
    """Angles, int8 ``(blocks, count)``, of rotations whose product is near ``bases (blocks, size, size)``.

    The columns of a basis are its vectors, orthonormal, float64; their signs are lost. Later rotations make up for
    what the rounding of earlier ones left of the vectors that they clear.
    """
    blocks, size, _ = bases.shape
    moving = bases.clone()  # (blocks, coordinate, vector)
    angles = torch.zeros(blocks, count(size), dtype=torch.int8, device=bases.device)
    for first, last, low, row in stages(size):
        vectors = torch.arange(row, row + last - first)
        places = low + 2 * torch.arange(last - first)
        near, far = moving[:, places, vectors], moving[:, places + 1, vectors]
        least = torch.finfo(torch.float64).tiny
        tangent = torch.where(near < 0, -far, far) / (near.abs() + torch.hypot(near, far)).clamp(min=least)
        number = torch.round(UNIT * tangent)
        # A quarter turn back is one forth, up to signs.
        angles[:, first:last] = torch.where(number >= UNIT, -UNIT, number).to(torch.int8)
        cosine, sine = _pairs(angles[:, first:last], torch.float64)
        _rotate(moving, low, cosine, sine)
    return angles


def _columns(rows: Tensor, blocks: int) -> Tensor:
    """A copy of ``rows (n, in)`` as ``(blocks, in / blocks, n)``."""
    return rows.T.contiguous().clone().reshape(blocks, rows.shape[1] // blocks, len(rows))


def _pairs(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, ``(blocks, count, 1)``: float64 quotients rounded to float32."""
    number = angles.to(torch.float64)[:, :, None]
    square = number * number
    whole = square + UNIT * UNIT
    cosine = ((UNIT * UNIT - square) / whole).to(torch.float32)
    sine = (2 * UNIT * number / whole).to(torch.float32)
    return cosine.to(dtype), sine.to(dtype)


def _rotate(moving: Tensor, low: int, cosine: Tensor, sine: Tensor) -> None:
    """Rotate pairs of the middle axis in place, from coordinate ``low`` on."""
    high = low + 2 * cosine.shape[1]
    near, far = moving[:, low:high:2], moving[:, low + 1 : high : 2]
    turned = near * cosine + far * sine
    moving[:, low + 1 : high : 2] = far * cosine - near * sine
    moving[:, low:high:2] = turned

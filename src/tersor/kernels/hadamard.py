"""A randomised orthogonal rotation of any size, cheap to apply: signs, Walsh–Hadamard butterflies, a small cosine part.

A row of ``n = m · 2^k`` values (``m`` odd) is multiplied by random signs, laid out as ``(m, 2^k)``, taken through the
Walsh–Hadamard transform along the second axis, and through the orthonormal DCT-II of size ``m`` along the first. Every
output depends on every input. As in QuIP# (arXiv:2402.04396, §3.1), which has another way for sizes that are no power
of two.

All sums are taken in a fixed order, one product and one addition at a time in float32: the result for a row is the
same bits whatever other rows are with it, and whatever the library.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def factors(size: int) -> tuple[int, int]:
    """``size`` as an odd number and a power of two: ``(m, 2^k)``."""
    power = size & -size
    return size // power, power


def signs(size: int, seed: int = 0) -> list[int]:
    """``size`` pseudo-random signs: bit 63 of splitmix64's outputs (Steele, Lea and Flood, 2014) from ``seed``."""
    mask = (1 << 64) - 1
    found = []
    for index in range(1, size + 1):
        z = (seed + index * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(-1 if (z ^ (z >> 31)) >> 63 else 1)
    return found


def cosines(size: int) -> list[list[float]]:
    """The orthonormal DCT-II: entry ``[i][j]`` takes input ``j`` to output ``i``."""
    return [
        [math.sqrt((1 if i == 0 else 2) / size) * math.cos(math.pi * (2 * j + 1) * i / (2 * size)) for j in range(size)]
        for i in range(size)
    ]


@lru_cache(maxsize=16)
def _signs(size: int, seed: int) -> Tensor:
    return torch.tensor(signs(size, seed), dtype=torch.float32)


@lru_cache(maxsize=16)
def _cosines(size: int) -> Tensor:
    return torch.tensor(cosines(size), dtype=torch.float64).to(torch.float32)


def rotate(rows: Tensor, seed: int = 0) -> Tensor:
    """``rows (..., n)`` float32 times the rotation ``Q``: the weight ``W Q`` that goes with inputs ``Qᵀ x``."""
    size = rows.shape[-1]
    odd, power = factors(size)
    signed = rows * _signs(size, seed).to(rows.device)
    return _mix(_butterflies(signed.reshape(-1, odd, power)), transposed=False).reshape(rows.shape)


def unrotate(rows: Tensor, seed: int = 0) -> Tensor:
    """The inverse of :func:`rotate`: ``rows (..., n)`` times ``Qᵀ``."""
    size = rows.shape[-1]
    odd, power = factors(size)
    mixed = _butterflies(_mix(rows.reshape(-1, odd, power), transposed=True)).reshape(rows.shape)
    return mixed * _signs(size, seed).to(rows.device)


def _butterflies(rows: Tensor) -> Tensor:
    """The orthonormal Walsh–Hadamard transform of the last axis of ``(n, m, 2^k)``."""
    count, odd, power = rows.shape
    half = 1
    while half < power:
        pairs = rows.reshape(count, odd, power // (2 * half), 2, half)
        first, second = pairs[:, :, :, 0], pairs[:, :, :, 1]
        rows = torch.stack([first + second, first - second], 3)
        half *= 2
    return rows.reshape(count, odd, power) * (1.0 / math.sqrt(power))


def _mix(rows: Tensor, *, transposed: bool) -> Tensor:
    """The cosine transform, or its inverse, along the middle axis of ``(n, m, 2^k)``."""
    odd = rows.shape[1]
    if odd == 1:
        return rows
    table = _cosines(odd).to(rows.device)
    table = table.T if transposed else table
    total = table[:, 0][None, :, None] * rows[:, :1]
    for index in range(1, odd):
        total = total + table[:, index][None, :, None] * rows[:, index : index + 1]
    return total

"""What theory says that quantizers lose on a unit Gaussian: mean squared errors, by integrals over its density.

``python -m doctest benchmarks/gaussian.py`` checks them against the tables of Max (1960) and others:

>>> [round(lloyd_max(levels), 5) for levels in (2, 3, 4, 8, 16)]
[0.36338, 0.19017, 0.11748, 0.03455, 0.0095]
>>> [round(even(bits), 5) for bits in (1, 2, 3, 4)]
[0.36338, 0.11885, 0.03744, 0.01154]
>>> [round(entropy_coded(rate), 4) for rate in (1, 2, 3)]
[0.3483, 0.0889, 0.0222]
>>> round(space_filling(2, 1) / 4**-2, 3), round(space_filling(2, 8) / 4**-2, 3)
(2.721, 1.374)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize
from scipy.special import ndtr

Floats = NDArray[np.float64]

MOMENTS = {1: 1 / 12, 2: 0.080188, 4: 0.076603, 6: 0.074244, 8: 0.071682}
"""Normalised second moments of the best known lattices (Conway and Sloane, 1999, table 2.3): Z, A2, D4, E6*, E8."""


def shannon(rate: float) -> float:
    """The least mean squared error at ``rate`` bits."""
    return 4.0**-rate


def cells(edges: Floats) -> tuple[Floats, Floats, Floats]:
    """Probability, first and second moment of a unit Gaussian between ``edges`` and beyond the outer ones."""
    ends = np.concatenate([[-np.inf], edges, [np.inf]])
    density = np.exp(-0.5 * ends**2) / math.sqrt(2 * math.pi)
    weighted = np.where(np.isinf(ends), 0.0, ends) * density
    mass = np.diff(ndtr(ends))
    return mass, -np.diff(density), mass - np.diff(weighted)


def nearest(levels: Sequence[float] | Floats) -> float:
    """Rounding to the nearest of ``levels``."""
    points = np.unique(np.asarray(levels, np.float64))
    mass, first, second = cells((points[1:] + points[:-1]) / 2)
    return float((second - 2 * points * first + points**2 * mass).sum())


def scaled(levels: Sequence[float] | Floats) -> float:
    """The same at the best scale."""
    points = np.asarray(levels, np.float64)
    scales = np.geomspace(0.1, 6, 400) / np.abs(points).max()
    errors = [nearest(scale * points) for scale in scales]
    start = scales[int(np.argmin(errors))]
    found = minimize(lambda s: nearest(s[0] * points), [start], method="Nelder-Mead", options={"xatol": 1e-7})
    return min(float(found.fun), *errors)


@lru_cache
def in_groups(levels: tuple[float, ...], group: int) -> float:
    """Rounding to the nearest of ``levels`` at the best scale for each ``group`` weights, found by trying 80."""
    generator = np.random.default_rng(2)
    weight = generator.standard_normal((1 << 17) // group * group).reshape(-1, group)
    weight /= math.sqrt((weight**2).mean())
    points = np.array(sorted(levels))
    middles = (points[1:] + points[:-1]) / 2
    most = np.abs(weight).max(1, keepdims=True) / np.abs(points).max()
    best = np.full(len(weight), np.inf)
    for share in np.linspace(0.2, 1.15, 80):
        ratio = weight / (share * most)
        error = ratio - points[np.searchsorted(middles, ratio)]
        best = np.minimum(best, ((share * most) ** 2 * error**2).sum(1))
    return float(best.sum()) / weight.size


@lru_cache
def lloyd_max(levels: int) -> float:
    """The best ``levels`` values."""
    points = np.linspace(-1, 1, levels) * math.sqrt(2 * math.log(levels)) if levels > 1 else np.zeros(1)
    for _ in range(5000):
        mass, first, _ = cells((points[1:] + points[:-1]) / 2)
        points = first / mass
    return nearest(points)


@lru_cache
def even(bits: int) -> float:
    """``2^bits`` evenly spaced values, symmetric: no zero among them."""
    return scaled(np.arange(2**bits) - (2**bits - 1) / 2)


@lru_cache
def even_with_zero(bits: int) -> float:
    """``2^bits`` evenly spaced values with zero among them, wherever it is best."""
    return min(scaled(np.arange(2**bits) - zero) for zero in range(2**bits))


@lru_cache
def planes(count: int) -> float:
    """All sums of ``±a_p`` for ``count`` scales ``a_p``."""
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * count)).reshape(count, -1)
    start = 0.9 * 0.5 ** np.arange(count)
    found = minimize(lambda a: nearest(a @ signs), start, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-10})
    return float(found.fun)


@lru_cache
def dual_planes() -> float:
    """``0, −a, b`` and ``b − a``: dual binary weights (arXiv:2402.11960, §3.2)."""
    starts = ((0.9, 1.8), (1.8, 0.9), (1.3, 1.3))
    loss = lambda a: nearest([0, -a[0], a[1], a[1] - a[0]])  # noqa: E731
    return min(float(minimize(loss, start, method="Nelder-Mead").fun) for start in starts)


def greedy_planes(count: int) -> float:
    """Signs and one magnitude, ``count`` times over, each for what the one before it left (arXiv:2410.23918, §3)."""
    points = np.linspace(0, 9, 900_001)
    density = np.exp(-0.5 * points**2)
    density /= density.sum()
    left = points
    for _ in range(count):
        left = np.abs(left) - (np.abs(left) * density).sum()
    return float((left**2 * density).sum())


@lru_cache
def entropy_coded(rate: float) -> float:
    """Even thresholds, centroids, an ideal entropy coder (Gish and Pierce, 1968; here at finite rates)."""

    def measured(step: float) -> tuple[float, float]:
        reach = math.ceil(10 / step)
        mass, first, _ = cells((np.arange(-reach, reach) + 0.5) * step)
        seen = mass > 0
        entropy = -(mass[seen] * np.log2(mass[seen])).sum()
        return float(entropy), 1 - float((first[seen] ** 2 / mass[seen]).sum())

    step = brentq(lambda s: measured(s)[0] - rate, 2 * math.pi * 0.02 / 2**rate, 9.0)
    return measured(step)[1]


def space_filling(rate: float, dimension: int) -> float:
    """The best codebook of ``dimension`` at high rates (Zador, 1982), cells like the best known lattice's."""
    spread = 2 * math.pi * ((dimension + 2) / dimension) ** ((dimension + 2) / 2)
    return MOMENTS[dimension] * spread * shannon(rate)

"""Measured rate–distortion points: a sample of a layer's rows, encoded with the real solver by each candidate.

Rows are independent given the Gram matrix, so the sample's distortion estimates the layer's, at the share of the cost
that the sample is of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.contracts import Codec
from tersor.statistics.sensitivity import ROWS, Objective


@dataclass(frozen=True)
class Sample:
    """Rows of a layer that stand for all.

    ``rows (n,)``: their numbers, ascending; ``weight (n, in)`` float32; ``shares (n,)`` float64: one over the chance of
    each row to be drawn, scaled so that sums weighted by them estimate sums over the layer.
    """

    rows: Tensor
    weight: Tensor
    shares: Tensor


def draw_sample(weight: Tensor, objective: Objective, *, count: int, seed: int) -> Sample:
    """``count`` rows (or all) without replacement, half by chance and half by their share of the objective.

    ``weight (out, in)`` of any float dtype. Estimates are ratios to the objective's value at ``W`` itself, which is
    known for all rows: they vary far less than plain ones when a few rows carry most of the weight, and drawing by
    share makes sure that those rows are there.
    """
    out = weight.shape[0]
    energy = torch.cat([
        objective.distortion(weight[start : start + ROWS].float(), torch.arange(start, min(start + ROWS, out)))
        for start in range(0, out, ROWS)
    ]).double().clamp(min=0)  # fmt: skip
    total = float(energy.sum())
    if count >= out:
        return Sample(torch.arange(out), weight.float(), torch.ones(out, dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    chance = torch.full_like(energy, 1.0 / out)
    if total > 0:
        chance = 0.5 * chance + 0.5 * energy / total
    # Keys Exp(1) / chance, smallest first, draw without replacement in proportion to `chance`. Given the first key left
    # out, each row is in or out by itself, with a known chance: sums over the sample are then unbiased even where a few
    # rows are as good as certain (bottom-k sampling with rank conditioning, arXiv:0802.3448).
    keys = torch.empty(out, dtype=torch.float64).exponential_(generator=generator) / chance
    smallest = torch.topk(keys, count + 1, largest=False, sorted=True)
    rows = smallest.indices[:count].sort().values
    shares = 1.0 / -torch.expm1(-chance[rows] * smallest.values[count])
    estimate = float((shares * energy[rows]).sum())
    if estimate > 0:
        shares = shares * (total / estimate)
    return Sample(rows, weight[rows].float(), shares)


def measure(
    sample: Sample, objective: Objective, candidates: Sequence[Codec], encode: Callable[[Tensor, Codec], Tensor]
) -> list[float]:
    """Distortion of the whole layer, estimated from the sample, for each candidate.

    ``encode``: a weight ``(n, in)`` float32 to the values that its encoding in a codec stands for.
    """
    distortions = []
    for codec in candidates:
        values = encode(sample.weight, codec)
        loss = objective.distortion(sample.weight - values, sample.rows).double()
        distortions.append(max(float((loss * sample.shares).sum()), 0.0))
    return distortions

"""Codes and scales in turn: decoupleQ (arXiv:2404.12759, §3).

With codes fixed, scales are exact least squares under ``tr(E H Eᵀ)``; with scales fixed, codes are a box-constrained
integer problem, here lowered by coordinate descent. Neither step can raise the objective of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tersor.contracts import Encoded, Gram, LeafCodec, Solver
from tersor.errors import BadInput
from tersor.solvers.coordinate import CoordinateDescent, CoordinateFactor


@dataclass(frozen=True)
class Alternating(Solver):
    """``rounds`` of least squares and one sweep of ``inner``, from its own result."""

    rounds: int = 4
    inner: CoordinateDescent = field(default_factory=CoordinateDescent)

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise BadInput(f"The alternating solver cannot do {self.rounds} rounds; give 0 or more.")

    def prepare(self, gram: Gram | None, span: int = 1) -> CoordinateFactor:
        return self.inner.prepare(gram, span)

    def solve(self, weight: Tensor, codec: LeafCodec, prepared: Any) -> Encoded:
        gram = prepared.start.gram
        best = self.inner.solve(weight, codec, prepared)
        loss = _loss(weight, codec, best, gram)
        for _ in range(self.rounds):
            codes = self.inner.sweep(weight, codec, best, prepared, 1)
            side = codec.refit(weight, Encoded(codes, best.side), gram)
            now = _loss(weight, codec, Encoded(codes, side), gram)
            better = now < loss
            if not bool(better.any()):
                break
            # Damping of the diagonal can make a sweep a little worse in the undamped objective: such rows stay.
            keep = better[:, None]
            best = Encoded(
                torch.where(keep, codes, best.codes),
                {name: torch.where(keep, side[name], old) for name, old in best.side.items()},
            )
            loss = torch.where(better, now, loss)
        return best


def _loss(weight: Tensor, codec: LeafCodec, encoded: Encoded, gram: Tensor) -> Tensor:
    """``e H eᵀ`` of each row, ``(rows,)`` float64."""
    error = weight - codec.values(encoded, weight.shape[1])
    return ((error @ gram) * error).double().sum(1)

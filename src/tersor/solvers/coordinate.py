"""Coordinate descent on the layer objective: QuantEase (arXiv:2309.01885, Algorithm 1).

For one row, with ``P = (w − v) H``, the best real value of weight ``j`` given all others is ``v_j + P_j / H_jj``; it is
rounded, and ``P`` moves by ``−(change) · H_j``. Any start works, the objective never rises; a start from error feedback
ends lower than one from nearest rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tersor.contracts import Encoded, Gram, LeafCodec, Solver
from tersor.solvers.feedback import ErrorFeedback, FeedbackFactor
from tersor.solvers.sequential import sequential_round


@dataclass(frozen=True)
class CoordinateFactor:
    """``start``: what the starting solver needs. ``diagonal (in,)``: that of ``H``, damped."""

    start: FeedbackFactor
    diagonal: Tensor

    def rows(self, here: slice) -> Tensor:
        """Rows of the damped ``H``."""
        rows = self.start.gram[here].clone()
        rows.diagonal(here.start).copy_(self.diagonal[here])
        return rows


@dataclass(frozen=True)
class CoordinateDescent(Solver):
    """``sweeps`` over all columns from the result of ``start``, in blocks of ``block`` columns."""

    sweeps: int = 2
    start: ErrorFeedback = field(default_factory=ErrorFeedback)
    block: int = 128

    def prepare(self, gram: Gram | None, span: int = 1) -> CoordinateFactor:
        start = self.start.prepare(gram, span)
        diagonal = start.gram.diagonal()
        return CoordinateFactor(start, diagonal + (1e-6 * diagonal.mean() + 1e-30))

    def solve(self, weight: Tensor, codec: LeafCodec, prepared: CoordinateFactor) -> Encoded:
        encoded = self.start.solve(weight, codec, prepared.start)
        if codec.costly:  # a trellis gains 0.2 % from a sweep that takes as long as all before it
            return encoded
        codes = self.sweep(weight, codec, encoded, prepared, self.sweeps)
        if codec.span > 1:
            # Each column of a span goes to its own wish, and together they may overshoot, far where columns are uneven.
            gram = prepared.start.gram
            better = _losses(weight, codec, Encoded(codes, encoded.side), gram) < _losses(weight, codec, encoded, gram)
            codes = torch.where(better[:, None], codes, encoded.codes)
        result = Encoded(codes, encoded.side)
        return Encoded(codes, codec.refit(weight, result, prepared.start.gram)) if self.start.refit else result

    def sweep(
        self, weight: Tensor, codec: LeafCodec, encoded: Encoded, prepared: CoordinateFactor, sweeps: int
    ) -> Tensor:
        """Codes after ``sweeps`` more passes over all columns, fewer when nothing changes; the side stays."""
        columns = weight.shape[1]
        side = encoded.side
        codes = encoded.codes.clone()
        values = codec.values(encoded, columns)
        diagonal = prepared.diagonal
        step = max(self.block // codec.span, 1) * codec.span
        numbers = torch.arange(columns)
        for _ in range(sweeps):
            before = codes.clone()
            for start in range(0, columns, step):
                here = slice(start, min(start + step, columns))
                gram = prepared.rows(here)
                pull = (weight - values) @ gram.T
                # The wish of each column, and how later columns of the block move it. With a vector codec the wish is
                # per column still: the exact joint minimiser differs by the span's own off-diagonal block.
                target = values[:, here] + pull / diagonal[here]
                block_codes, block_values = sequential_round(
                    codec,
                    side,
                    target,
                    reference=values[:, here].contiguous(),
                    mixing=-gram[:, here] / diagonal[here],
                    columns=numbers[here],
                    in_features=columns,
                )
                codes[:, start // codec.span : -(-here.stop // codec.span)] = block_codes
                values[:, here] = block_values
            if torch.equal(codes, before):
                break
        return codes


def _losses(weight: Tensor, codec: LeafCodec, encoded: Encoded, gram: Tensor) -> Tensor:
    """``e H eᵀ`` of each row, ``(rows,)`` float64."""
    error = weight - codec.values(encoded, weight.shape[1])
    return ((error @ gram) * error).double().sum(1)

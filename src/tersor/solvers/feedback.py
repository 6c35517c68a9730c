"""Error feedback: GPTQ (arXiv:2210.17323), which is LDLQ (arXiv:2307.13304) and Babai's nearest plane (2507.18553).

With ``H = R Rᵀ``, ``R`` upper triangular, the distortion of a row with error ``e = w − v`` is
``Σ_j (Σ_{k≤j} e_k R_kj)²``. Rounding columns left to right towards ``t_j = w_j + Σ_{k<j} (w_k − v_k) R_kj / R_jj``
makes term ``j`` equal to ``R_jj² (t_j − v_j)²``: each column's rounding error counts with its pivot ``R_jj²`` alone.
With spans ``J`` of several columns (block LDLQ, arXiv:2402.04396) it is ``|(t_J − v_J) R_JJ|²``.
No inverse of ``H`` is needed, only this one Cholesky factor.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from tersor.contracts import Encoded, Gram, LeafCodec, Solver
from tersor.errors import NotPositiveDefinite
from tersor.solvers.sequential import sequential_round

_log = logging.getLogger(__name__)
_MOST_DAMPING = 1.0
_STRETCH = 256
"""Rows that are taken to or from float64 at one time."""


@dataclass(frozen=True)
class FeedbackFactor:
    """What error feedback needs of a Gram matrix, all float32, columns in the order of rounding.

    ``mixing (in, in)``: ``−R_jk / R_kk`` above the diagonal, 0 elsewhere; with spans of several columns ``J``,
    ``−R_·J R_JJ⁻¹`` above the diagonal blocks. ``pivots (in,)``: ``R_jj²``.
    ``roots (in / span, span, span)``: the blocks ``R_JJ``, each over the root mean square of its diagonal; None for
    spans of one column.
    ``order (in,)``: column numbers. ``gram (in, in)``: ``H`` in the layer's own order. ``damping``: what was added to
    the diagonal, as a fraction of its mean. ``natural``: the order is left to right.
    """

    mixing: Tensor
    pivots: Tensor
    order: Tensor
    gram: Tensor
    damping: float
    natural: bool
    roots: Tensor | None = None


def factor(gram: Tensor, *, damping: float, order: Tensor, natural: bool, span: int = 1) -> FeedbackFactor:
    """Factor ``gram (in, in)`` for rounding in ``order``, ``span`` columns at a time.

    The factorization is done in float64: Gram matrices of real layers have condition numbers around 1e6 to 1e8 even
    when damped, beyond what float32 can factor. Damping is raised tenfold, with a warning, while it fails; above
    100 % of the mean diagonal :class:`~tersor.errors.NotPositiveDefinite` is raised. Dead inputs (zero diagonal) are
    taken as unit ones that interact with nothing.
    """
    matrix = gram
    mean = float(gram.diagonal().double().mean())
    if not mean > 0:
        matrix, mean = torch.eye(len(gram)), 1.0
    dead = matrix.diagonal() <= 0
    flip = order.flip(0)
    used = damping
    while True:
        lower = _cholesky(matrix, flip, used * mean + dead[flip] * mean)
        if lower is not None:
            break
        used = max(used * 10, 1e-4)
        if used > _MOST_DAMPING:
            raise NotPositiveDefinite(
                f"The Gram matrix of {len(matrix)} inputs could not be factored even with {_MOST_DAMPING:.0%} damping; "
                f"give more calibration text, or use the solver 'nearest'."
            )
        _log.warning("Gram matrix of %d inputs is not positive definite: damping raised to %g", len(matrix), used)
    # Flipping the lower factor of the flipped matrix gives the upper factor R of H = R Rᵀ.
    count = len(lower)
    pivots = lower.diagonal().flip(0)
    mixing = torch.empty(count, count)
    for start in range(0, count, _STRETCH):
        stop = min(start + _STRETCH, count)
        upper = lower[count - stop : count - start].flip(0).flip(1)
        mixing[start:stop] = torch.triu(-upper / pivots[None, :], 1 + start) if span == 1 else upper
    roots = _mix_spans(mixing, span) if span > 1 else None
    return FeedbackFactor(mixing, (pivots * pivots).float(), order, gram, used, natural, roots)


def _cholesky(matrix: Tensor, order: Tensor, damping: Tensor) -> Tensor | None:
    """Lower factor, float64, of ``matrix`` with rows and columns in ``order`` and ``damping`` added to its diagonal.

    None when it is not positive definite. One float64 matrix is there at any time, and no more: it is filled in
    stretches, laid out in columns as the factorization wants it, and factored in place.
    """
    columns = torch.empty(matrix.shape, dtype=torch.float64)
    for start in range(0, len(order), _STRETCH):
        stretch = order[start : start + _STRETCH]
        # The matrix is symmetric: whole rows are gathered in a twentieth of the time that columns take.
        columns[start : start + len(stretch)] = matrix.index_select(0, stretch).index_select(1, order)
    lower = columns.T
    lower.diagonal().add_(damping)
    failed = torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    return lower if int(failed) == 0 else None


@dataclass(frozen=True)
class ErrorFeedback(Solver):
    """Round columns in order, pushing each error onto the columns still to come.

    ``damping``: added to the Gram diagonal, as a fraction of its mean. ``order``: ``activation`` rounds columns with
    the largest ``H_jj`` first, with side information chosen beforehand; ``natural`` goes left to right and chooses a
    group's scale when it is reached, from weights as moved so far (docs/LOG.md has the comparison). ``block``: columns
    between two updates of all the rest (a matrix product each). ``refit``: finish with the codec's best side
    information for the codes found. ``metric``: where a code stands for several columns ``J``, ``span`` chooses it by
    ``|(t − v) R_JJ|``, which is what its error adds to the distortion, ``plain`` in the codec's own metric.
    """

    damping: float = 0.01
    order: Literal["natural", "activation"] = "activation"
    block: int = 128
    refit: bool = True
    metric: Literal["span", "plain"] = "span"

    def __repr__(self) -> str:
        """With no ``metric`` where it is the usual one: surveys find what they have measured by this text."""
        names = [one.name for one in fields(self) if one.name != "metric" or self.metric != "span"]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def prepare(self, gram: Gram | None, span: int = 1) -> FeedbackFactor:
        assert gram is not None
        matrix = gram.matrix
        natural = self.order == "natural"
        if natural:
            order = torch.arange(len(matrix))
        else:
            energy = matrix.diagonal().reshape(-1, span).sum(1)
            spans = torch.argsort(energy, descending=True, stable=True)
            order = (spans[:, None] * span + torch.arange(span)).flatten()
        damping = 0.0 if gram.damped else self.damping
        return factor(matrix, damping=damping, order=order, natural=natural, span=span)

    def solve(self, weight: Tensor, codec: LeafCodec, prepared: FeedbackFactor) -> Encoded:
        columns = weight.shape[1]
        pivots = torch.empty_like(prepared.pivots)
        pivots[prepared.order] = prepared.pivots
        side = codec.prepare(weight, pivots)
        roots = prepared.roots if self.metric == "span" else None
        segment = codec.segment(columns)
        moving = prepared.natural and segment < columns
        step = segment if moving else _whole_spans(self.block, codec.span)
        reference = weight[:, prepared.order]
        target = reference.clone()
        codes = torch.empty(weight.shape[0], columns // codec.span, dtype=codec.code_dtype)
        for start in range(0, columns, step):
            here = slice(start, min(start + step, columns))
            if moving:
                side = codec.prepare_segment(side, target[:, here].contiguous(), start, prepared.pivots[here])
            block_codes, values = sequential_round(
                codec,
                side,
                target[:, here].contiguous(),
                reference=reference[:, here].contiguous(),
                mixing=prepared.mixing[here, here].contiguous(),
                columns=prepared.order[here],
                in_features=columns,
                roots=None if roots is None else roots[here.start // codec.span : -(-here.stop // codec.span)],
            )
            codes[:, here.start // codec.span : -(-here.stop // codec.span)] = block_codes
            target[:, here.stop :] += (values - reference[:, here]) @ prepared.mixing[here, here.stop :]
        encoded = Encoded(_restore(codes, prepared.order, codec.span), side)
        return Encoded(encoded.codes, codec.refit(weight, encoded, prepared.gram)) if self.refit else encoded


def _mix_spans(upper: Tensor, span: int) -> Tensor:
    """Turn ``R (in, in)``, in place, into ``−R_·J R_JJ⁻¹`` above its diagonal blocks of ``span`` columns, else 0.

    Returns the blocks, as :class:`FeedbackFactor` has them.
    """
    roots = torch.empty(len(upper) // span, span, span)
    for start in range(0, len(upper), span):
        here = slice(start, start + span)
        own = upper[here, here].double()
        roots[start // span] = own / own.diagonal().square().mean().sqrt()
        upper[:start, here] = -torch.linalg.solve_triangular(own, upper[:start, here].double(), upper=True, left=False)
        upper[start:, here] = 0.0
    return roots


def _whole_spans(block: int, span: int) -> int:
    return max(block // span, 1) * span


def _restore(codes: Tensor, order: Tensor, span: int) -> Tensor:
    """Codes from the order of rounding back to the order of the layer's columns."""
    restored = torch.empty_like(codes)
    restored[:, order[::span] // span] = codes
    return restored

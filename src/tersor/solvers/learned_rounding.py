"""Rounding learned by gradient descent on a layer's own output error: AdaRound and AdaQuant.

Both minimise ``tr(E H Eᵀ)`` over all weights of a row at once. AdaRound (arXiv:2004.10568) lets each weight choose
between the two grid values around it, softly at first: a rectified sigmoid, which a growing penalty drives to 0 or 1.
AdaQuant (arXiv:2006.10518) adds a continuous perturbation to the weights, rounds their sum, and takes the gradient of
rounding to be 1; codes may go as far as they like, and scales are fitted along the way.

The papers take random batches of layer inputs. With the Gram matrix the gradient ``−2 E H`` is exact, so there is
nothing random here, and a few hundred steps do what takes thousands there.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tersor.contracts import Encoded, Gram, LeafCodec, ScalarGrid, Side, Solver
from tersor.errors import BadInput
from tersor.solvers.feedback import ErrorFeedback, FeedbackFactor
from tersor.solvers.nearest import Nearest

_BETAS = 0.9, 0.95
"""Of Adam. Slopes are exact, and those of the first steps are soon out of date."""
_REACH = 1.2
"""The sigmoid is stretched to −0.1 … 1.1 and cut at 0 and 1, so that it gets there."""
_QUIET = 0.2
"""Share of the steps before the penalty of undecided weights sets in."""
_EXPONENTS = 20.0, 2.0
"""Of the penalty ``1 − |2 h − 1|^β``, at its start and at the end."""


@dataclass(frozen=True)
class LearnedFactor:
    """``start``: what the starting solver needs; ``feedback``: what error feedback does; ``gram (in, in)`` float32."""

    start: Any
    feedback: FeedbackFactor
    gram: Tensor


@dataclass(frozen=True)
class _Learned(Solver):
    """From ``start``, in ``iterations`` steps; a row whose error ``D`` does not become less stays as it was.

    ``mixed``: slopes come from products in bfloat16, which is several times as fast where the processor has them. That
    no row becomes worse is checked in float32.
    Codecs whose rounding is not nearest of a sorted list (vectors), or a long search, are left to error feedback.
    """

    iterations: int = 100
    rate: float = 0.2
    start: Solver = field(default_factory=Nearest)
    mixed: bool = False

    def __post_init__(self) -> None:
        if self.iterations < 0 or not self.rate > 0:
            raise BadInput(
                f"Learned rounding cannot take {self.iterations} steps at a rate of {self.rate:g}; give 0 or more "
                f"steps and a rate above 0."
            )

    def prepare(self, gram: Gram | None, span: int = 1) -> LearnedFactor:
        assert gram is not None
        return LearnedFactor(self.start.prepare(gram, span), ErrorFeedback().prepare(gram, span), gram.matrix)

    def solve(self, weight: Tensor, codec: LeafCodec, prepared: LearnedFactor) -> Encoded:
        if codec.costly or codec.span > 1:
            return ErrorFeedback().solve(weight, codec, prepared.feedback)
        first = self.start.solve(weight, codec, prepared.start)
        grid = codec.grid(first.side, weight.shape[1])
        if grid is None:
            return ErrorFeedback().solve(weight, codec, prepared.feedback)
        if not len(weight) or grid.levels < 2:
            return first
        found = self.learn(weight, codec, first, grid, prepared.gram)
        found = Encoded(found.codes, codec.refit(weight, found, prepared.gram))
        return better(weight, codec, first, found, prepared.gram)

    @abstractmethod
    def learn(self, weight: Tensor, codec: LeafCodec, first: Encoded, grid: ScalarGrid, gram: Tensor) -> Encoded:
        """Codes and side information for ``weight (rows, in)``, from ``first``, whose grid is ``grid``."""


@dataclass(frozen=True)
class LearnedRounding(_Learned):
    """AdaRound: each weight up or down. ``penalty``: weight of the regulariser, relative to the output error."""

    penalty: float = 1.0

    def learn(self, weight: Tensor, codec: LeafCodec, first: Encoded, grid: ScalarGrid, gram: Tensor) -> Encoded:
        lower, low, step = neighbours(weight, grid)
        part = ((weight - low) / torch.where(step == 0, 1.0, step)).clamp(0.0, 1.0)
        spread = (_REACH - 1) / 2
        free = torch.logit((part + spread) / _REACH)
        pull = step * (-2.0 * _REACH / _unit(step, gram))
        gram = gram.bfloat16() if self.mixed else gram
        # The error is base − cut · wide, where cut is the sigmoid between the values at which it is cut.
        base, wide = weight - low + spread * step, step * _REACH
        adam = Adam(free)
        soft, cut, error, slope, bend = (torch.empty_like(free) for _ in range(5))
        for index in range(self.iterations):
            torch.sigmoid(free, out=soft)
            torch.clamp(soft, spread / _REACH, (1 + spread) / _REACH, out=cut)
            torch.addcmul(base, cut, wide, value=-1.0, out=error)
            _product(error, gram, slope)
            slope.mul_(pull)
            self._penalise(slope, cut.mul(2 * _REACH).sub_(1 + 2 * spread), index)
            # The slope of the sigmoid; where it is cut it would not move again: as in the paper, the cut has none.
            slope.mul_(torch.addcmul(soft, soft, soft, value=-1.0, out=bend)).mul_(torch.eq(soft, cut, out=bend))
            adam.descend(free, slope, self.rate)
        chosen = (torch.sigmoid(free) * _REACH - spread) > 0.5
        return Encoded((lower + chosen).to(torch.int32), first.side)

    def _penalise(self, slope: Tensor, away: Tensor, index: int) -> None:
        """Add the penalty's slope at step ``index``, ``away`` being ``2 h − 1``; the exponent falls as a cosine."""
        done = (index / self.iterations - _QUIET) / (1 - _QUIET)
        if done >= 0:
            top, end = _EXPONENTS
            power = end + (top - end) * 0.5 * (1 + math.cos(done * math.pi))
            slope.addcmul_(away, away.abs().pow_(power - 2), value=-2 * power * self.penalty * _REACH)


@dataclass(frozen=True)
class LearnedPerturbation(_Learned):
    """AdaQuant: a perturbation of each weight, in steps of the grid; scales by least squares ``refits`` times.

    ``rate`` falls to zero linearly. The best codes of each row among all steps are kept, by losses in the precision of
    the slopes.
    """

    rate: float = 0.02
    refits: int = 4

    def learn(self, weight: Tensor, codec: LeafCodec, first: Encoded, grid: ScalarGrid, gram: Tensor) -> Encoded:
        columns = weight.shape[1]
        best, best_side, side = first.codes.clone(), first.side, first.side
        least = _losses(weight, codec, first, gram)
        _, _, step = neighbours(weight, grid)
        slant = step * (-2.0 / _unit(step, gram))
        coarse = gram.bfloat16() if self.mixed else gram
        moved = codec.values(first, columns)
        inside = (weight - moved).abs() <= 0.5 * step.abs()
        # Where the start is nearest rounding this is the weight itself, as in the paper.
        moved = torch.where(inside, weight, moved)
        adam = Adam(weight)
        pull, product = torch.empty_like(weight), torch.empty_like(weight)
        every = max(self.iterations // (self.refits + 1), 1)
        for index in range(self.iterations):
            codes, values = _rounded(moved, codec, side, grid)
            error = torch.sub(weight, values, out=values)
            _product(error, coarse, pull)
            loss = torch.mul(pull, error, out=product).sum(1, dtype=torch.float64)
            rows = (loss < least).nonzero()[:, 0]
            least[rows] = loss[rows]
            best[rows] = codes[rows].to(best.dtype)
            best_side = {name: kept.index_copy(0, rows, side[name][rows]) for name, kept in best_side.items()}
            adam.descend(moved, pull.mul_(slant), self.rate * (1 - index / self.iterations), step)
            if index % every == every - 1 and index + 1 < self.iterations:
                side = codec.refit(weight, Encoded(codes.to(torch.int32), side), gram)
                grid = codec.grid(side, columns) or grid
        return Encoded(best, best_side)


def _product(error: Tensor, gram: Tensor, out: Tensor) -> None:
    """``error (rows, in)`` times ``gram (in, in)``, in whatever ``gram`` is in, into ``out`` float32."""
    if gram.dtype == error.dtype:
        torch.mm(error, gram, out=out)
    else:
        out.copy_(error.to(gram.dtype) @ gram)


def _rounded(target: Tensor, codec: LeafCodec, side: Side, grid: ScalarGrid) -> tuple[Tensor, Tensor]:
    """What ``codec.round`` gives for all columns of ``target (rows, in)``; codes may be floats."""
    if grid.zero is None or grid.offset is not None:
        return codec.round(target, side, torch.arange(target.shape[1]))
    scale, zero = grid.scale[:, :, None], grid.zero[:, :, None]
    codes = (target.reshape(len(target), -1, grid.group) / scale).add_(zero).round_().clamp_(0, grid.levels - 1)
    return codes.flatten(1), (codes - zero).mul_(scale).flatten(1)


class Adam:
    """The optimizer of Kingma and Ba (arXiv:1412.6980), for one tensor."""

    def __init__(self, like: Tensor) -> None:
        self.mean, self.square, self.count = torch.zeros_like(like), torch.zeros_like(like), 0
        self._size = torch.empty_like(like)

    def descend(self, parameter: Tensor, slope: Tensor, rate: float, unit: Tensor | None = None) -> None:
        """One step of ``parameter`` along ``slope``, in place; in units of ``unit``, as ``slope`` is."""
        self.count += 1
        first, second = _BETAS
        self.mean.lerp_(slope, 1 - first)
        self.square.mul_(second).addcmul_(slope, slope, value=1 - second)
        root = (1 - second**self.count) ** 0.5
        torch.sqrt(self.square, out=self._size).add_(1e-8 * root)
        if unit is not None:
            self._size.div_(unit)
        parameter.addcdiv_(self.mean, self._size, value=-rate * root / (1 - first**self.count))


def neighbours(weight: Tensor, grid: ScalarGrid) -> tuple[Tensor, Tensor, Tensor]:
    """The grid values that each weight ``(rows, in)`` lies between; the outermost two where it lies beyond.

    Returns the first one's code int64, its value, and how far it is to that of the next code (below 0 where scales
    are), each ``(rows, in)``.
    """
    group = torch.arange(weight.shape[1]) // grid.group
    scale = grid.scale[:, group]
    if grid.zero is not None:
        zero = grid.zero[:, group]
        offset = torch.zeros(()) if grid.offset is None else grid.offset[:, group]
        lower = torch.floor((weight + offset) / scale + zero).clamp_(0, grid.levels - 2)
        return lower.long(), (lower - zero) * scale - offset, scale
    assert grid.table is not None
    shape = (len(weight), grid.table.shape[1] // grid.levels, -1)
    table = grid.table.reshape(-1, shape[1], grid.levels).expand(shape).contiguous()
    scaled = (weight / scale).reshape(shape).contiguous()
    index = (torch.searchsorted(table, scaled, right=True) - 1).clamp_(0, grid.levels - 2)
    low = table.gather(2, index)
    step = (table.gather(2, index + 1) - low).flatten(1)
    return index.flatten(1), low.flatten(1) * scale, step * scale


def better(weight: Tensor, codec: LeafCodec, first: Encoded, second: Encoded, gram: Tensor) -> Encoded:
    """Row by row, whichever of two has the smaller ``e H eᵀ``; the first of equals."""
    losses = [_losses(weight, codec, one, gram) for one in (first, second)]
    return _chosen((losses[1] < losses[0])[:, None], second, first)


def _chosen(keep: Tensor, one: Encoded, other: Encoded) -> Encoded:
    codes = torch.where(keep, one.codes, other.codes)
    return Encoded(codes, {name: torch.where(keep, one.side[name], old) for name, old in other.side.items()})


def _losses(weight: Tensor, codec: LeafCodec, encoded: Encoded, gram: Tensor) -> Tensor:
    error = weight - codec.values(encoded, weight.shape[1])
    return ((error @ gram) * error).double().sum(1)


def _unit(step: Tensor, gram: Tensor) -> Tensor:
    """What one step costs a row on average, ``(rows, 1)``: makes slopes comparable between layers and rows."""
    return (step.square() * gram.diagonal()).mean(1, keepdim=True).clamp(min=1e-38)

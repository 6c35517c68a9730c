"""Half-quadratic splitting without calibration: HQQ (Badri and Shaji, 2023, no arXiv number).

Minimises ``Σ |W − Ŵ|^p`` with ``p < 1``, which cares little about a few large errors, over the scale and zero of each
group. An auxiliary ``Z ≈ W − Ŵ`` takes the large errors (a shrinkage, in closed form); scale and zero are then least
squares on ``W − Z``; the weight of the coupling grows from round to round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tersor import kernels
from tersor.contracts import Encoded, Gram, LeafCodec, ScalarGrid, Solver
from tersor.errors import BadInput


@dataclass(frozen=True)
class HalfQuadratic(Solver):
    """For codecs with a uniform grid; ``power`` is ``p``. Rows keep the codec's own scales where these are better.

    Differs from the published code in three ways: errors are measured in units of the group's scale, so that
    ``coupling`` means the same for every layer; the scale is fitted too; a stored zero stays a whole number.
    """

    iterations: int = 20
    power: float = 0.7
    coupling: float = 10.0
    growth: float = 1.05
    needs_gram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.power <= 1 or self.coupling <= 0 or self.growth < 1 or self.iterations < 0:
            raise BadInput(
                f"{self} cannot be used: the power lies above 0 and at most at 1, the coupling above 0, the growth is "
                f"at least 1 and there are no negative iterations."
            )

    def prepare(self, gram: Gram | None, span: int = 1) -> None:
        return None

    def solve(self, weight: Tensor, codec: LeafCodec, prepared: Any) -> Encoded:
        columns = weight.shape[1]
        numbers = torch.arange(columns)
        side = codec.prepare(weight, None)
        grid = codec.grid(side, columns)
        if grid is None or grid.zero is None or grid.offset is not None:
            raise BadInput(f"The half-quadratic solver needs a uniform grid, which {codec} has not; use intN codecs.")
        start = Encoded(codec.round(weight, side, numbers)[0], side)
        whole = "zero" in side
        scale, zero = self._split(weight, grid, numbers, whole=whole)
        codes, values = kernels.nearest(weight, ScalarGrid(scale, zero, None, grid.levels, grid.group), numbers)
        target = weight - self._large(weight - values, scale, grid.group, self.iterations)
        moved = {**side, "zero": zero} if whole else dict(side)
        # The codec's own least squares, in the plain metric, puts the scales on the grid of what is stored.
        moved = dict(codec.refit(target, Encoded(codes, moved), torch.eye(columns)))
        final = Encoded(codec.round(weight, moved, numbers)[0], moved)
        better = self._cost(weight, codec, final) < self._cost(weight, codec, start)
        keep = better[:, None]
        return Encoded(
            torch.where(keep, final.codes, start.codes),
            {name: torch.where(keep, moved[name], old) for name, old in side.items()},
        )

    def _split(self, weight: Tensor, grid: ScalarGrid, numbers: Tensor, *, whole: bool) -> tuple[Tensor, Tensor]:
        """Scale and zero ``(rows, groups)`` after all rounds, not yet on the grid of what can be stored."""
        assert grid.zero is not None
        scale, zero = grid.scale, grid.zero
        shape = (len(weight), scale.shape[1], -1) if len(weight) else (0, scale.shape[1], grid.group)
        for index in range(self.iterations):
            codes, values = kernels.nearest(weight, ScalarGrid(scale, zero, None, grid.levels, grid.group), numbers)
            target = (weight - self._large(weight - values, scale, grid.group, index)).reshape(shape)
            steps = codes.to(torch.float32).reshape(shape)
            if whole:
                zero = torch.round(steps.mean(2) - target.mean(2) / scale).clamp(0, grid.levels - 1)
            unit = steps - zero[:, :, None]
            fitted = (unit * target).sum(2) / unit.square().sum(2).clamp(min=1e-30)
            scale = torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, scale)
        return scale, zero

    def _large(self, error: Tensor, scale: Tensor, group: int, index: int) -> Tensor:
        """The part of ``error (rows, in)`` that the auxiliary variable takes in round ``index``."""
        wide = scale.repeat_interleave(group, 1)
        size = (error / wide).abs()
        threshold = size.clamp(min=1e-8).pow(self.power - 1) / (self.coupling * self.growth**index)
        return error.sign() * (size - threshold).clamp(min=0) * wide

    def _cost(self, weight: Tensor, codec: LeafCodec, encoded: Encoded) -> Tensor:
        return (weight - codec.values(encoded, weight.shape[1])).abs().double().pow(self.power).sum(1)

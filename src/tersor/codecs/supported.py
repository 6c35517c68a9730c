"""A scalar codec's values where a fixed support has them, zero elsewhere: what lets solvers work on sparse weights.

It exists while a layer is encoded and has no text: the codec around it stores the support
(:mod:`tersor.codecs.semi_structured`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tersor.contracts import Encoded, LeafCodec, Part, Shape, Side


@dataclass(frozen=True)
class Supported(LeafCodec):
    """``kept`` weights of every ``group`` columns in ``inner``, which sees them side by side.

    ``at (rows, in · kept / group)``: their column numbers, ascending.
    ``inner`` rounds single columns, and all weights kept of a group have the same side information: its segments are
    whole numbers of them. Rounding a dropped column gives 0, so that a solver hands its whole error on.
    """

    inner: LeafCodec
    kept: int
    group: int
    at: Tensor = field(compare=False, repr=False)

    @staticmethod
    def fits(inner: LeafCodec, kept: int, width: int) -> bool:
        """Whether ``inner``, for rows of ``width`` kept weights, is such a codec."""
        return inner.span == 1 and inner.sampled and inner.tile(1 << 20) == 1 and inner.segment(width) % kept == 0

    def tile(self, rows: int) -> int:
        return rows  # the support is that of all these rows

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        return self.inner.parts((shape[0], self.at.shape[1]))

    def prepare(self, weight: Tensor, importance: Tensor | None = None) -> Side:
        if importance is not None:
            importance = importance.reshape(-1, self.group).mean(1).repeat_interleave(self.kept)
        return self.inner.prepare(torch.gather(weight, 1, self.at), importance)

    def round(self, target: Tensor, side: Side, columns: Tensor) -> tuple[Tensor, Tensor]:
        codes, values = self.inner.round(target, side, columns // self.group * self.kept)
        return codes, values * self.support(columns)

    def support(self, columns: Tensor) -> Tensor:
        """``(rows, len(columns))`` float32: 1 where a weight is kept."""
        first = columns // self.group * self.kept
        inside = torch.stack([self.at[:, first + index] == columns for index in range(self.kept)])
        return inside.any(0).to(torch.float32)

    def values(self, encoded: Encoded, in_features: int) -> Tensor:
        values = self.inner.values(self._compact(encoded), self.at.shape[1])
        return torch.zeros(len(values), in_features).scatter_(1, self.at, values)

    def _compact(self, encoded: Encoded) -> Encoded:
        return Encoded(torch.gather(encoded.codes, 1, self.at), encoded.side)

    def pack(self, encoded: Encoded, shape: Shape) -> dict[str, Tensor]:
        return self.inner.pack(self._compact(encoded), (shape[0], self.at.shape[1]))

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Encoded:
        compact = self.inner.unpack(tensors, (shape[0], self.at.shape[1]))
        codes = torch.zeros(shape, dtype=compact.codes.dtype).scatter_(1, self.at, compact.codes)
        return Encoded(codes, compact.side)

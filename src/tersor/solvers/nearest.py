"""Nearest representable value, after the codec's own clip or table search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersor.contracts import Encoded, Gram, LeafCodec, Solver


@dataclass(frozen=True)
class Nearest(Solver):
    """Round every weight by itself; side information is fitted with the Gram matrix's diagonal where there is one."""

    needs_gram: ClassVar[bool] = False

    def solve(self, weight: Tensor, codec: LeafCodec, prepared: Gram | None) -> Encoded:
        return nearest(weight, codec, None if prepared is None else prepared.matrix.diagonal())


def nearest(weight: Tensor, codec: LeafCodec, importance: Tensor | None) -> Encoded:
    """The nearest codes for ``weight (out, in)`` with side information fitted under ``importance (in,)``."""
    side = codec.prepare(weight, None if importance is None else importance.contiguous())
    codes, _ = codec.round(weight, side, torch.arange(weight.shape[1]))
    return Encoded(codes, side)

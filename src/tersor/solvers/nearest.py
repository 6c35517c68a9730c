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
        importance = None if prepared is None else prepared.matrix.diagonal().contiguous()
        side = codec.prepare(weight, importance)
        codes, _ = codec.round(weight, side, torch.arange(weight.shape[1]))
        return Encoded(codes, side)

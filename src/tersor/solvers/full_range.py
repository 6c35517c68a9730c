"""Nearest rounding on scales that reach the largest weight of each group: what papers call round to nearest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from tersor.contracts import Encoded, Gram, LeafCodec, Solver
from tersor.errors import BadInput


@runtime_checkable
class StoresScales(Protocol):
    """A codec that says which scales it can store, and what else it stores for them."""

    def storable(self, scale: Tensor) -> Mapping[str, Tensor]:
        """Side information with the nearest scales to ``scale (rows, groups)`` that can be stored."""
        ...


@dataclass(frozen=True)
class FullRange(Solver):
    """Clips nothing. For codecs with a scale for each group, whether their grid is even or a table."""

    needs_gram: ClassVar[bool] = False

    def prepare(self, gram: Gram | None, span: int = 1) -> None:
        return None

    def solve(self, weight: Tensor, codec: LeafCodec, prepared: Any) -> Encoded:
        rows, columns = weight.shape
        numbers = torch.arange(columns)
        side = dict(codec.prepare(weight, None))
        grid = codec.grid(side, columns)
        if grid is None or side.get("scale") is None or side["scale"].shape != grid.scale.shape:
            raise BadInput(f"Rounding over the full range needs a scale for each group, which {codec} has not.")
        groups = weight.reshape(rows, grid.scale.shape[1], grid.group)
        if "zero" in side:
            low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
            wanted = (high - low) / (grid.levels - 1)
            side["zero"] = torch.round(-low / wanted.clamp(min=1e-30)).clamp(0, grid.levels - 1)
        elif grid.table is not None:
            wanted = groups.abs().amax(2) / grid.table.abs().amax()
        else:
            wanted = groups.abs().amax(2) / ((grid.levels - 1) / 2)
        side["scale"] = torch.where(wanted > 0, wanted, side["scale"])
        if isinstance(codec, StoresScales):
            side |= codec.storable(side["scale"])
        # The codec's own rounding of scales, by way of what it would store.
        codes, _ = codec.round(weight, side, numbers)
        shape = (rows, columns)
        side = dict(codec.unpack(codec.pack(Encoded(codes, side), shape), shape).side)
        return Encoded(codec.round(weight, side, numbers)[0], side)

"""Trellis-coded quantization at a fixed step: what solvers drive, before its numbers are entropy coded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.codecs import ectcq_tables as tables
from tersor.contracts import Encoded, LeafCodec, Part, Shape, Side
from tersor.kernels import coded
from tersor.kernels.reference_rans import REACH

_FARTHEST = 65000.0
"""Grid numbers are codable below 65536."""
_MOST_LOW = 10
_TRAINING_COLUMNS, _TRAINING_ROWS, _ROUNDS = 64, 2048, 3
ROW_LEVELS, STEPS = 16, 4
"""Row factors there are, and how many sizes of steps an octave has."""
COLUMN_ZERO = 20
"""The code of columns with the median step; codes go to 31, so steps from 2^-5 to 2^2.75 of it."""

ROW_TABLE = torch.tensor([2.0 ** (-i / STEPS) for i in range(ROW_LEVELS)], dtype=torch.float32)
COLUMN_TABLE = torch.tensor([2.0 ** ((i - COLUMN_ZERO) / STEPS) for i in range(32)], dtype=torch.float32)


@dataclass(frozen=True)
class Steps:
    """What decoding needs besides numbers and frequencies.

    ``row (out, 1)``, ``column (in,)`` uint8: of a column, the lower 5 bits are the step, the upper 3 the class.
    ``scale (1,)`` float32. ``shrink (classes, 5)`` float32. ``low (classes,)`` int64.
    """

    row: Tensor
    column: Tensor
    scale: Tensor
    shrink: Tensor
    low: Tensor

    @property
    def classes(self) -> Tensor:
        return (self.column >> 5).long()

    def step(self, columns: Tensor | slice = slice(None)) -> Tensor:
        """The step of each weight, ``(out, columns)``."""
        device = self.row.device
        row = self.scale * ROW_TABLE.to(device)[self.row.long()]
        return row * COLUMN_TABLE.to(device)[(self.column[columns] & 31).long()]

    def values(self, codes: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        """Float32 weights of grid numbers ``(out, columns)``."""
        size = codes.abs().clamp(max=tables.SHRINKS).long()
        number = codes.to(torch.float32) - codes.sign() * self.shrink[self.classes[columns], size]
        return self.step(columns) * number


@dataclass(frozen=True)
class TrellisGrid(LeafCodec):
    """Grid numbers along columns, each column one path of a trellis through all rows.

    ``octaves``: log2 of the step, above that for a rate of about 2 bits. ``price``: what a bit costs in squared steps.
    """

    states: int
    octaves: float
    classes: int
    price: float

    def tile(self, rows: int) -> int:
        return max(rows, 1)

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        return (
            Part("codes", torch.int32, shape),
            Part("row", torch.uint8, (rows, 1)),
            Part("column", torch.uint8, (columns,), shared=True),
            Part("scale", torch.float32, (1,), shared=True),
            Part("shrink", torch.float32, (self.classes, tables.SHRINKS + 1), shared=True),
            Part("low", torch.int64, (self.classes,), shared=True),
        )

    def prepare(self, weight: Tensor, importance: Tensor | None = None) -> Side:
        """Steps and prices. Columns get steps like ``1 / sqrt(importance)`` (arXiv:2603.04956), rows like the root of
        their root mean square: halfway between equal steps, which is best for the sum of errors but makes the
        numbers of unlike rows share a table, and steps like the root mean square.
        """
        spread = weight.square().mean(1, keepdim=True).sqrt() if weight.shape[1] else torch.zeros(len(weight), 1)
        top = float(spread.max()) if len(spread) else 0.0
        wanted = -0.5 * torch.log2(spread / max(top, 1e-30) + 1e-30)
        row = torch.round(wanted * STEPS).clamp(0, ROW_LEVELS - 1).to(torch.uint8)
        weigh = torch.ones(weight.shape[1]) if importance is None else importance.float()
        weigh = weigh.clamp(min=max(1e-9 * float(weigh.mean()), 1e-30))
        octave = -0.5 * torch.log2(weigh)
        octave = octave - octave.median()
        column = torch.round(octave * STEPS + COLUMN_ZERO).clamp(0, 31).to(torch.uint8)
        unit = Steps(row, column, torch.ones(1), torch.zeros(1, 5), torch.zeros(1))
        level = torch.log2((weight / unit.step()).square().mean(0).sqrt() + 1e-30) if len(weight) else octave * 0
        middle = float(level.clamp(min=float(level.max()) - 12).mean())
        scale = torch.tensor([2.0 ** max(min(middle + self.octaves - 0.95, 60.0), -60.0)], dtype=torch.float32)
        kind, centre = tables.classify(level.clamp(min=float(level.max()) - 14), self.classes)
        spreads = 2.0 ** (centre - torch.log2(scale))
        low = torch.ceil(torch.log2((2.5 * spreads / REACH).clamp(min=1e-9))).clamp(0, _MOST_LOW).long()
        fine = COLUMN_TABLE[column.long()].log2() - octave  # log2 of the step that a column has over what it wants
        row_step = ROW_TABLE[row.long()]
        side = {
            "row": row,
            "column": column + (kind << 5).to(torch.uint8),
            "scale": scale,
            "shrink": torch.zeros(self.classes, 5),
            "low": low,
            "spread": spreads,
            "price": tables.gaussian_prices(spreads, low),
            "price_row": (self.price * row_step.square().mean() / row_step.square()).flatten(),
            "price_column": (2.0 ** (-2 * fine)).clamp(0.25, 1000.0),
        }
        return self._trained(side, weight)

    def _trained(self, side: dict[str, Tensor], weight: Tensor) -> Side:
        """``side`` with prices and shrinkages that agree with the numbers they lead to."""
        rows, columns = weight.shape
        if not rows or not columns:
            return side
        some = torch.arange(0, columns, max(columns // _TRAINING_COLUMNS, 1))
        few = torch.arange(0, rows, max(rows // _TRAINING_ROWS, 1))
        part = {**side, "row": side["row"][few], "price_row": side["price_row"][few]}
        target = weight[few][:, some]
        part |= self._fitting(part, target, some)
        for _ in range(_ROUNDS):
            codes, _ = self.round(target, part, some)
            part |= self.agreeing(part, codes, target, some)
        return {**side, **{name: part[name] for name in ("price", "shrink", "low")}}

    def _fitting(self, side: Side, target: Tensor, columns: Tensor) -> dict[str, Tensor]:
        """Raw bits of each class, and prices: few escapes against a table that is fine enough."""
        steps = _steps(side)
        kind = steps.classes[columns]
        codes = 2 * torch.round(target / steps.step(columns) / 2).nan_to_num(0.0).clamp(-32000, 32000).long()
        choices = torch.arange(_MOST_LOW + 1)
        found = [tables.count(codes, kind, low.expand(self.classes))[:, 0] for low in choices]
        costs = torch.stack([tables.costs(counts, low) for counts, low in zip(found, choices, strict=True)])
        low = torch.where(torch.stack(found).sum((0, 2)) > 0, costs.argmin(0), side["low"])
        return {"low": low, "price": tables.gaussian_prices(side["spread"], low)}

    def agreeing(self, side: Side, codes: Tensor, target: Tensor, columns: Tensor | slice) -> dict[str, Tensor]:
        """Prices and shrinkages for numbers that came up."""
        steps = _steps(side)
        kind = steps.classes[columns]
        wanted = target / steps.step(columns)
        counts = tables.count(codes.long(), kind, steps.low)
        shrink = tables.shrinkage(codes.long(), wanted, kind, self.classes)
        return {"price": tables.prices(counts, steps.low), "shrink": shrink}

    def round(self, target: Tensor, side: Side, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The cheapest paths for some columns: error plus the price of bits, so not the nearest values."""
        steps = _steps(side)
        wanted = (target / steps.step(columns)).nan_to_num(0.0).clamp(-_FARTHEST, _FARTHEST)
        codes = coded.path(
            wanted.T,
            side["price_row"],
            side["price_column"][columns],
            steps.classes[columns],
            side["price"],
            side["shrink"],
            side["low"],
            self.states,
        ).T.contiguous()
        return codes, steps.values(codes, columns)

    def values(self, encoded: Encoded, in_features: int) -> Tensor:
        return _steps(encoded.side).values(encoded.codes)

    def refit(self, weight: Tensor, encoded: Encoded, gram: Tensor) -> Side:
        """The one scale, by least squares under ``tr(E H Eᵀ)``."""
        values = self.values(encoded, weight.shape[1])
        spread = values @ gram
        own, cross = float((spread * values).sum()), float((spread * weight).sum())
        if not own > 0 or not 0.5 < cross / own < 2:
            return encoded.side
        return {**encoded.side, "scale": encoded.side["scale"] * (cross / own)}

    def pack(self, encoded: Encoded, shape: Shape) -> dict[str, Tensor]:
        kept = {name: encoded.side[name] for name in ("row", "column", "scale", "shrink", "low")}
        return {"codes": encoded.codes, **kept}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Encoded:
        return Encoded(tensors["codes"], {name: tensor for name, tensor in tensors.items() if name != "codes"})


def _steps(side: Side) -> Steps:
    return Steps(side["row"], side["column"], side["scale"], side["shrink"], side["low"])

"""Trellis-coded quantization at a fixed step: what solvers drive, before its numbers are entropy coded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tersor.codecs import ectcq_contexts as tables
from tersor.contracts import Encoded, LeafCodec, Part, Shape, Side
from tersor.kernels import coded

_FARTHEST = 65000.0
"""Grid numbers are codable below 65536."""
_TRAINING_COLUMNS, _TRAINING_ROWS, _ROUNDS = 64, 2048, 3
STEPS, LEVELS = 4, 8
"""How many sizes of steps an octave has, and how many levels."""
COLUMN_ZERO = 20
"""The code of columns with the median step; codes go to 31, so steps from 2^-5 to 2^2.75 of it."""
ROW_LEVELS, COLUMN_LEVELS = 32, 64
_OUTSIDE = 0.003
"""The share of weights on either side that share the first and the last context with the nearest."""
_TABLE_BITS = 88
_GAIN = 0.6931
"""Bits a weight that an entropy coder loses to a wrong spread, by the square of that error in octaves."""

COLUMN_TABLE = torch.tensor([2.0 ** ((i - COLUMN_ZERO) / STEPS) for i in range(32)], dtype=torch.float32)


@dataclass(frozen=True, eq=False)
class Steps:
    """What decoding needs besides numbers and frequencies.

    ``row (out, 1)`` uint8, ``column (in,)`` uint8, the step's code, ``level (in,)`` int32, ``shift (1,)`` int64: the
    context of a number is ``(row + level) >> shift``, the first or last beyond these. ``scale (1,)`` float32.
    ``shrink (contexts, 5)`` float32. ``low (contexts,)`` int64.
    """

    row: Tensor
    column: Tensor
    level: Tensor
    shift: Tensor
    scale: Tensor
    shrink: Tensor
    low: Tensor

    def contexts(self, columns: Tensor | slice = slice(None)) -> Tensor:
        """The context of each weight, uint8 ``(out, columns)``."""
        level = self.row.to(torch.int32) + self.level[columns].to(torch.int32)
        return (level >> int(self.shift)).clamp_(0, len(self.low) - 1).to(torch.uint8)

    def step(self, columns: Tensor | slice = slice(None)) -> Tensor:
        """The step of each column."""
        return self.scale * COLUMN_TABLE.to(self.row.device)[self.column[columns].long()]

    def values(self, codes: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        """Float32 weights of grid numbers ``(out, columns)``."""
        step, kinds = self.step(columns), self.contexts(columns)
        found = [
            step * (some.to(torch.float32) - some.sign() * self.shrink[kind.long(), _size(some)])
            for some, kind in zip(torch.split(codes, 256), torch.split(kinds, 256), strict=True)
        ]
        return torch.cat(found) if found else codes.to(torch.float32)


@dataclass(frozen=True, eq=False)
class Learned:
    """What the numbers of one encoding say for the next: the levels of columns, and symbols' prices."""

    spread: Tensor
    """Of each column, log2 of the root mean square of its numbers over its rows' own."""


@dataclass(frozen=True)
class TrellisGrid(LeafCodec):
    """Grid numbers along columns, each column one path of a trellis through all rows.

    ``octaves``: log2 of the step, above that for a rate of about 2 bits. ``contexts``: at most so many have tables.
    ``price``: what a bit costs in squared steps. ``learned``: from an earlier encoding of the same weights.
    ``prices``: of numbers, by context, to use instead of those that agree with the numbers they lead to.
    """

    states: int
    octaves: float
    contexts: int
    price: float
    learned: Learned | None = field(default=None, compare=False)
    prices: Tensor | None = field(default=None, compare=False, repr=False)

    def tile(self, rows: int) -> int:
        return max(rows, 1)

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        return (
            Part("codes", torch.int32, shape),
            Part("row", torch.uint8, (rows, 1)),
            Part("column", torch.uint8, (columns,), shared=True),
            Part("level", torch.int32, (columns,), shared=True),
            Part("shift", torch.int64, (1,), shared=True),
            Part("scale", torch.float32, (1,), shared=True),
            Part("shrink", torch.float32, (self.contexts, tables.SHRINKS + 1), shared=True),
            Part("low", torch.int64, (self.contexts,), shared=True),
        )

    def prepare(self, weight: Tensor, importance: Tensor | None = None) -> Side:
        """Steps, contexts and prices. Columns get steps like ``1 / sqrt(importance)`` (arXiv:2603.04956); rows have the
        same, which is best for the sum of errors, and contexts of their own.
        """
        columns = weight.shape[1]
        weigh = torch.ones(columns) if importance is None else importance.float()
        weigh = weigh.clamp(min=max(1e-9 * float(weigh.mean()), 1e-30))
        octave = -0.5 * torch.log2(weigh)
        octave = octave - octave.median()
        column = torch.round(octave * STEPS + COLUMN_ZERO).clamp(0, 31).to(torch.uint8)
        step = COLUMN_TABLE[column.long()]
        row, height = _row_levels(weight / step)
        spread = _log_spread(weight / step / torch.exp2(height)) if len(weight) else torch.zeros(columns)
        middle = float((spread + height.mean()).clamp(min=float(spread.max()) - 12).mean()) if len(weight) else 0.0
        scale = torch.tensor([2.0 ** max(min(middle + self.octaves - 0.95, 60.0), -60.0)], dtype=torch.float32)
        if self.learned is not None:
            spread = self.learned.spread
        level = _column_levels(spread, column, len(weight))
        level, shift, width = _cut(row, level, self.contexts)
        # Numbers of a context spread as its levels say; it is where the prices start.
        centre = (torch.arange(self.contexts) + 0.5) * width
        inner = (row.float().mean() + level.float().mean() + 0.5) if len(weight) else torch.zeros(())
        start = (
            torch.exp2((centre - inner) / LEVELS + middle - torch.log2(scale))
            if shift < 15
            else torch.exp2(torch.full((self.contexts,), middle) - torch.log2(scale))
        )
        fine = torch.log2(step) - octave  # log2 of the step that a column has over what it wants
        side = {
            "row": row,
            "column": column,
            "level": level,
            "shift": torch.tensor([shift]),
            "scale": scale,
            "shrink": torch.zeros(self.contexts, tables.SHRINKS + 1),
            "low": tables.gaussian(start).low,
            "price": tables.gaussian(start).prices(),
            "price_column": self.price * torch.exp2(-2 * fine).clamp(0.25, 1000.0),
        }
        trained = dict(self._trained(side, weight, start))
        if self.prices is not None and self.prices.shape[1:] == trained["price"].shape[1:]:
            # Contexts that no number is in are left out of the tables that prices come from.
            trained["price"] = torch.cat([self.prices, trained["price"][len(self.prices) :]])
        return trained

    def _trained(self, side: dict[str, Tensor], weight: Tensor, start: Tensor) -> Side:
        """``side`` with prices and shrinkages that agree with the numbers they lead to."""
        rows, columns = weight.shape
        if not rows or not columns:
            return side
        some = torch.arange(0, columns, max(columns // _TRAINING_COLUMNS, 1))
        few = torch.arange(0, rows, max(rows // _TRAINING_ROWS, 1))
        part = {**side, "row": side["row"][few]}
        target = weight[few][:, some]
        part |= self._fitting(part, target, some)
        for _ in range(_ROUNDS):
            codes, _ = self.round(target, part, some)
            part |= self.agreeing(part, codes, target, some)
        return {**side, **{name: part[name] for name in ("price", "shrink", "low")}}

    def _fitting(self, side: Side, target: Tensor, columns: Tensor) -> dict[str, Tensor]:
        """Raw bits of each context, and prices: those that plain rounding would be cheapest with."""
        steps = _steps(side)
        codes = 2 * torch.round(target / steps.step(columns) / 2).nan_to_num(0.0).clamp(-32000, 32000).long()
        kinds = steps.contexts(columns)
        most = int(codes.abs().max()) // 2
        lows = [low for low in range(tables.MOST_LOW + 1) if low == 0 or most > 15 << (low - 1)][-6:]
        fits, costs = [], []
        for low in lows:
            raw = torch.full((self.contexts,), low)
            counts = tables.count(codes, kinds, raw)
            fits.append(tables.fit(counts, raw))
            costs.append(fits[-1].costs(counts))
        seen = counts.sum((1, 2)) > 0
        chosen = torch.where(seen, torch.tensor(lows)[torch.stack(costs).argmin(0)], side["low"])
        found = tables.fit(tables.count(codes, kinds, chosen), chosen)
        # Plain rounding leaves odd numbers out; the fit of even ones says nothing wrong about them.
        return {"low": chosen, "price": torch.where(seen[:, None, None], found.prices(), side["price"])}

    def agreeing(self, side: Side, codes: Tensor, target: Tensor, columns: Tensor | slice) -> dict[str, Tensor]:
        """Prices and shrinkages for numbers that came up."""
        steps = _steps(side)
        kinds = steps.contexts(columns)
        counts = tables.count(codes, kinds, steps.low)
        shrink = tables.shrinkage(codes.long(), target / steps.step(columns), kinds, self.contexts)
        seen = (counts.sum((1, 2)) > 0)[:, None, None]
        return {"price": torch.where(seen, tables.fit(counts, steps.low).prices(), side["price"]), "shrink": shrink}

    def round(self, target: Tensor, side: Side, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The cheapest paths for some columns: error plus the price of bits, so not the nearest values."""
        steps = _steps(side)
        wanted = (target / steps.step(columns)).nan_to_num(0.0).clamp(-_FARTHEST, _FARTHEST)
        codes = coded.path(
            wanted.T,
            torch.ones(len(target)),
            side["price_column"][columns],
            steps.level[columns],
            side["price"],
            side["shrink"],
            side["low"],
            self.states,
            steps.row[:, 0],
            int(steps.shift),
        ).T.contiguous()
        return codes, steps.values(codes, columns)

    def round_all(
        self, target: Tensor, side: Side, columns: Tensor, reference: Tensor, mixing: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        steps = _steps(side)
        return coded.path_in_order(
            target,
            reference,
            mixing,
            steps.step(columns),
            _FARTHEST,
            side["price_column"][columns],
            steps.row[:, 0],
            steps.level[columns],
            int(steps.shift),
            side["price"],
            side["shrink"],
            side["low"],
            self.states,
        )

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
        names = [part.name for part in self.parts(shape) if part.name != "codes"]
        return {"codes": encoded.codes, **{name: encoded.side[name] for name in names}}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Encoded:
        return Encoded(tensors["codes"], {name: tensor for name, tensor in tensors.items() if name != "codes"})


def learn(tensors: Mapping[str, Tensor]) -> Learned:
    """What the packed tensors of a :class:`TrellisGrid` say about its columns."""
    height = (tensors["row"].float() - tensors["row"].float().mean()) / LEVELS
    return Learned(_log_spread(tensors["codes"] / torch.exp2(height)))


def _size(codes: Tensor) -> Tensor:
    return codes.abs().clamp(max=tables.SHRINKS).long()


def _log_spread(weight: Tensor) -> Tensor:
    """log2 of the root mean square of each column."""
    return torch.log2(weight.square().mean(0).sqrt() + 1e-30)


def _row_levels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of rows' root mean squares, uint8 ``(rows, 1)``, and their log2; all alike where bits for them are lost."""
    rows, columns = weight.shape
    if not rows or not columns:
        return torch.zeros(rows, 1, dtype=torch.uint8), torch.zeros(rows, 1)
    octave = torch.log2(weight.square().mean(1, keepdim=True).sqrt() + 1e-30)
    top = float(octave.max())
    bottom = float(octave.clamp(min=top - (ROW_LEVELS - 1) / LEVELS).min())
    code = torch.round((octave - bottom) * LEVELS).clamp(0, ROW_LEVELS - 1)
    near, exact = bottom + code / LEVELS, octave.clamp(min=bottom)
    # Of what unlike spreads cost, about 0.72 bits a row would be seen in rows that are all alike.
    gain = _GAIN * columns * float((exact - exact.mean()).square().sum()) - 0.72 * rows
    if gain < rows * _width(code):
        return torch.zeros(rows, 1, dtype=torch.uint8), near.mean().expand(rows, 1)
    return code.to(torch.uint8), near


def _column_levels(spread: Tensor, column: Tensor, rows: int) -> Tensor:
    """Levels of columns, int32 ``(in,)``; nothing but the step's code where more bits for them are lost."""
    top = float(spread.max()) if len(spread) else 0.0
    own = torch.round(spread.clamp(min=top - 14) * LEVELS)
    plain = -(LEVELS // STEPS) * column.float()
    beyond = own - plain
    middle = torch.round(beyond.mean()) if len(beyond) else torch.zeros(())
    exact = spread.clamp(min=top - 14) - plain / LEVELS  # rounded ones would be unlike where all are near a half
    gain = _GAIN * rows * float((exact - exact.mean()).square().sum()) - 0.72 * len(column)
    beyond = beyond.clamp(min=float(beyond.max()) - (COLUMN_LEVELS - 1)) if len(beyond) else beyond
    level = plain + middle if gain < len(column) * _width(beyond) else plain + beyond
    return level.to(torch.int32)


def _width(code: Tensor) -> int:
    return int(float(code.max()) - float(code.min())).bit_length() if code.numel() else 0


def _cut(row: Tensor, level: Tensor, contexts: int) -> tuple[Tensor, int, int]:
    """Levels of columns moved so that contexts begin at 0, what to shift by, and how many levels a context has."""
    if contexts == 1 or not len(row) or not len(level):
        return level * 0, 15, 1
    rows = torch.bincount(row.flatten().long(), minlength=ROW_LEVELS).double()
    base = int(level.min())
    columns = torch.bincount((level - base).long()).double()
    share = torch.zeros(len(columns) + ROW_LEVELS, dtype=torch.float64)
    for code, amount in enumerate(rows.tolist()):
        share[code : code + len(columns)] += amount * columns
    below = share.cumsum(0) / share.sum()
    low, high = int((below < _OUTSIDE).sum()), int((below < 1 - _OUTSIDE).sum())
    # A context costs the bits of its table; without it, weights take bits for a wrong spread.
    fits = [shift for shift in range(1, 16) if (high - low >> shift) + 1 <= contexts]
    loss = {
        shift: _TABLE_BITS * ((high - low >> shift) + 1) + float(share.sum()) * _GAIN * (2**shift / LEVELS) ** 2 / 12
        for shift in fits
    }
    shift = min(fits, key=lambda shift: loss[shift])
    return level - (base + low), shift, 1 << shift


def _steps(side: Side) -> Steps:
    return Steps(*(side[name] for name in ("row", "column", "level", "shift", "scale", "shrink", "low")))

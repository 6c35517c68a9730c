"""Scalar codes at a step that is given from outside, chosen by what they cost: what solvers drive inside ``coded``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersor.codecs import ectcq_tables as tables
from tersor.codecs.grouped import GroupedScalar
from tersor.codecs.scales import storable
from tersor.codecs.small_float import SmallFloat
from tersor.contracts import Encoded, LeafCodec, Part, Shape, Side
from tersor.kernels import coded
from tersor.kernels.reference_rans import ESCAPE, REACH, SYMBOLS

FARTHEST = 256
"""Indices lie from −256 to 256: codes have at most 8 bits."""
_MOST_LOW = 4
_TRAINING_COLUMNS, _TRAINING_ROWS, _ROUNDS = 64, 2048, 3
_NEAR = 2
"""Candidates of small floats are the nearest code, this many to both sides, and the code of zero."""
_CANDIDATES = 1 << 17
"""Weights whose candidates are compared at one time."""
_INNER = ("scale", "super", "zero")


def centre(codec: GroupedScalar, side: Side) -> Tensor:
    """The code that is index 0: that of the value 0, or the first above it. ``(rows, groups)`` int64."""
    if "zero" in side:
        return side["zero"].long()
    levels = codec.grid(side, 1).levels
    return torch.full(side["scale"].shape, levels // 2, dtype=torch.int64, device=side["scale"].device)


def spread(per_group: Tensor, columns: int) -> Tensor:
    """``(rows, groups)`` to ``(rows, columns)``."""
    return per_group.repeat_interleave(columns // per_group.shape[1], 1)


def inner_side(side: Side) -> dict[str, Tensor]:
    """What the inner codec knows of its side information."""
    return {name: side[name] for name in _INNER if name in side}


@dataclass(frozen=True)
class PricedGrid(LeafCodec):
    """The grid of ``inner`` with no step below ``2^octaves`` times the layer's root mean square.

    Codes minimise squared error plus ``price`` squared steps for each bit that they will take (rate-distortion
    optimised quantization, as in Sullivan and Wiegand, 1998), by tables that agree with the codes they lead to. Rows
    fall into ``classes`` with tables of their own.
    """

    inner: GroupedScalar
    octaves: float
    classes: int
    price: float

    costly: ClassVar[bool] = True

    def tile(self, rows: int) -> int:
        return max(rows, 1)

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        """Codes as indices; the rest as ``inner`` stores it."""
        kept = [part for part in self.inner.parts(shape) if part.name != "codes"]
        return (
            Part("index", torch.int32, shape),
            Part("kind", torch.int64, (shape[0],)),
            Part("low", torch.int64, (self.classes,), shared=True),
            *kept,
        )

    def prepare(self, weight: Tensor, importance: Tensor | None = None) -> Side:
        """Steps, classes of rows, and prices.

        Equal steps are best for the sum of errors, however unlike groups are. Where ``inner`` alone would take a larger
        step, so that its codes reach far enough, that one is taken. Where it has no code for zero, a group of small
        weights gets a step that suits them.
        """
        side = dict(self.inner.prepare(weight, importance))
        grid = self.inner.grid(side, weight.shape[1])
        gap = 1.0 if grid.table is None else float((grid.table[0, 1:] - grid.table[0, :-1]).min())
        level = float(weight.double().square().mean().sqrt()) if weight.numel() else 0.0
        common = 2.0**self.octaves * level
        wanted = torch.full_like(side["scale"], common / gap)
        if grid.zero is not None and "zero" not in side:
            sizes = weight.abs().reshape(*side["scale"].shape, -1).mean(2)
            wanted = torch.minimum(wanted, 2 * sizes)
        side |= storable(torch.maximum(side["scale"], wanted), self.inner.scales)
        weigh = torch.ones(weight.shape[1]) if importance is None else importance.float()
        weigh = weigh.clamp(min=max(1e-9 * float(weigh.mean()), 1e-30))
        side["price_row"] = (self.price * (common / side["scale"]).square()).clamp(max=1e4)
        side["price_column"] = (weigh.mean() / weigh).clamp(0.1, 30.0)
        ratio = weight.square().mean(1).sqrt() / side["scale"].mean(1) if weight.numel() else weight.sum(1)
        height = torch.log2(ratio.clamp(min=1e-9))
        if len(weight) and self.classes > 1:
            side["kind"] = tables.classify(height.clamp(min=float(height.max()) - 14), self.classes)[0]
        else:
            side["kind"] = torch.zeros(len(weight), dtype=torch.int64)
        side["low"] = torch.zeros(self.classes, dtype=torch.int64)
        side |= self._priced(torch.zeros(self.classes, 2, SYMBOLS), side["low"])
        return self._trained(side, weight) if weight.numel() else side

    def _trained(self, side: dict[str, Tensor], weight: Tensor) -> Side:
        """``side`` with raw bits and prices that agree with the codes they lead to."""
        rows, columns = weight.shape
        some = torch.arange(0, columns, max(columns // _TRAINING_COLUMNS, 1))
        few = torch.arange(0, rows, max(rows // _TRAINING_ROWS, 1))
        part = {**side, "kind": side["kind"][few], "price_row": side["price_row"][few]}
        part |= {name: tensor[few] for name, tensor in inner_side(side).items()}
        target = weight[few][:, some]
        codes, _ = self.inner.round(target, inner_side(part), some)
        index = self._index(codes, part, some)
        part["low"] = self._raw_bits(index, part["kind"])
        for _ in range(_ROUNDS):
            part |= self._agreeing(index, part)
            codes, _ = self.round(target, part, some)
            index = self._index(codes, part, some)
        part |= self._agreeing(index, part)
        return {**side, **{name: part[name] for name in ("low", "symbol", "price")}}

    def _raw_bits(self, index: Tensor, kind: Tensor) -> Tensor:
        """The number of raw bits with which each class takes least."""
        costs = []
        for low in torch.arange(_MOST_LOW + 1):
            counts = tables.count(2 * index.T, kind, low.expand(self.classes))[:, 0]
            costs.append(tables.costs(counts, low.expand(self.classes)))
        return torch.stack(costs).argmin(0)

    def _agreeing(self, index: Tensor, side: Side) -> dict[str, Tensor]:
        """Prices for indices that came up."""
        counts = tables.count(2 * index.T, side["kind"], side["low"])
        return self._priced(tables.prices(counts, side["low"]), side["low"])

    def _priced(self, symbols: Tensor, low: Tensor) -> dict[str, Tensor]:
        """Bits of symbols ``(classes, 2, 32)``, and of every index from −256 to 256, ``(classes, 513)``."""
        top = torch.arange(-FARTHEST, FARTHEST + 1)[None] >> low[:, None]
        place = torch.where(top.abs() > REACH, ESCAPE, top + REACH)
        return {"symbol": symbols, "price": torch.gather(symbols[:, 0], 1, place)}

    def _group(self, side: Side, columns: Tensor) -> Tensor:
        """The groups of columns; a group without a number is the whole row."""
        return columns // self.inner.group if self.inner.group else torch.zeros_like(columns)

    def _index(self, codes: Tensor, side: Side, columns: Tensor) -> Tensor:
        return codes.long() - centre(self.inner, side)[:, self._group(side, columns)]

    def round(self, target: Tensor, side: Side, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of least error plus price, so not always the nearest."""
        own = inner_side(side)
        group = self._group(side, columns)
        grid = self.inner.grid(own, len(columns))
        scale = side["scale"][:, group]
        middle = centre(self.inner, side)[:, group]
        if isinstance(self.inner, SmallFloat):
            codes = self._cheapest(target, side, columns)
        else:
            # Even grid numbers 2 · index of a trellis with one state: the compiled search does them.
            zero = middle if grid.zero is None else grid.zero[:, group]
            wanted = 2 * (target / scale + (zero - middle))
            low, high = -2 * middle, 2 * (grid.levels - 1 - middle)
            codes = self._searched(wanted.clamp(low, high), side, columns).clamp(low, high) // 2 + middle
        if grid.zero is not None:
            return codes.int(), (codes.to(torch.float32) - grid.zero[:, group]) * scale
        assert grid.table is not None
        return codes.int(), grid.table[0][codes] * scale

    def round_all(
        self, target: Tensor, side: Side, columns: Tensor, reference: Tensor, mixing: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        grid = self.inner.grid(inner_side(side), len(columns))
        if isinstance(self.inner, SmallFloat) or grid.zero is None:
            return None
        return coded.priced_in_order(
            target,
            reference,
            mixing,
            self._group(side, columns),
            side["scale"],
            centre(self.inner, side),
            grid.zero,
            grid.levels,
            4 * side["price_row"],
            side["price_column"][columns],
            side["kind"],
            side["symbol"],
            side["low"],
            side["price"],
        )

    def _searched(self, wanted: Tensor, side: Side, columns: Tensor) -> Tensor:
        """Grid numbers ``(rows, n)`` int64 for targets in half steps; 0 where that costs less than what was found."""
        group, kind = self._group(side, columns), side["kind"]
        shrink = torch.zeros(self.classes, tables.SHRINKS + 1)
        numbers = torch.empty(wanted.shape, dtype=torch.int64)
        for which in sorted(set(group.tolist())):
            here = group == which
            row, column = 4 * side["price_row"][:, which], side["price_column"][columns[here]]
            x = wanted[:, here]
            found = coded.path(x, column, row, kind, side["symbol"], shrink, side["low"], 1).long()
            place = (found >> 1) + (FARTHEST + kind * (2 * FARTHEST + 1))[:, None]
            saved = side["price"].flatten()[place] - side["price"][kind, FARTHEST][:, None]
            closer = x.square() - (x - found).square()
            numbers[:, here] = torch.where(closer < row[:, None] * column * saved, 0, found)
        return numbers

    def _cheapest(self, target: Tensor, side: Side, columns: Tensor) -> Tensor:
        """Codes ``(rows, n)`` int64 on a grid that is not even: of those near the nearest, and of zero's."""
        own = inner_side(side)
        group = self._group(side, columns)
        table = self.inner.grid(own, len(columns)).table
        assert table is not None
        offsets = torch.arange(-_NEAR, _NEAR + 1)
        step = max(_CANDIDATES // max(len(columns), 1), 1)
        pieces = []
        for start in range(0, max(len(target), 1), step):
            rows = slice(start, start + step)
            tile = {name: tensor[rows] for name, tensor in own.items()}
            nearest, _ = self.inner.round(target[rows], tile, columns)
            middle = centre(self.inner, tile)[:, group]
            tried = torch.cat([nearest.long()[:, :, None] + offsets, middle[:, :, None]], 2)
            tried = tried.clamp(0, table.shape[1] - 1)
            place = tried - middle[:, :, None] + (FARTHEST + side["kind"][rows] * (2 * FARTHEST + 1))[:, None, None]
            rate = side["price_row"][rows][:, group] * side["price_column"][columns]
            error = (target[rows] / tile["scale"][:, group])[:, :, None] - table[0][tried]
            cost = error.square() + rate[:, :, None] * side["price"].flatten()[place]
            pieces.append(torch.gather(tried, 2, cost.argmin(2, keepdim=True))[:, :, 0])
        return torch.cat(pieces)

    def values(self, encoded: Encoded, in_features: int) -> Tensor:
        return self.inner.values(Encoded(encoded.codes, inner_side(encoded.side)), in_features)

    def refit(self, weight: Tensor, encoded: Encoded, gram: Tensor) -> Side:
        inner = Encoded(encoded.codes, inner_side(encoded.side))
        return {**encoded.side, **self.inner.refit(weight, inner, gram)}

    def pack(self, encoded: Encoded, shape: Shape) -> dict[str, Tensor]:
        side = encoded.side
        kept = self.inner.pack(Encoded(encoded.codes, inner_side(side)), shape)
        index = encoded.codes - spread(centre(self.inner, side), shape[1]).int()
        del kept["codes"]
        return {"index": index, "kind": side["kind"], "low": side["low"], **kept}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Encoded:
        found = self.inner.unpack({**tensors, "codes": no_codes(self.inner, shape)}, shape)
        codes = tensors["index"] + spread(centre(self.inner, found.side), shape[1]).int()
        return Encoded(codes, {**found.side, "kind": tensors["kind"], "low": tensors["low"]})


def no_codes(codec: GroupedScalar, shape: Shape) -> Tensor:
    """Stored codes that are all 0, where only the rest of what a codec stores is wanted."""
    part = next(part for part in codec.parts(shape) if part.name == "codes")
    return torch.zeros(part.shape, dtype=part.dtype)

"""Entropy-coded trellis-coded quantization at an exact number of bytes.

The numbers of a trellis (Fischer and Wang, 1992) along the columns of a weight, steps like ``1 / R_jj`` of error
feedback (WaterSIC, arXiv:2603.04956), and an interleaved range coder (rANS, arXiv:1311.2540). The step is searched so
that the coded layer fits the bytes that its text names; what is left of them is zero.

>>> codec = EntropyCodedTrellis(2250)
>>> str(codec), codec.bits((512, 512)) // 8, 512 * 512 * 2.25 / 8
('ectcq2.25', 73728, 73728.0)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersor.codecs import ectcq_layout as layout
from tersor.codecs.ectcq_leaf import TrellisGrid, learn
from tersor.codecs.ectcq_water import level
from tersor.codecs.step_search import StepSearch
from tersor.codecs.text import Words, reads
from tersor.contracts import CompositeCodec, Encode, Gram, Part, Shape
from tersor.errors import BadInput, ShapeMismatch
from tersor.kernels import coded

_FEW_ROWS, _USUAL_ROWS = 128, 1024
_MOST_CONTEXTS = 48
_SEARCH_ROWS = 192
"""Rows on which the step is searched first, where a layer has more than twice as many."""
_BIT_PRICE = 0.36
"""What a bit costs in squared steps. On Gaussians, 0.3 to 0.45 lose least at all of 0.75, 2 and 4 bits."""
_LEAST_PLAIN = 900
"""Thousandths of a bit below which numbers without a trellis all but vanish once bits have a price."""
_WASTE, _ENOUGH = 0.0004, 0.0006
_FEW_ATTEMPTS, _ATTEMPTS, _MORE_ATTEMPTS, _LAST_ATTEMPTS = 3, 6, 14, 60
"""Steps tried while 0.04 % of the bytes, while 0.06 %, while 1 %, and while all of them stay empty."""


@dataclass(frozen=True)
class _Between:
    """Prices between two sets of them, one that leads to more bits than there are and one that leads to fewer.

    ``low``, ``high``: shares of the second between which the one is that just fits.
    """

    more: Tensor
    fewer: Tensor
    low: float = 0.0
    high: float = 1.0

    def prices(self) -> Tensor:
        return torch.lerp(self.more, self.fewer, (self.low + self.high) / 2)

    def after(self, fitted: bool) -> _Between:
        """With the half left that the share is in, by whether the last one fitted."""
        middle = (self.low + self.high) / 2
        return replace(self, high=middle) if fitted else replace(self, low=middle)


@dataclass(frozen=True)
class EntropyCodedTrellis(CompositeCodec):
    """``milli`` thousandths of a bit per weight for all that is stored; a trellis of ``states`` states, 1 for none.

    Layers of fewer than 128 rows, such as samples of a layer, pay for as much side information as if they were part of
    1024 rows, and get the rest on top: it would take most of their rate otherwise, and what is measured on a sample
    would say nothing of the whole.
    """

    milli: int
    states: int = 8

    def __post_init__(self) -> None:
        if not 500 <= self.milli <= 8000:
            raise BadInput(f"Codec ectcq{self.milli / 1000:g} does not exist: its rate is from 0.5 to 8 bits.")
        if self.states not in coded.TRELLISES:
            known = ", ".join(f"t{states}" for states in coded.TRELLISES)
            raise BadInput(f"There is no trellis of {self.states} states; write one of {known}.")
        if self.states == 1 and self.milli < _LEAST_PLAIN:
            raise BadInput(f"Codec {self} cannot be used: without a trellis rates begin at 0.9 bits; write t8.")

    def __str__(self) -> str:
        return f"ectcq{self.milli / 1000:g}" + ("" if self.states == 8 else f":t{self.states}")

    def tile(self, rows: int) -> int:
        return max(rows, 1)

    def contexts(self, shape: Shape) -> int:
        """How many tables of frequencies there are at most."""
        return max(min(shape[0] * shape[1] >> 11, _MOST_CONTEXTS), 1)

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        whole = self.milli * rows * columns // 8000
        least = layout.least(shape)
        nbytes = whole
        if rows < _FEW_ROWS:
            usual = layout.usual(shape)
            nbytes = max(whole - usual * rows // _USUAL_ROWS, 0) + usual
        if nbytes < least:
            raise ShapeMismatch(
                f"Codec {self} has {whole} bytes for a layer of {rows} x {columns}, and its side information alone "
                f"takes {least}; use a higher rate."
            )
        return (Part("stream", torch.uint8, (nbytes,), shared=True),)

    def encode(self, weight: Tensor, gram: Gram | None, encode: Encode) -> tuple[dict[str, Tensor], Tensor]:
        shape = (weight.shape[0], weight.shape[1])
        nbytes = self.parts(shape)[-1].nbytes
        aim, basis = level(weight, gram, self.milli / 1000, encode)
        leaf = TrellisGrid(self.states, 2.0 - self.milli / 1000, self.contexts(shape), _BIT_PRICE)
        count = max(weight.numel(), 1)
        search = StepSearch(leaf.octaves, 8.0 * nbytes / count)
        if shape[0] > 2 * _SEARCH_ROWS:
            few = aim[:: shape[0] // _SEARCH_ROWS].contiguous()
            for _ in range(4):
                tensors, _ = encode(few, replace(leaf, octaves=search.at), basis)
                if search.learn(_bits(tensors) / few.numel()):
                    break
            search.forget()
        best: tuple[int, Tensor, Tensor] | None = None
        leaf = replace(leaf, octaves=search.at)
        between: _Between | None = None
        prices: dict[bool, Tensor] = {}
        for attempt in range(_LAST_ATTEMPTS):
            tensors, values = encode(aim, leaf, basis)
            stored, used = self._stored(tensors, nbytes)
            if used <= nbytes and (best is None or used > best[0]):
                best = (used, stored, values)
            waste = 1.0 if best is None else 1 - best[0] / max(nbytes, 1)
            most = _FEW_ATTEMPTS if waste < _ENOUGH else _ATTEMPTS if waste < 0.01 else _MORE_ATTEMPTS
            if best and (waste <= _WASTE or attempt >= most):
                break
            if between is not None:
                between = between.after(used <= nbytes)
                leaf = replace(leaf, prices=between.prices())
                continue
            prices[used <= nbytes] = layout.sides(tensors).tables.prices()
            search.learn(8.0 * used / count)
            if attempt >= _MORE_ATTEMPTS:
                search.at += 0.02 * 1.2 ** (attempt - _MORE_ATTEMPTS)
            # Numbers that are far too few say nothing about how columns spread.
            learned = leaf.learned or (learn(tensors) if 0.7 * nbytes < used < 1.5 * nbytes else None)
            leaf = replace(leaf, octaves=search.at, learned=learned)
            jumped = search.stuck and len(prices) == 2 and prices[True].shape == prices[False].shape
            if jumped and search.above is not None:
                # Cheap numbers become common, and common ones cheap: at some step the rate jumps. Prices between those
                # of before and after the jump lead to rates between.
                between = _Between(prices[False], prices[True])
                leaf = replace(leaf, octaves=search.above[0], prices=between.prices())
        assert best is not None  # with ever larger steps every number becomes 0, which takes no bytes at all
        return {"stream": best[1]}, best[2]

    def _stored(self, tensors: Mapping[str, Tensor], nbytes: int) -> tuple[Tensor, int]:
        """The bytes of a layer, ``(nbytes,)`` uint8, and how many of them are taken; worthless when that is more."""
        codes = tensors["codes"]
        found = layout.sides(tensors)
        before = torch.frombuffer(bytearray(layout.write(found)), dtype=torch.uint8)
        room = max(nbytes - len(before), 0)
        stream, used = coded.encode_in(codes, found.contexts(), room)
        return torch.cat([before, stream])[:nbytes], len(before) + used

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        data = tensors["stream"].cpu()
        found, at = layout.read(data, shape)
        steps = found.steps
        weight = coded.weights_in(data[at:], shape, found.contexts(), self.states, steps.shrink, steps.step())
        return weight.to(tensors["stream"].device)

    def decode_rows(self, tensors: Mapping[str, Tensor], shape: Shape, rows: slice | Tensor) -> Tensor:
        """The whole layer is decoded for any of its rows: a stream can only be read from its beginning."""
        return self.decode(tensors, shape)[rows]


def _bits(tensors: Mapping[str, Tensor]) -> float:
    """Bits that the numbers take."""
    found = layout.sides(tensors)
    return float(found.costs.sum())


_FORM = "ectcq{0.5-8}[:t{1|4|8|16|32|64|128|256}]"


@reads(r"ectcq(\d(?:\.\d{1,3})?)", form=_FORM, heads=("ectcq2", "ectcq2.5", "ectcq3"))
def _read(words: Words) -> EntropyCodedTrellis:
    options = words.options or ("t8",)
    if len(options) > 1 or options[0][:1] != "t" or not options[0][1:].isdecimal() or words.arguments:
        raise words.refuse(f"write {_FORM}.")
    return EntropyCodedTrellis(round(float(words.head[1]) * 1000), int(options[0][1:]))

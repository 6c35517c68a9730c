"""A few weights kept as they are, the rest zero: the outliers of SqueezeLLM (arXiv:2306.07629, §4.2) and others.

Which ones, over the whole layer: those whose absence costs most, ``H_jj w²`` each; with ``:magnitude`` the largest;
with ``:gradient`` those that the loss is steepest in (GWQ, arXiv:2411.00850), which surveys measure. Kept are float16
``values``, row by row, and where they are, the numbers of weights counted through all rows, ascending (Elias, 1974;
Fano, 1971). Of ``n`` weights ``k`` are kept, and ``b = max(⌊log2(n / k)⌋, 1)``.

=========  ======================================================  ===========================
part       holds                                                   bits
=========  ======================================================  ===========================
``low``    the lowest ``b`` bits of each number                    ``k b``
``high``   ones, one for each weight: that of the ``i``-th comes   ``k + ⌊(n - 1) / 2^b⌋``
           after as many zeros as its number has in higher bits
=========  ======================================================  ===========================

That is at most ``log2(n / k) + 2`` bits for a kept weight, half a bit above what few of many weights need at least, and
nothing for a row.

>>> Sparse(1.0).bits((64, 100)) // 8          # 64 of 6400: 2 bytes each, 64 times 6 bits, 64 ones and 99 zeros
197
>>> weight = torch.tensor([[0.0, 0.0, 8.0, 0.0, 0.0, 0.0], [0.0, -2.0, 0.0, 0.0, 0.0, 4.0]])
>>> parts = Sparse(25.0).encode(weight)       # of 12 weights numbers 2, 7 and 11: 10, 111 and 1011
>>> parts["low"].tolist() == [0b11_11_10], parts["high"].tolist() == [0b1_0_1_0_1]
(True, True)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tersor.codecs.packing import pack, packed_width
from tersor.codecs.text import Words, reads
from tersor.codecs.wide import codes_at, pack_wide
from tersor.contracts import DirectCodec, Gram, Part, Shape
from tersor.errors import BadInput


@dataclass(frozen=True)
class Sparse(DirectCodec):
    """``percent`` of the layer's weights are kept, at least one."""

    percent: float
    by: Literal["cost", "magnitude", "gradient"] = "cost"

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 50:
            raise BadInput(f"Codec sparse{self.percent:g} does not exist: keep more than 0 and at most 50 percent.")

    def __str__(self) -> str:
        return f"sparse{self.percent:.6g}" + ("" if self.by == "cost" else f":{self.by}")

    def count(self, shape: Shape) -> int:
        """How many weights are kept."""
        return max(round(shape[0] * shape[1] * self.percent / 100), 1)

    def low_bits(self, shape: Shape) -> int:
        """How many bits of a kept weight's number are stored as they are."""
        return max((shape[0] * shape[1] // self.count(shape)).bit_length() - 1, 1)

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        count, bits = self.count(shape), self.low_bits(shape)
        zeros = (shape[0] * shape[1] - 1) >> bits
        return (
            Part("values", torch.float16, (count,), shared=True),
            Part("low", torch.uint8, (packed_width(count, bits),), shared=True),
            Part("high", torch.uint8, (packed_width(count + zeros, 1),), shared=True),
        )

    def encode(self, weight: Tensor, gram: Gram | None = None) -> dict[str, Tensor]:
        rows, columns = weight.shape
        count, bits = self.count((rows, columns)), self.low_bits((rows, columns))
        cost = self._cost(weight, gram)
        kept = torch.topk(cost.flatten(), count, sorted=False).indices.sort().values
        high = torch.zeros(count + ((rows * columns - 1) >> bits), dtype=torch.uint8)
        high[(kept >> bits) + torch.arange(count)] = 1
        return {
            "values": weight.flatten()[kept].clamp(-65504.0, 65504.0).to(torch.float16),
            "low": pack_wide((kept & (2**bits - 1))[None], bits)[0],
            "high": pack(high[None], 1)[0],
        }

    def _cost(self, weight: Tensor, gram: Gram | None) -> Tensor:
        """What a weight must have most of to be kept."""
        if self.by == "gradient":
            if gram is None or gram.gradients is None:
                raise BadInput(
                    f"Codec {self} needs the gradient of the loss by every weight, which only surveys measure; write "
                    f"sparse{self.percent:.6g}, which goes by the inputs."
                )
            return gram.gradients
        return weight.square() if gram is None or self.by == "magnitude" else weight.square() * gram.matrix.diagonal()

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return self.decode_rows(tensors, shape, slice(None))

    def decode_rows(self, tensors: Mapping[str, Tensor], shape: Shape, rows: slice | Tensor) -> Tensor:
        numbers = torch.arange(shape[0], device=tensors["high"].device)[rows]
        if isinstance(rows, slice) and rows.step in (None, 1):
            first, stop = numbers[:1], numbers[-1:] + 1
        else:
            first, stop = numbers, numbers + 1
        stretch, entry, place = self._find(tensors, shape, first, stop)
        result = torch.zeros(len(numbers), shape[1], dtype=torch.float32, device=numbers.device)
        # A stretch is all rows asked for, or each is one of them.
        at = stretch + place // shape[1] - first[stretch]
        result[at, place % shape[1]] = tensors["values"][entry].to(torch.float32)
        return result

    def rows_of(self, tensors: Mapping[str, Tensor], shape: Shape) -> tuple[Tensor, Tensor]:
        """Column ``(kept,)`` int64 of each kept weight, and where among them rows begin, ``(rows + 1,)`` int64."""
        ends = torch.tensor([[0], [shape[0]]], device=tensors["high"].device)
        place = self._find(tensors, shape, ends[0], ends[1])[2]
        starts = torch.searchsorted(place, torch.arange(shape[0] + 1, device=place.device) * shape[1])
        return place % shape[1], starts

    def _find(
        self, tensors: Mapping[str, Tensor], shape: Shape, first: Tensor, stop: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is kept in stretches of rows, ``first`` to ``stop``: stretch, number among all kept, and among all
        weights. Raises ValueError for another number of ones than weights are kept.
        """
        columns, bits, high = shape[1], self.low_bits(shape), tensors["high"]
        ones = torch.nn.functional.pad(_ones(high).cumsum(0), (1, 0))
        if int(ones[-1]) != self.count(shape):
            raise ValueError(f"{self} has the places of {int(ones[-1])} weights, and {self.count(shape)} are kept")
        zeros = 8 * torch.arange(1, len(ones), device=high.device) - ones[1:]
        # From the byte with the last zero before a stretch to the one with the first zero behind it.
        begin = torch.searchsorted(zeros, first * columns >> bits)
        end = torch.searchsorted(zeros, (stop * columns - 1 >> bits) + 1).clamp(max=len(high) - 1) + 1
        _, byte = _ranges(begin, end)
        stretch, entry = _ranges(ones[begin], ones[end])
        which, bit = (high[byte][:, None] >> torch.arange(8, dtype=torch.uint8, device=high.device) & 1).nonzero().T
        place = (8 * byte[which] + bit - entry << bits) | codes_at(tensors["low"][None], bits, entry)[0]
        inside = (place >= first[stretch] * columns) & (place < stop[stretch] * columns)
        return stretch[inside], entry[inside], place[inside]


def _ones(octets: Tensor) -> Tensor:
    """How many bits of each byte are 1."""
    pairs = octets - (octets >> 1 & 0x55)
    fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return fours + (fours >> 4) & 0x0F


def _ranges(first: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """All whole numbers from ``first[i]`` to before ``stop[i]``, for each ``i`` in turn: the ``i``, and the numbers."""
    lengths = stop - first
    which = torch.repeat_interleave(lengths)
    return which, torch.arange(len(which), device=which.device) + (first - lengths.cumsum(0) + lengths)[which]


@reads(r"sparse(\d{1,2}(?:\.\d{1,6})?)", form="sparse<percent>[:magnitude|:gradient]", heads=("sparse",))
def _read(words: Words) -> Sparse:
    if words.arguments or words.options not in ((), ("magnitude",), ("gradient",)):
        raise words.refuse("write sparse<percent>, such as sparse0.5 or sparse0.5:magnitude.")
    return Sparse(float(words.head[1]), *words.options)  # type: ignore[arg-type]

"""Entropy-coded trellises as codes of a fixed length: what products work on once a layer is loaded.

A range coder is too slow for every token (about a weight each nanosecond), so a stream is decoded once. What comes out
has exactly the weights that the codec decodes to: such a weight is ``step[column] · v``, with ``v`` a whole number of
256ths. Few of these occur, and a table of at most 256 of them serves almost all weights of a layer. The others, at most
two in a hundred, are listed. Steps can be multiplied into the inputs.

(The scalar codes of ``coded(...)`` become what the codec inside it stores: :meth:`tersor.codecs.Coded.inner_parts`.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tersor.codecs import ectcq_layout as layout
from tersor.codecs.ectcq import EntropyCodedTrellis
from tersor.codecs.packing import packed_width, unpack
from tersor.contracts import Shape
from tersor.kernels import coded

_LISTED_BYTES = 4
_MOST_LISTED = 0.02
_MOST_COLUMNS = 1 << 16


@dataclass(frozen=True, eq=False)
class RunTimeCodes:
    """Weights ``step[c] · (table[code[r, c]] + rest[r, c])``: in float32 exactly those that the codec decodes to.

    ``codes (rows, ceil(columns · bits / 8))`` uint8: ``bits`` bits each, row by row, lowest bit first. ``table
    (2^bits,)`` float32, ascending; its last entry is repeated where fewer are needed. ``step (columns,)`` float32.
    ``rest`` is 0 but in few places, listed as sparse rows: row ``r`` has numbers ``start[r]`` to ``start[r + 1]`` of
    ``column (n,)`` uint16, ascending, and ``value (n,)`` float16. A column may be there twice, with values that add up,
    as one number of 16 bits may not be exact. ``start (rows + 1,)`` int32.
    """

    codes: Tensor
    bits: int
    table: Tensor
    step: Tensor
    start: Tensor
    column: Tensor
    value: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.codes, self.table, self.step, self.start, self.column, self.value)
        return sum(tensor.nbytes for tensor in tensors)

    def dense(self) -> Tensor:
        """The weights, float32 ``(rows, columns)``."""
        weight = self.table[unpack(self.codes, self.bits, len(self.step)).long()]
        row = torch.repeat_interleave(torch.arange(len(weight)), self.start.long().diff())
        weight.index_put_((row, self.column.long()), self.value.float(), accumulate=True)
        return self.step * weight


def ectcq_run_time(codec: EntropyCodedTrellis, tensors: Mapping[str, Tensor], shape: Shape) -> RunTimeCodes | None:
    """What ``codec`` stored of a layer ``(rows, columns)`` as codes of 1 to 8 bits, those that take least memory.

    None where more than two in a hundred weights would be listed, as from about 5 bits on, and for layers without
    weights or of more than 65,536 columns. Raises ValueError for a damaged stream.
    """
    data = tensors["stream"].cpu()
    found, at = layout.read(data, shape)
    if not shape[0] * shape[1] or shape[1] > _MOST_COLUMNS:
        return None
    named = coded.names_in(data[at:], shape, found.contexts(), codec.states, found.steps.shrink)
    bits = None if named is None else _bits(named[1], shape)
    if named is None or bits is None:
        return None
    numbers, counts, names = named
    common = counts.argsort(descending=True, stable=True)[: 1 << bits]
    table = numbers[common].sort().values
    code = torch.bucketize(2 * numbers, table[1:] + table[:-1])
    missing = numbers - table[code]
    packed, places = coded.pack_names(names, code, missing != 0, bits)
    return RunTimeCodes(
        packed,
        bits,
        functional.pad(table.float()[None] / 256, (0, (1 << bits) - len(table)), mode="replicate")[0],
        found.steps.step(),
        *_listed(places, missing[names.flatten()[places].long()], shape),
    )


def _bits(counts: Tensor, shape: Shape) -> int | None:
    """How long codes are best, by the bytes of all, where numbers occur ``counts`` times; None where none are."""
    rows, columns = shape
    served = counts.sort(descending=True).values.cumsum(0)
    best: tuple[int, int] | None = None
    for bits in range(1, 9):
        listed = rows * columns - int(served[min(1 << bits, len(served)) - 1])
        nbytes = rows * packed_width(columns, bits) + _LISTED_BYTES * listed
        if listed <= _MOST_LISTED * rows * columns and (best is None or nbytes < best[0]):
            best = (nbytes, bits)
    return None if best is None else best[1]


def _listed(places: Tensor, missing: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Starts, columns and values of sparse rows, for ``missing`` 256ths at ``places`` of the flattened weight."""
    wanted = missing.float() / 256
    first = wanted.to(torch.float16)
    # Below 4096 steps, 24 bits of which the first 11 are taken away: what is left fits into 11 more.
    second = (wanted - first.float()).to(torch.float16)
    kept = torch.stack([first, second], 1)
    there = kept != 0
    place = places[:, None].expand(-1, 2)[there]
    amount = torch.bincount(place // shape[1], minlength=shape[0])
    start = functional.pad(amount.cumsum(0), (1, 0)).to(torch.int32)
    return start, (place % shape[1]).to(torch.uint16), kept[there]

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

from tersor.codecs import ectcq_tables as tables
from tersor.codecs.ectcq_leaf import Steps, TrellisGrid
from tersor.codecs.packing import pack, packed_width, unpack
from tersor.codecs.step_search import WASTE, StepSearch
from tersor.codecs.text import Words, reads
from tersor.contracts import CompositeCodec, Encode, Gram, Part, Shape
from tersor.errors import BadInput, ShapeMismatch
from tersor.kernels import coded
from tersor.kernels.reference_rans import LANES

_FEW_ROWS, _USUAL_ROWS = 128, 1024
_MOST_CLASSES = 8
_WEIGHTS_OF_CLASS = 1 << 15
_SEARCH_ROWS = 192
"""Rows on which the step is searched first, where a layer has more than twice as many."""
_BIT_PRICE = 0.36
"""What a bit costs in squared steps. On Gaussians, 0.3 to 0.45 lose least at all of 0.75, 2 and 4 bits."""
_ATTEMPTS, _MORE_ATTEMPTS, _LAST_ATTEMPTS = 6, 14, 60
"""Steps tried while 0.15 % of the bytes, while 1 %, and while all of them stay empty."""


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

    def __str__(self) -> str:
        return f"ectcq{self.milli / 1000:g}" + ("" if self.states == 8 else f":t{self.states}")

    def tile(self, rows: int) -> int:
        return max(rows, 1)

    def classes(self, shape: Shape) -> int:
        """How many classes of columns have tables of their own."""
        rows = shape[0] if shape[0] >= _FEW_ROWS else _USUAL_ROWS
        return max(min(rows * shape[1] // _WEIGHTS_OF_CLASS, _MOST_CLASSES), 1)

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        aside = self._aside(shape)
        whole = self.milli * rows * columns // 8000
        least = 4 * min(columns, LANES)
        if rows < _FEW_ROWS:
            usual = sum(part.nbytes for part in self._aside((_USUAL_ROWS, columns))) + least
            nbytes = max(whole - usual * rows // _USUAL_ROWS, 0) + least
        else:
            nbytes = whole - sum(part.nbytes for part in aside)
        if nbytes < least:
            raise ShapeMismatch(
                f"Codec {self} has {whole} bytes for a layer of {rows} x {columns}, and its side information alone "
                f"takes {whole - nbytes + least}; use a higher rate."
            )
        return (*aside, Part("stream", torch.uint8, (nbytes,), shared=True))

    def _aside(self, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        return (
            Part("row", torch.uint8, (packed_width(rows, 4),), shared=True),
            Part("column", torch.uint8, (columns,), shared=True),
            Part("model", torch.uint8, (self.classes(shape), tables.MODEL_BYTES), shared=True),
            Part("scale", torch.float32, (1,), shared=True),
        )

    def encode(self, weight: Tensor, gram: Gram | None, encode: Encode) -> tuple[dict[str, Tensor], Tensor]:
        shape = (weight.shape[0], weight.shape[1])
        nbytes = self.parts(shape)[-1].nbytes
        leaf = TrellisGrid(self.states, 2.0 - self.milli / 1000, self.classes(shape), _BIT_PRICE)
        search = StepSearch(leaf.octaves, 8.0 * (nbytes - 2 * min(shape[1], LANES)) / max(weight.numel(), 1))
        if shape[0] > 2 * _SEARCH_ROWS:
            few = weight[:: shape[0] // _SEARCH_ROWS].contiguous()
            for _ in range(4):
                tensors, _ = encode(few, replace(leaf, octaves=search.at), gram)
                if search.learn(_bits(tensors) / few.numel()):
                    break
            search.forget()
        best: tuple[int, dict[str, Tensor], Tensor] | None = None
        leaf = replace(leaf, octaves=search.at)
        for attempt in range(_LAST_ATTEMPTS):
            tensors, values = encode(weight, leaf, gram)
            stored, used = self._stored(tensors, nbytes)
            if used <= nbytes and (best is None or used > best[0]):
                best = (used, stored, values)
            waste = 1.0 if best is None else 1 - best[0] / max(nbytes, 1)
            if best and (waste <= WASTE or attempt >= (_ATTEMPTS if waste < 0.01 else _MORE_ATTEMPTS)):
                break
            search.learn(8.0 * (used - 2 * min(shape[1], LANES)) / max(weight.numel(), 1))
            if attempt >= _MORE_ATTEMPTS:
                search.at += 0.02 * 1.2 ** (attempt - _MORE_ATTEMPTS)
            leaf = replace(leaf, octaves=search.at)
        assert best is not None  # with ever larger steps every number becomes 0, which takes no bytes at all
        return best[1], best[2]

    def _stored(self, tensors: Mapping[str, Tensor], nbytes: int) -> tuple[dict[str, Tensor], int]:
        """The stored tensors, and the bytes that the stream takes of ``nbytes``."""
        counts, low = _counted(tensors)
        bytes_of = tables.frequency_codes(counts)
        classes = (tensors["column"] >> 5).long()
        stream, used = coded.encode(tensors["codes"], classes, tables.frequencies(bytes_of), low, nbytes)
        shrink = torch.round(tensors["shrink"][:, 1:] * 256).to(torch.uint8)
        model = torch.cat([bytes_of.flatten(1), shrink, low[:, None].to(torch.uint8)], 1)
        row = pack(tensors["row"].T, 4)[0]
        return {
            "row": row,
            "column": tensors["column"],
            "scale": tensors["scale"],
            "model": model,
            "stream": stream,
        }, used

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        model = tensors["model"]
        device = model.device
        low = model[:, -1].long()
        frequency = tables.frequencies(model[:, :64].reshape(-1, 2, 32))
        classes = (tensors["column"] >> 5).long()
        stream = tensors["stream"].cpu()
        codes = coded.decode(stream, shape, classes.cpu(), frequency.cpu(), low.cpu(), self.states).to(device)
        shrink = torch.nn.functional.pad(model[:, 64:68].to(torch.float32) / 256, (1, 0))
        row = unpack(tensors["row"][None], 4, shape[0]).T
        return Steps(row, tensors["column"], tensors["scale"], shrink, low).values(codes)

    def decode_rows(self, tensors: Mapping[str, Tensor], shape: Shape, rows: slice | Tensor) -> Tensor:
        """The whole layer is decoded for any of its rows: a stream can only be read from its beginning."""
        return self.decode(tensors, shape)[rows]


def _bits(tensors: Mapping[str, Tensor]) -> float:
    """Bits that the numbers take, without what the coder's lanes begin and end with."""
    counts, low = _counted(tensors)
    return float(tables.costs(counts, low[:, None]).sum())


def _counted(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    classes = (tensors["column"] >> 5).long()
    return tables.count(tensors["codes"].long(), classes, tensors["low"]), tensors["low"]


_FORM = "ectcq{0.5-8}[:t{1|4|8|16|32|64|128|256}]"


@reads(r"ectcq(\d(?:\.\d{1,3})?)", form=_FORM, heads=("ectcq2", "ectcq2.5", "ectcq3"))
def _read(words: Words) -> EntropyCodedTrellis:
    options = words.options or ("t8",)
    if len(options) > 1 or options[0][:1] != "t" or not options[0][1:].isdecimal() or words.arguments:
        raise words.refuse(f"write {_FORM}.")
    return EntropyCodedTrellis(round(float(words.head[1]) * 1000), int(options[0][1:]))

"""The codes of another codec, entropy coded into an exact number of bytes.

Scalar codes have unequal frequencies; a range coder (rANS, arXiv:1311.2540) makes common ones short. What a layer
takes then depends on its weights, so the text names the rate, and the step is searched at which the layer just fits: a
coarser grid than the inner codec would choose, and codes chosen with their price in mind (entropy-constrained scalar
quantization: .26 bits above the limit at any rate, where fixed lengths lose .4 to .8). The rest of the bytes is zero.

>>> from tersor.codecs import parse
>>> codec = parse("coded(int4:g64):2.61")
>>> str(codec), codec.bits((512, 512)) == int(2.61 * 512 * 512 / 8) * 8
('coded(int4:g64):2.61', True)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersor.codecs import ectcq_tables as tables
from tersor.codecs.coded_leaf import PricedGrid, centre, no_codes, spread
from tersor.codecs.grouped import GroupedScalar
from tersor.codecs.inner import under
from tersor.codecs.integer import Integer
from tersor.codecs.packing import pack, packed_width, unpack
from tersor.codecs.small_float import SmallFloat
from tersor.codecs.step_search import WASTE, StepSearch
from tersor.codecs.ternary import Ternary
from tersor.codecs.text import Words, parse, reads
from tersor.contracts import CompositeCodec, Encode, Encoded, Gram, Part, Shape, Side
from tersor.errors import BadInput, ShapeMismatch
from tersor.kernels import coded
from tersor.kernels.reference_rans import LANES, SYMBOLS

_PREFIX = "c_"
_TILE = 256
"""The most rows of a tile. Each begins its stream anew, which takes about 64 bytes."""
_FEW_ROWS, _USUAL_ROWS = 128, 1024
_MOST_CLASSES = 8
_WEIGHTS_OF_CLASS = 1 << 15
_SEARCH_ROWS = 192
"""Rows on which the step is searched first, where a layer has more than twice as many."""
_BIT_PRICE, _COARSE_PRICE = 0.1155, 0.03
"""What a bit costs in squared steps: ``2 ln 2 / 12``, the slope of a fine grid's distortion over its rate, and the
second times ``4^(1 − rate)`` more, which makes it the slope on Gaussians at 1 bit too."""
_ATTEMPTS, _MORE_ATTEMPTS, _LAST_ATTEMPTS = 6, 14, 60
"""Steps tried while 0.15 % of the bytes, while 1 %, and while all of them stay empty."""


@dataclass(frozen=True)
class Coded(CompositeCodec):
    """``inner``'s codes in ``milli`` thousandths of a bit per weight, for all that is stored.

    ``inner``: integers, small floats or ternary weights, which keep their scales. Rows fall into at most eight classes
    with frequencies of their own. Each tile of up to 256 rows has a stream of its own, so that rows can be decoded
    without the whole layer. Layers of fewer than 128 rows, such as samples, pay for as much of a model as if they were
    part of 1024 rows.
    """

    inner: GroupedScalar
    milli: int

    def __post_init__(self) -> None:
        if type(self.inner) not in (Integer, SmallFloat, Ternary):  # classes derived from them store other scales
            raise BadInput(f"Codec coded({self.inner}) does not exist: only int, fp and ternary codes can be coded.")
        if not 300 <= self.milli <= 9000:
            raise BadInput(f"Codec {self} does not exist: its rate is from 0.3 to 9 bits.")

    def __str__(self) -> str:
        return f"coded({self.inner}):{self.milli / 1000:g}"

    def tile(self, rows: int) -> int:
        return max(-(-rows // max(-(-rows // _TILE), 1)), 1)

    def classes(self, shape: Shape) -> int:
        """How many classes of rows have tables of their own."""
        rows = shape[0] if shape[0] >= _FEW_ROWS else _USUAL_ROWS
        return max(min(rows * shape[1] // _WEIGHTS_OF_CLASS, _MOST_CLASSES), 1)

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        aside = self._aside(shape)
        whole = self.milli * rows * columns // 8000
        least = self._least(shape)
        if rows < _FEW_ROWS:
            usual = (_USUAL_ROWS, columns)
            share = (sum(part.nbytes for part in self._aside(usual)) + self._least(usual)) * rows // _USUAL_ROWS
            nbytes = max(whole - share, 0) + least
        else:
            nbytes = whole - sum(part.nbytes for part in aside)
        if nbytes < least:
            raise ShapeMismatch(
                f"Codec {self} has {whole} bytes for a layer of {rows} x {columns}, and needs at least "
                f"{whole - nbytes + least}; use a higher rate, or a larger group."
            )
        return (*aside, Part("stream", torch.uint8, (nbytes,), shared=True))

    def _least(self, shape: Shape) -> int:
        """Bytes that a stream may take at the coarsest step: one bit a weight where zero has no code, else none."""
        rows, columns = shape
        tile = self.tile(rows)
        symmetric = isinstance(self.inner, Integer) and not self.inner.asymmetric
        return 4 * -(-rows // tile) * min(tile, LANES) + (rows * columns * 65 // 512 if symmetric else 0)

    def _aside(self, shape: Shape) -> tuple[Part, ...]:
        rows, _ = shape
        kept = [part for part in self.inner.parts(shape) if part.name != "codes"]
        return (
            *(replace(part, name=_PREFIX + part.name) for part in kept),
            Part("class", torch.uint8, (packed_width(rows, 4),), shared=True),
            Part("model", torch.uint8, (self.classes(shape), SYMBOLS + 1), shared=True),
            Part("start", torch.int32, (-(-rows // self.tile(rows)),), shared=True),
        )

    def encode(self, weight: Tensor, gram: Gram | None, encode: Encode) -> tuple[dict[str, Tensor], Tensor]:
        shape = (weight.shape[0], weight.shape[1])
        nbytes = self.parts(shape)[-1].nbytes
        lanes = self._lane_bytes(shape[0])
        rate = self.milli / 1000
        price = _BIT_PRICE + _COARSE_PRICE * 4.0 ** (1 - rate)
        leaf = PricedGrid(self.inner, 2.05 - rate, self.classes(shape), price)
        search = StepSearch(leaf.octaves, 8.0 * (nbytes - lanes) / max(weight.numel(), 1))
        if shape[0] > 2 * _SEARCH_ROWS:
            few = weight[:: shape[0] // _SEARCH_ROWS].contiguous()
            for _ in range(4):
                tensors, _ = encode(few, replace(leaf, octaves=search.at), gram)
                if search.learn(_bits(tensors) / few.numel()):
                    break
            search.forget()
        best: tuple[int, dict[str, Tensor], Tensor] | None = None
        last = -1
        for attempt in range(_LAST_ATTEMPTS):
            tensors, values = encode(weight, replace(leaf, octaves=search.at), gram)
            stored, used = self._stored(tensors, nbytes)
            if used <= nbytes and (best is None or used > best[0]):
                best = (used, stored, values)
            waste = 1.0 if best is None else 1 - best[0] / max(nbytes, 1)
            # A finer step that takes no more bytes: the inner codec's own grid is as fine as it gets.
            if best and (waste <= WASTE or used == last or attempt >= (_ATTEMPTS if waste < 0.01 else _MORE_ATTEMPTS)):
                break
            last = used
            search.learn(8.0 * (used - lanes) / max(weight.numel(), 1))
            if attempt >= _MORE_ATTEMPTS:
                search.at += 0.02 * 1.2 ** (attempt - _MORE_ATTEMPTS)
        assert best is not None  # with ever larger steps at most a bit is left of every code, for which there is room
        return best[1], best[2]

    def _lane_bytes(self, rows: int) -> int:
        """What the tiles' streams take beyond the bits of their symbols, about."""
        tile = self.tile(rows)
        return 2 * -(-rows // tile) * min(tile, LANES)

    def _stored(self, tensors: Mapping[str, Tensor], nbytes: int) -> tuple[dict[str, Tensor], int]:
        """The stored tensors, and the bytes that the streams take of ``nbytes``."""
        index, kind, low = tensors["index"], tensors["kind"], tensors["low"]
        bytes_of = tables.frequency_codes(_counts(tensors))
        frequency = _both(tables.frequencies(bytes_of))
        tile = self.tile(len(index))
        stream = torch.zeros(nbytes, dtype=torch.uint8)
        starts, used = [], 0
        for first in range(0, len(index), tile):
            here = slice(first, first + tile)
            numbers = (2 * index[here].T).contiguous()
            piece, length = coded.encode(numbers, kind[here], frequency, low, max(nbytes - used, 0))
            starts.append(min(used, 2**31 - 1))
            if used + length <= nbytes:
                stream[used : used + length] = piece[:length]
            used += length
        inner = {name: tensor for name, tensor in tensors.items() if name not in ("index", "kind", "low")}
        return {
            **{_PREFIX + name: tensor for name, tensor in inner.items()},
            "class": pack(kind[None], 4)[0],
            "model": torch.cat([bytes_of, low[:, None].to(torch.uint8)], 1),
            "start": torch.tensor(starts, dtype=torch.int32),
            "stream": stream,
        }, used

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return self.decode_rows(tensors, shape, slice(None))

    def decode_rows(self, tensors: Mapping[str, Tensor], shape: Shape, rows: slice | Tensor) -> Tensor:
        """Decodes the tiles that these rows lie in. Raises ValueError for a damaged stream."""
        device = tensors["stream"].device
        numbers = torch.arange(shape[0])[rows.cpu() if isinstance(rows, Tensor) else rows]
        result = torch.empty(len(numbers), shape[1], dtype=torch.float32, device=device)
        tile = self.tile(shape[0])
        for which, codes, side in self._tiles(tensors, shape, torch.unique(numbers // tile).tolist()):
            values = self.inner.values(Encoded(codes, side), shape[1])
            wanted = (numbers // tile == which).nonzero()[:, 0]
            result[wanted.to(device)] = values[(numbers[wanted] - which * tile).to(device)]
        return result

    def inner_parts(self, tensors: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
        """The same weight as ``inner`` stores it. Raises ValueError for a damaged stream."""
        tiles = range(-(-shape[0] // self.tile(shape[0])))
        codes = [
            self.inner.pack(Encoded(codes, side), (len(codes), shape[1]))["codes"]
            for _, codes, side in self._tiles(tensors, shape, tiles)
        ]
        return {**under(tensors, _PREFIX), "codes": torch.cat(codes)}

    def _tiles(
        self, tensors: Mapping[str, Tensor], shape: Shape, wanted: Iterable[int]
    ) -> Iterator[tuple[int, Tensor, Side]]:
        """Number, codes and side information of each wanted tile."""
        device, tile = tensors["stream"].device, self.tile(shape[0])
        model, stream = tensors["model"].cpu(), tensors["stream"].cpu()
        low = model[:, SYMBOLS].long()
        frequency = _both(tables.frequencies(model[:, :SYMBOLS]))
        kinds = unpack(tensors["class"].cpu()[None], 4, shape[0])[0]
        if len(kinds) and int(kinds.max()) >= len(model):
            raise ValueError(f"a row is of class {int(kinds.max())}, and there are {len(model)}")
        starts = tensors["start"].tolist()
        inner = under(tensors, _PREFIX)
        for which in wanted:
            here = slice(which * tile, min((which + 1) * tile, shape[0]))
            size = (here.stop - here.start, shape[1])
            if not 0 <= starts[which] <= len(stream):
                raise ValueError(f"tile {which} begins at byte {starts[which]} of a stream of {len(stream)}")
            found = coded.decode(stream[starts[which] :], (size[1], size[0]), kinds[here], frequency, low, 1)
            index = (found >> 1).T.to(device)
            mine = {name: tensor[here] for name, tensor in inner.items()}
            side = self.inner.unpack({**mine, "codes": no_codes(self.inner, size).to(device)}, size).side
            most = self.inner.grid(side, size[1]).levels - 1
            yield which, (index + spread(centre(self.inner, side), size[1]).int()).clamp(0, most), side


def _both(frequency: Tensor) -> Tensor:
    """The same table for both unions, of which only the even one comes up: ``(classes, 2, 32)``."""
    return torch.stack([frequency, frequency], 1)


def _counts(tensors: Mapping[str, Tensor]) -> Tensor:
    """How often each symbol comes up, ``(classes, 32)``."""
    return tables.count(2 * tensors["index"].T.long(), tensors["kind"], tensors["low"])[:, 0]


def _bits(tensors: Mapping[str, Tensor]) -> float:
    """Bits that the codes take, without what the coder's lanes begin and end with."""
    return float(tables.costs(_counts(tensors), tensors["low"]).sum())


_FORM = "coded(<int|fp|ternary codec>):{0.3-9}"


@reads("coded", form=_FORM, heads=("coded",))
def _read(words: Words) -> Coded:
    if len(words.arguments) != 1 or len(words.options) != 1 or not re.fullmatch(r"\d(?:\.\d{1,3})?", words.options[0]):
        raise words.refuse(f"write {_FORM}, such as coded(int4:g64):2.61.")
    inner = parse(words.arguments[0])
    if not isinstance(inner, GroupedScalar):
        raise BadInput(f"Codec coded({inner}) does not exist: only int, fp and ternary codes can be coded.")
    return Coded(inner, round(float(words.options[0]) * 1000))

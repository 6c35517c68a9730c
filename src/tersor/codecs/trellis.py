"""A bit-shift trellis down the columns: as many bits as a scalar code, most of the shaping and all of the coding gain.

Trellis-coded quantization as in QTIP (arXiv:2406.11235), with another code: a row's ``bits`` new bits and those before
it make a window, a GF(2)-linear map takes the window to an index, and a small trained table the index to a value. With
a window of 12 bits that comes as near to the rate–distortion bound as random codes with 16, for a sixteenth of the
search; and linear maps of bits decode with shifts and exclusive ors.

The stream runs down a column over a tile of rows, and is a ring there: input columns stay separate, so that error
feedback between them is exact.

>>> codec = Trellis(2)
>>> str(codec), codec.tile(576)
('trellis2:L12', 192)
>>> codec.bits((576, 64)) // 8        # 3 tiles * 64 columns * 48 bytes of codes + 576 scales of 2 bytes
10368
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from tersor.codecs.packing import pack, packed_width, unpack
from tersor.codecs.text import Words, reads
from tersor.codecs.trellis_tables import TABLES
from tersor.contracts import Encoded, Gram, LeafCodec, Part, Shape, Side
from tersor.errors import BadInput
from tersor.kernels.reference_trellis import columns_apart, interleave, states, unit_bytes, window_map
from tersor.kernels.trellis import trellis_in_order, trellis_search

TILE = 256
"""The most rows of a tile. Longer ones would lose a little less at the seam, and take more memory to search."""
CONTEXT = 128
"""Rows to either side of the seam that choose the state there (96 lose 0.001 bit more, 64 0.004)."""
_GAIN = 1.04
"""Scale over root mean square of a row: above 1 because error feedback makes targets larger than the weights."""
_LEAST, _MOST = 2.0**-24, 65504.0
WINDOWS = {bits: tuple(sorted(window for rate, window in TABLES if rate == bits)) for bits in range(1, 5)}
"""The windows that have a code, by bits per weight."""


@dataclass(frozen=True)
class Trellis(LeafCodec):
    """``bits_per_code`` per weight (1–4), a window of ``window`` bits, and one float16 scale a row.

    Longer windows lose less and take longer to encode: ``2^window`` states a weight. ``rows_of_tile`` is what
    :meth:`learn` found for a layer; without it, the rows given are taken to be all of the layer.
    """

    costly = True

    bits_per_code: int
    window: int = 12
    rows_of_tile: int | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.bits_per_code <= 4:
            raise BadInput(f"Codec trellis{self.bits_per_code} does not exist: trellises have 1 to 4 bits.")
        if self.window not in WINDOWS[self.bits_per_code]:
            known = ", ".join(f"L{window}" for window in WINDOWS[self.bits_per_code])
            raise BadInput(f"Codec trellis{self.bits_per_code} has no window L{self.window}; it has {known}.")

    def __str__(self) -> str:
        return f"trellis{self.bits_per_code}:L{self.window}"

    def tile(self, rows: int) -> int:
        if self.rows_of_tile is not None:
            return self.rows_of_tile
        count = max(-(-rows // TILE), 1)
        # Multiples of 8 rows: whole bytes at any rate.
        return max(min(-(-rows // (8 * count)) * 8, rows), 1)

    def learn(self, weight: Tensor, gram: Gram | None) -> Trellis:
        return replace(self, rows_of_tile=self.tile(weight.shape[0]))

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        tile, size = self.tile(rows), unit_bytes(self.bits_per_code)
        width = -(-packed_width(tile, self.bits_per_code) // size) * size
        codes = Part("codes", torch.uint8, (-(-rows // tile), -(-columns // 4), width, 4))
        return (codes, Part("scale", torch.float16, (rows, 1)))

    @property
    def turns(self) -> int:
        """Searches around the ring. A second takes half as long again; bits of states at the seam are dearest at 1."""
        return 2 if self.bits_per_code == 1 else 1

    def prepare(self, weight: Tensor, importance: Tensor | None = None) -> Side:
        share = torch.ones(weight.shape[1]) if importance is None else importance / importance.mean().clamp(min=1e-30)
        power = (weight.square() * (share + 1e-6)).sum(1) / (share + 1e-6).sum()
        return {"scale": _storable(power.sqrt() * _GAIN)[:, None]}

    def round(self, target: Tensor, side: Side, columns: Tensor) -> tuple[Tensor, Tensor]:
        table = table_of(self.bits_per_code, self.window)
        path = trellis_search(
            target,
            side["scale"][:, 0],
            table,
            bits=self.bits_per_code,
            window=self.window,
            tile=self.tile(len(target)),
            context=CONTEXT,
            turns=self.turns,
        )
        return path & (2**self.bits_per_code - 1), table[path.long()] * side["scale"]

    def round_all(
        self, target: Tensor, side: Side, columns: Tensor, reference: Tensor, mixing: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        found = trellis_in_order(
            target,
            reference,
            mixing,
            side["scale"][:, 0],
            table_of(self.bits_per_code, self.window),
            bits=self.bits_per_code,
            window=self.window,
            tile=self.tile(len(target)),
            context=CONTEXT,
            turns=self.turns,
        )
        return None if found is None else (found[0] & (2**self.bits_per_code - 1), found[1])

    def values(self, encoded: Encoded, in_features: int) -> Tensor:
        return self.unscaled(encoded.codes) * encoded.side["scale"]

    def refit(self, weight: Tensor, encoded: Encoded, gram: Tensor) -> Side:
        """Exact least squares for each row's scale under ``tr(E H Eᵀ)``; kept where the stored one is better."""
        unit = self.unscaled(encoded.codes)
        spread = unit @ gram
        normal = (spread * unit).sum(1)
        right = (spread * weight).sum(1)
        old = encoded.side["scale"][:, 0]
        wanted = right / normal
        stored = _storable(torch.where(torch.isfinite(wanted), wanted, old))
        better = stored * (normal * stored - 2 * right) < old * (normal * old - 2 * right)
        return {"scale": torch.where(better, stored, old)[:, None]}

    def pack(self, encoded: Encoded, shape: Shape) -> dict[str, Tensor]:
        rows, columns = encoded.codes.shape
        tile = self.tile(rows)
        padded = torch.nn.functional.pad(encoded.codes, (0, 0, 0, -rows % tile)).reshape(-1, tile, columns)
        streams = pack(padded.transpose(1, 2).reshape(-1, tile), self.bits_per_code).reshape(len(padded), columns, -1)
        codes = interleave(streams, self.bits_per_code)
        return {"codes": codes, "scale": encoded.side["scale"].to(torch.float16)}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Encoded:
        tile, bits = self.tile(shape[0]), self.bits_per_code
        streams = columns_apart(tensors["codes"], bits, shape[1], packed_width(tile, bits))
        codes = unpack(streams.flatten(0, 1), bits, tile).view(*streams.shape[:2], tile)
        codes = codes.transpose(1, 2).reshape(-1, shape[1])[: shape[0]]
        return Encoded(codes.contiguous(), {"scale": tensors["scale"].to(torch.float32)})

    def decode_rows(self, tensors: Mapping[str, Tensor], shape: Shape, rows: slice | Tensor) -> Tensor:
        stored = tensors["codes"]
        number = torch.arange(shape[0], device=stored.device)[rows]
        tile = self.tile(shape[0])
        which, place = number // tile, number % tile
        length = (shape[0] - which * tile).clamp(max=tile)
        bits, width = self.bits_per_code, stored.shape[2]
        size = unit_bytes(bits)

        def byte_at(byte: Tensor) -> Tensor:
            """Bytes ``byte (n,)`` of the streams of tiles ``which (n,)``: ``(n, in)``."""
            place = byte % size * (width // size) + byte // size
            return stored[which, :, place].flatten(1)[:, : shape[1]].to(torch.int32)

        state = torch.zeros(len(number), shape[1], dtype=torch.int32, device=stored.device)
        for age in range(-(-self.window // bits)):
            start = (place - age) % length * bits
            byte, shift = start // 8, (start % 8)[:, None].to(torch.int32)
            code = byte_at(byte) >> shift
            if 8 % bits:  # a code may go on in the next byte
                code |= byte_at((byte + 1).clamp(max=width - 1)) << (8 - shift)
            state |= (code & (2**bits - 1)) << (bits * age)
        table = table_of(bits, self.window).to(stored.device)
        return table[(state & (2**self.window - 1)).long()] * tensors["scale"][number].to(torch.float32)

    def unscaled(self, codes: Tensor) -> Tensor:
        """Values ``(rows, in)`` before the scale."""
        state = states(codes, self.bits_per_code, self.window, self.tile(len(codes)))
        return table_of(self.bits_per_code, self.window).to(codes.device)[state.long()]


@lru_cache(maxsize=32)
def table_of(bits: int, window: int) -> Tensor:
    """The value of each state, ``(2^window,)`` float32. Exact: an integer below 2^7 times one below 2^17 over 2^12."""
    masks, unit, integers = TABLES[bits, window]
    return (torch.tensor(integers, dtype=torch.float32) * (unit / 4096))[window_map(masks, window)]


def _storable(scale: Tensor) -> Tensor:
    return scale.clamp(_LEAST, _MOST).to(torch.float16).to(torch.float32)


_FORM = "trellis{1-4}[:L<window>]"


@reads(r"trellis(\d{1,2})", form=_FORM, heads=tuple(f"trellis{bits}" for bits in range(1, 5)))
def _read(words: Words) -> Trellis:
    if words.arguments or len(words.options) > 1 or not all(re.fullmatch(r"L\d{1,2}", o) for o in words.options):
        raise words.refuse(f"write {_FORM}, such as trellis2:L12.")
    return Trellis(int(words.head[1]), int(words.options[0][1:]) if words.options else 12)

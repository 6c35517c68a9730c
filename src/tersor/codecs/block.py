"""Integers in two-dimensional blocks, each with a power of two for a scale (blockwise compression, arXiv:2304.01483).

A product with such a block is one of integers and a shift of bits. A block of the whole layer is what is called
per-tensor quantization.

>>> Block(4, (8, 8)).bits((64, 128)) // 8        # 64 * 64 bytes of codes + 8 * 16 exponents
4224
>>> str(Block(4, (8, 16), shift=True)), str(Block(8, None, float_scale=True))
('block4:8x16:shift', 'block8:layer:fp16')
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor import kernels
from tersor.codecs.packing import pack, packed_width, unpack
from tersor.codecs.text import Words, reads
from tersor.contracts import Encoded, LeafCodec, Part, ScalarGrid, Shape, Side
from tersor.errors import BadInput, ShapeMismatch

_BIAS = 127
_REACH = 120
_SHIFT_ZERO = 128
_POWERS = (0, -1, -2, -3)
"""Exponents tried, from the least one that clips nothing."""
_SHRINKS = torch.linspace(0.3, 1.0, 36)
"""Float scales tried, as shares of the least one that clips nothing."""


@dataclass(frozen=True)
class Block(LeafCodec):
    """``bits`` a weight (2-8), ``value = (code − 2^(bits−1) + shift) · scale`` with a scale for each block.

    ``size``: rows and columns of a block, None for the whole layer; the last block of rows may be shorter. ``scale`` is
    a power of two, stored as an exponent of 8 bits, or a float16 (``float_scale``). ``shift``: a whole number from −128
    to 127 for each block, for blocks whose values do not lie around 0; without it, it is 0 and nothing is stored.
    """

    bits_per_code: int
    size: tuple[int, int] | None
    shift: bool = False
    float_scale: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits_per_code <= 8:
            raise BadInput(f"Codec block{self.bits_per_code} does not exist: blocks have 2 to 8 bits a weight.")
        if self.size is not None and min(self.size) < 1:
            raise BadInput(f"Codec {self} does not exist: a block has at least one row and one column.")

    def __str__(self) -> str:
        size = "layer" if self.size is None else f"{self.size[0]}x{self.size[1]}"
        return f"block{self.bits_per_code}:{size}" + ":shift" * self.shift + ":fp16" * self.float_scale

    def tile(self, rows: int) -> int:
        return max(rows if self.size is None else min(self.size[0], rows), 1)

    @property
    def sampled(self) -> bool:
        return self.size is not None  # a scale of a few rows suits them better than that of all

    def width(self, in_features: int) -> int:
        """Columns of a block. Raises ShapeMismatch when they do not divide a row."""
        if self.size is None:
            return max(in_features, 1)
        if in_features % self.size[1]:
            fits = [width for width in (8, 16, 24, 32, 48, 64, 96, 128) if in_features % width == 0]
            ways = ", ".join(f"{self.size[0]}x{width}" for width in fits) or "layer"
            raise ShapeMismatch(
                f"Codec {self} cannot take a layer of {in_features} inputs: blocks of {self.size[1]} columns do not "
                f"divide {in_features}; use {ways}."
            )
        return self.size[1]

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        blocks = (-(-rows // self.tile(rows)), columns // self.width(columns))
        scale = Part("scale", torch.float16, blocks) if self.float_scale else Part("exponent", torch.uint8, blocks)
        shift = (Part("shift", torch.uint8, blocks),) if self.shift else ()
        return (Part("codes", torch.uint8, (rows, packed_width(columns, self.bits_per_code))), scale, *shift)

    def prepare(self, weight: Tensor, importance: Tensor | None = None) -> Side:
        """The scale, and shift, of least ``Σ h (w − ŵ)²`` in each block, of those that are tried."""
        rows, columns = weight.shape
        tile, width = self.tile(rows), self.width(columns)
        tiles, groups = -(-rows // tile), columns // width
        padded = torch.nn.functional.pad(weight, (0, 0, 0, tiles * tile - rows))
        blocks = padded.reshape(tiles, tile, groups, width).permute(0, 2, 1, 3)
        weigh = torch.ones(columns) if importance is None else importance.float()
        # Padding counts for nothing: neither as an error nor as an extreme.
        present = (torch.arange(tiles * tile) < rows).float().reshape(tiles, 1, tile, 1)
        mass = weigh.reshape(1, groups, 1, width) * present
        low = torch.where(present > 0, blocks, torch.inf).amin((2, 3))
        high = torch.where(present > 0, blocks, -torch.inf).amax((2, 3))
        best = torch.full((tiles, groups), torch.inf)
        scale, shift = torch.ones(tiles, groups), torch.zeros(tiles, groups)
        for tried in self._scales(low, high):
            moved = self._shift(low, high, tried)
            least = moved - 2 ** (self.bits_per_code - 1)
            code = torch.round(blocks / tried[:, :, None, None]) - least[:, :, None, None]
            value = (code.clamp(0, 2**self.bits_per_code - 1) + least[:, :, None, None]) * tried[:, :, None, None]
            loss = (mass * (blocks - value).square()).sum((2, 3))
            better = loss < best
            best = torch.where(better, loss, best)
            scale, shift = torch.where(better, tried, scale), torch.where(better, moved, shift)
        zero = 2 ** (self.bits_per_code - 1) - shift
        return {name: self._by_row(tensor, rows) for name, tensor in (("scale", scale), ("zero", zero))}

    def _scales(self, low: Tensor, high: Tensor) -> list[Tensor]:
        """Scales to try for blocks with these extremes, all storable."""
        half = 2 ** (self.bits_per_code - 1)
        size = torch.maximum(high, -low).clamp(min=0)
        if self.shift:
            top = torch.maximum((high - low) / (2 * half - 1), size / (_SHIFT_ZERO + half - 2))
        else:
            top = torch.maximum(high / (half - 1), -low / half).clamp(min=0)
        if self.float_scale:
            return [(top * share).clamp(2.0**-24, 65504.0).to(torch.float16).float() for share in _SHRINKS]
        # frexp gives top = m · 2^e with ½ ≤ m < 1: the least power of two above it, or twice it where it is one.
        mantissa, ceiling = torch.frexp(top)
        ceiling = torch.where(mantissa == 0.5, ceiling - 1, ceiling)
        ceiling = torch.where(top > 0, ceiling, -24)
        return [torch.ldexp(torch.ones_like(top), (ceiling + step).clamp(-_REACH, _REACH)) for step in _POWERS]

    def _shift(self, low: Tensor, high: Tensor, scale: Tensor) -> Tensor:
        if not self.shift:
            return torch.zeros_like(scale)
        # Codes reach one further down than up.
        return torch.round(((low + high) / scale + 1) / 2).clamp(-_SHIFT_ZERO, _SHIFT_ZERO - 1)

    def _by_row(self, per_tile: Tensor, rows: int) -> Tensor:
        return per_tile.repeat_interleave(self.tile(rows), 0)[:rows].contiguous()

    def grid(self, side: Side, in_features: int) -> ScalarGrid:
        return ScalarGrid(side["scale"], side["zero"], None, 2**self.bits_per_code, self.width(in_features))

    def round(self, target: Tensor, side: Side, columns: Tensor) -> tuple[Tensor, Tensor]:
        groups = side["scale"].shape[1]
        in_features = groups * self.size[1] if self.size else max(int(columns.max()) + 1, 1)
        return kernels.nearest(target, self.grid(side, in_features), columns)

    def values(self, encoded: Encoded, in_features: int) -> Tensor:
        side, width = encoded.side, self.width(in_features)
        scale, zero = (side[name].repeat_interleave(width, 1) for name in ("scale", "zero"))
        return (encoded.codes.to(torch.float32) - zero) * scale

    def pack(self, encoded: Encoded, shape: Shape) -> dict[str, Tensor]:
        self.parts(shape)
        tile = self.tile(shape[0])
        scale, zero = encoded.side["scale"][::tile], encoded.side["zero"][::tile]
        tensors = {"codes": pack(encoded.codes, self.bits_per_code)}
        if self.float_scale:
            tensors["scale"] = scale.to(torch.float16)
        else:
            tensors["exponent"] = (torch.frexp(scale)[1] - 1 + _BIAS).to(torch.uint8)
        if self.shift:
            tensors["shift"] = (2 ** (self.bits_per_code - 1) - zero + _SHIFT_ZERO).to(torch.uint8)
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Encoded:
        return self._unpack(tensors, shape[1], torch.arange(shape[0]) // self.tile(shape[0]))

    def _unpack(self, tensors: Mapping[str, Tensor], columns: int, which: Tensor) -> Encoded:
        """``which (rows,)``: the tile of each row of the codes."""
        codes = unpack(tensors["codes"], self.bits_per_code, columns)
        which = which.to(codes.device)
        if self.float_scale:
            scale = tensors["scale"].to(torch.float32)[which]
        else:
            exponent = tensors["exponent"][which].to(torch.int32) - _BIAS
            scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
        zero = torch.full_like(scale, 2 ** (self.bits_per_code - 1))
        if self.shift:
            zero = zero + _SHIFT_ZERO - tensors["shift"][which].to(torch.float32)
        return Encoded(codes, {"scale": scale, "zero": zero})

    def decode_rows(self, tensors: Mapping[str, Tensor], shape: Shape, rows: slice | Tensor) -> Tensor:
        numbers = torch.arange(shape[0], device=tensors["codes"].device)[rows]
        mine = {**tensors, "codes": tensors["codes"][numbers]}
        return self.values(self._unpack(mine, shape[1], numbers // self.tile(shape[0])), shape[1])


_FORM = "block{2-8}:{<rows>x<columns>|layer}[:shift][:fp16]"


@reads(r"block(\d{1,2})", form=_FORM, heads=("block4", "block8"))
def _read(words: Words) -> Block:
    size, *options = words.options or ("",)
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", size)
    known = set(options) <= {"shift", "fp16"} and len(set(options)) == len(options)
    if (not found and size != "layer") or not known or words.arguments:
        raise words.refuse(f"write {_FORM}.")
    blocks = (int(found[1]), int(found[2])) if found else None
    return Block(int(words.head[1]), blocks, "shift" in options, "fp16" in options)

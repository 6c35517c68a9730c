"""NVFP4: 4-bit floats in groups of 16 whose scales are 8-bit floats, under one power of two.

NVIDIA's format has a float32 for the tensor in the place of that power, and engines that fuse layers want it alike in
all of them. A power of two that is part of the codec is alike everywhere, and costs no accuracy where the scales that
it allows reach far enough: with ``s9``, 2^-9, they go from 3.8e-6 to 0.875.

>>> NvFloat().bits((64, 128)) // 8      # 64 * 64 bytes of codes + 64 * 8 scales of one byte
4608
>>> str(NvFloat(shift=12))
'nvfp4:s12'
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.codecs.packing import pack, packed_width, unpack
from tersor.codecs.scales import ScaleFormat
from tersor.codecs.small_float import SmallFloat
from tersor.codecs.text import Words, reads
from tersor.contracts import Encoded, Part, Shape
from tersor.errors import BadInput

_LEAST, _MOST = 2.0**-9, 448.0
"""Of e4m3 floats above zero."""
_TRIED = range(-8, 7)
"""Neighbours of the least scale that clips nothing, eight to an octave: some clip, in others 4 takes the place of 6."""


@dataclass(frozen=True)
class NvFloat(SmallFloat):
    """e2m1 floats times ``scale · 2^-shift``, where every 16 of a row share an e4m3 ``scale``."""

    bits_per_code: int = 4
    group: int | None = 16
    scales: ScaleFormat = "bf16"  # what holds them exactly; stored as below
    shift: int = 9

    def __post_init__(self) -> None:
        if (self.bits_per_code, self.group, self.scales, self.exponent) != (4, 16, "bf16", 2):
            raise BadInput("Codec nvfp4 has 4 bits, groups of 16 and 2 exponent bits, and no others.")
        if not 0 <= self.shift <= 24:
            raise BadInput(f"Codec {self} cannot be: its power of two goes from s0 to s24.")

    def __str__(self) -> str:
        return f"nvfp4:s{self.shift}"

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        groups = self.groups(columns)
        codes = Part("codes", torch.uint8, (rows, packed_width(columns, 4)))
        return (codes, Part("scale", torch.uint8, (rows, groups)))

    def storable(self, scale: Tensor, top: Tensor | None = None) -> dict[str, Tensor]:
        wanted = (scale * 2.0**self.shift).clamp(_LEAST, _MOST).to(torch.float8_e4m3fn)
        return {"scale": wanted.to(torch.float32) * 2.0**-self.shift}

    def fit(self, weight: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """The scale with the least ``Σ h (w − ŵ)²`` of those around the least one that clips nothing."""
        table = self.table()
        middles = (table[:-1] + table[1:]) * 0.5
        top = (weight.abs().amax(1) / table.max() * 2.0**self.shift).clamp(_LEAST, _MOST)
        code = top.to(torch.float8_e4m3fn)
        # Positive e4m3 floats are in the order of their bits.
        first = code.view(torch.uint8).to(torch.int32) + (code.to(torch.float32) < top)
        best = torch.full_like(top, torch.inf)
        scale = torch.ones_like(top)
        for step in _TRIED:
            bits = (first + step).clamp(1, 126).to(torch.uint8)
            tried = bits.view(torch.float8_e4m3fn).to(torch.float32) * 2.0**-self.shift
            values = table[torch.bucketize(weight / tried[:, None], middles)] * tried[:, None]
            loss = (importance * (weight - values).square()).sum(1)
            scale = torch.where(loss < best, tried, scale)
            best = torch.minimum(best, loss)
        return {"scale": scale}

    def pack(self, encoded: Encoded, shape: Shape) -> dict[str, Tensor]:
        self.parts(shape)
        scale = (encoded.side["scale"] * 2.0**self.shift).to(torch.float8_e4m3fn).view(torch.uint8)
        return {"codes": pack(self.to_stored(encoded.codes), 4), "scale": scale}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Encoded:
        codes = self.from_stored(unpack(tensors["codes"], 4, shape[1]))
        scale = tensors["scale"].contiguous().view(torch.float8_e4m3fn).to(torch.float32)
        return Encoded(codes, {"scale": scale * 2.0**-self.shift})


_FORM = "nvfp4:s<n>"


@reads("nvfp4", form=_FORM, heads=("nvfp4",))
def _read(words: Words) -> NvFloat:
    match = re.fullmatch(r"s(\d{1,2})", words.options[0]) if len(words.options) == 1 else None
    if match is None or words.arguments:
        raise words.refuse(f"say its power of two; write {_FORM}, such as nvfp4:s9.")
    return NvFloat(shift=int(match[1]))

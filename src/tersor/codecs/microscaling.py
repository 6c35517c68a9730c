"""Small floats with scales that are powers of two, stored as 8-bit exponents: OCP's microscaling formats (MX, v1.0).

The exponent of a group is searched for, where the standard's own rule takes that of the greatest magnitude
(arXiv:2310.10537, algorithm 1) and clips it.

>>> str(MicroFloat(4, 32, exponent=2))
'mxfp4:e2m1:g32'
>>> MicroFloat(4, 32, exponent=2).bits((64, 128)) // 8      # 64 * 64 bytes of codes + 64 * 4 exponents
4352
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
from tersor.codecs.text import Words, grouping, reads
from tersor.contracts import Encoded, Part, Shape, Side
from tersor.errors import BadInput

_BIAS = 127
_REACH = 120
"""Exponents go from −120 to 120, within what bfloat16 holds exactly."""
_STEPS = (0, -1, -2, -3)
"""Exponents tried, from the least one that clips nothing."""


@dataclass(frozen=True)
class MicroFloat(SmallFloat):
    """Floats of ``bits`` (4, 6 or 8) times ``2^(code − 127)``, one code of 8 bits for every group."""

    scales: ScaleFormat = "bf16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scales != "bf16":
            raise BadInput(f"Codec {self} has scales that are powers of two, and no other format for them.")

    def __str__(self) -> str:
        group = "row" if self.group is None else f"g{self.group}"
        return f"mxfp{self.bits_per_code}:e{self.exponent}m{self.mantissa}:{group}"

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        groups = self.groups(columns)
        codes = Part("codes", torch.uint8, (rows, packed_width(columns, self.bits_per_code)))
        return (codes, Part("exponent", torch.uint8, (rows, groups)))

    def fit(self, weight: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """The power of two with the least ``Σ h (w − ŵ)²`` of four, of which the first clips nothing."""
        table = self.table()
        middles = (table[:-1] + table[1:]) * 0.5
        top = weight.abs().amax(1) / table.max()
        # frexp gives top = m · 2^e with ½ ≤ m < 1: the least power of two above it, or twice it where it is one.
        mantissa, ceiling = torch.frexp(top)
        ceiling = torch.where(mantissa == 0.5, ceiling - 1, ceiling)
        ceiling = torch.where(top > 0, ceiling, -24)
        best = torch.full_like(top, torch.inf)
        scale = torch.ones_like(top)
        for step in _STEPS:
            tried = torch.ldexp(torch.ones_like(top), (ceiling + step).clamp(-_REACH, _REACH))
            values = table[torch.bucketize(weight / tried[:, None], middles)] * tried[:, None]
            loss = (importance * (weight - values).square()).sum(1)
            scale = torch.where(loss < best, tried, scale)
            best = torch.minimum(best, loss)
        return {"scale": scale}

    def refit(self, weight: Tensor, encoded: Encoded, gram: Tensor) -> Side:
        """Unchanged: the best real scale for fixed codes lies far within a factor of √2 of the old one."""
        return encoded.side

    def pack(self, encoded: Encoded, shape: Shape) -> dict[str, Tensor]:
        self.parts(shape)
        exponent = torch.frexp(encoded.side["scale"])[1] - 1 + _BIAS
        codes = pack(self.to_stored(encoded.codes), self.bits_per_code)
        return {"codes": codes, "exponent": exponent.to(torch.uint8)}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Encoded:
        codes = self.from_stored(unpack(tensors["codes"], self.bits_per_code, shape[1]))
        exponent = tensors["exponent"].to(torch.int32) - _BIAS
        return Encoded(codes, {"scale": torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)})


_FORM = "mxfp{4,6,8}:e<E>m<M>:{g<n>|row}"


@reads(r"mxfp(\d{1,2})", form=_FORM, heads=("mxfp4", "mxfp6", "mxfp8"))
def _read(words: Words) -> MicroFloat:
    bits = int(words.head[1])
    group, scales, rest = grouping(words, _FORM)
    layout = re.fullmatch(r"e(\d)m(\d)", rest[0]) if len(rest) == 1 else None
    if not layout or scales != "fp16" or words.arguments:
        raise words.refuse(f"say exponent and mantissa bits once, and no scale format; write {_FORM}.")
    codec = MicroFloat(bits, group, exponent=int(layout[1]))
    if codec.mantissa != int(layout[2]):
        raise words.refuse(f"1 + {layout[1]} + {layout[2]} bits are not {bits}.")
    return codec

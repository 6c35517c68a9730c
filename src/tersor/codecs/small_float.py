"""Small floating-point numbers (FP4, FP6, FP8) with group scales.

Sign, exponent, mantissa from the highest bit down; subnormals as in IEEE 754; bias ``2^(E−1) − 1``; no infinities.
``e4m3`` gives up its all-ones code (NaN), ``e5m2`` its top exponent, as the OCP formats do (OFP8; MX, v1.0 §5.3).

>>> SmallFloat(4, 32, exponent=2).table().tolist()[-4:]
[2.0, 3.0, 4.0, 6.0]
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tersor import kernels
from tersor.codecs.grouped import GroupedScalar
from tersor.codecs.text import Words, grouping, reads
from tersor.contracts import ScalarGrid, Side
from tersor.errors import BadInput

_SHRINKS = {4: torch.linspace(0.60, 1.1, 21), 6: torch.linspace(0.70, 1.0, 7), 8: torch.linspace(0.80, 1.0, 3)}


@lru_cache(maxsize=32)
def _levels(exponent: int, mantissa: int) -> tuple[Tensor, Tensor]:
    """Ascending distinct values, and the code of each; the negative zero's code is not used."""
    bits = 1 + exponent + mantissa
    codes = torch.arange(2**bits)
    sign = 1.0 - 2.0 * (codes >> (bits - 1)).to(torch.float64)
    field = (codes >> mantissa) & (2**exponent - 1)
    fraction = (codes & (2**mantissa - 1)).to(torch.float64) / 2**mantissa
    bias = 2 ** (exponent - 1) - 1
    lead = (field > 0).to(torch.float64)
    value = sign * (lead + fraction) * torch.pow(2.0, (field.clamp(min=1) - bias).to(torch.float64))
    usable = codes != 2 ** (bits - 1)  # negative zero
    if (exponent, mantissa) == (4, 3):
        usable &= (codes & 0x7F) != 0x7F
    if (exponent, mantissa) == (5, 2):
        usable &= field != 31
    order = torch.argsort(value[usable])
    return value[usable][order].to(torch.float32), codes[usable][order].to(torch.int32)


@dataclass(frozen=True)
class SmallFloat(GroupedScalar):
    """Floats of ``bits`` (4, 6 or 8) with ``exponent`` bits of exponent; value = float · scale."""

    exponent: int = 2

    def __post_init__(self) -> None:
        if self.bits_per_code not in (4, 6, 8) or not 1 <= self.exponent <= min(5, self.bits_per_code - 1):
            raise BadInput(
                f"Codec fp{self.bits_per_code} with {self.exponent} exponent bits does not exist: use 4, 6 or 8 bits, "
                f"of which at least 1 and at most 5 are exponent."
            )

    @property
    def mantissa(self) -> int:
        return self.bits_per_code - 1 - self.exponent

    def __str__(self) -> str:
        return f"fp{self.bits_per_code}:e{self.exponent}m{self.mantissa}:{self.suffix()}"

    def table(self) -> Tensor:
        """All representable values before scaling, ascending, ``(levels,)`` float32."""
        return _levels(self.exponent, self.mantissa)[0]

    def fit(self, weight: Tensor, importance: Tensor) -> dict[str, Tensor]:
        shrinks = _SHRINKS[self.bits_per_code]
        return {"scale": kernels.fit_table(weight, importance, table=self.table(), shrinks=shrinks)}

    def grid(self, side: Side, in_features: int) -> ScalarGrid:
        table = self.table()
        return ScalarGrid(side["scale"], None, table[None, :], len(table), self.group or in_features)

    def to_stored(self, codes: Tensor) -> Tensor:
        return _levels(self.exponent, self.mantissa)[1][codes.long()]

    def from_stored(self, codes: Tensor) -> Tensor:
        stored = _levels(self.exponent, self.mantissa)[1]
        positions = torch.zeros(2**self.bits_per_code, dtype=torch.int32)
        positions[stored.long()] = torch.arange(len(stored), dtype=torch.int32)
        return positions[codes.long()]


_FORM = "fp{4,6,8}:e<E>m<M>:{g<n>|row}[:bf16|:s8]"


@reads(r"fp(?!16$)(\d{1,2})", form=_FORM, heads=("fp4", "fp6", "fp8"))
def _read(words: Words) -> SmallFloat:
    bits = int(words.head[1])
    group, scales, rest = grouping(words, _FORM)
    layout = re.fullmatch(r"e(\d)m(\d)", rest[0]) if len(rest) == 1 else None
    if not layout:
        raise words.refuse(f"say exponent and mantissa bits once; write {_FORM}.")
    codec = SmallFloat(bits, group, scales, int(layout[1]))
    if codec.mantissa != int(layout[2]):
        raise words.refuse(f"1 + {layout[1]} + {layout[2]} bits are not {bits}.")
    return codec

"""Uniform integers with group scales: the format of GPTQ, AWQ and most engines.

>>> Integer(3, 64).bits((64, 128)) // 8        # 64 * 48 bytes of codes + 64 * 2 scales of 2 bytes
3328
>>> str(Integer(4, 32, scales="s8", asymmetric=True))
'int4:g32:asym:s8'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor import kernels
from tersor.codecs.grouped import GroupedScalar
from tersor.codecs.packing import pack, packed_width, unpack
from tersor.codecs.text import Words, grouping, reads
from tersor.contracts import Encoded, Part, ScalarGrid, Shape, Side
from tersor.errors import BadInput

# Clip ratios tried for every group. Few at high rates, where clipping hardly pays.
_SHRINKS = {bits: torch.linspace(low, 1.0, count) for bits, (low, count) in {
    1: (0.20, 25), 2: (0.35, 27), 3: (0.50, 21), 4: (0.60, 17), 5: (0.76, 13), 6: (0.85, 9), 7: (0.92, 5), 8: (0.96, 3),
}.items()}  # fmt: skip


@dataclass(frozen=True)
class Integer(GroupedScalar):
    """``bits`` per weight (1–8) on an even grid: value = (code − zero) · scale.

    Symmetric grids are mid-rise: zero is ``(2^bits − 1) / 2`` and nothing is stored for it. Asymmetric ones store an
    integer zero of ``bits`` bits per group.
    """

    asymmetric: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits_per_code <= 8:
            raise BadInput(f"Codec int{self.bits_per_code} does not exist: integers have 1 to 8 bits.")

    def __str__(self) -> str:
        head = f"int{self.bits_per_code}:"
        suffix = self.suffix()
        if self.asymmetric:
            group, *rest = suffix.split(":")
            suffix = ":".join([group, "asym", *rest])
        return head + suffix

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        parts = super().parts(shape)
        if not self.asymmetric:
            return parts
        width = packed_width(self.groups(shape[1]), self.bits_per_code)
        return (*parts, Part("zero", torch.uint8, (shape[0], width)))

    def fit(self, weight: Tensor, importance: Tensor) -> dict[str, Tensor]:
        scale, zero = kernels.fit_uniform(
            weight,
            importance,
            levels=2**self.bits_per_code,
            asymmetric=self.asymmetric,
            shrinks=_SHRINKS[self.bits_per_code],
        )
        return {"scale": scale, "zero": zero} if self.asymmetric else {"scale": scale}

    def refit_by(self, product: Tensor, encoded: Encoded, gram: Tensor) -> Side:
        """:meth:`refit` where ``product (rows, in)``, that of weight and Gram matrix, is known already."""
        return self.rescaled(product, encoded, gram)

    def grid(self, side: Side, in_features: int) -> ScalarGrid:
        levels = 2**self.bits_per_code
        scale = side["scale"]
        zero = side["zero"] if self.asymmetric else torch.full_like(scale, (levels - 1) / 2)
        return ScalarGrid(scale, zero, None, levels, self.group or in_features)

    def pack(self, encoded: Encoded, shape: Shape) -> dict[str, Tensor]:
        tensors = super().pack(encoded, shape)
        if self.asymmetric:
            tensors["zero"] = pack(encoded.side["zero"], self.bits_per_code)
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Encoded:
        encoded = super().unpack(tensors, shape)
        if not self.asymmetric:
            return encoded
        zero = unpack(tensors["zero"], self.bits_per_code, self.groups(shape[1])).to(torch.float32)
        return Encoded(encoded.codes, {**encoded.side, "zero": zero})


_FORM = "int{1-8}:{g<n>|row}[:asym][:bf16|:s8]"


@reads(r"int(\d{1,2})", form=_FORM, heads=tuple(f"int{bits}" for bits in range(1, 9)))
def _read(words: Words) -> Integer:
    group, scales, rest = grouping(words, _FORM)
    asymmetric = rest == ["asym"]
    if rest and not asymmetric:
        raise words.refuse(f"unknown option {rest[0]!r}; write {_FORM}.")
    return Integer(int(words.head[1]), group, scales, asymmetric)

"""Two's-complement integers with a zero among them: symmetric integers as compressed-tensors, GPTQ and ONNX store them.

A scale may be negative. The grid reaches one step further below zero than above, so the sign decides which tail of a
group is clipped less; engines multiply by the scale, whatever its sign.

>>> str(SignedInteger(4, 128, "bf16"))
'sint4:g128:bf16'
>>> SignedInteger(4, 128, "bf16").bits((64, 256)) // 8      # 64 * 128 bytes of codes + 64 * 2 scales of 2 bytes
8448
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tersor import kernels
from tersor.codecs.grouped import GroupedScalar
from tersor.codecs.scales import storable
from tersor.codecs.text import Words, grouping, reads
from tersor.contracts import Encoded, Gram, Part, ScalarGrid, Shape, Side
from tersor.errors import BadInput

# Reach of the grid, as shares of the greatest magnitude, tried for every group; above 1 where the far side is short.
_REACHES = {bits: (*torch.linspace(low, 1.0, below).tolist(), *torch.linspace(1.0, high, above)[1:].tolist())
            for bits, (low, below, high, above) in {
    2: (0.40, 9, 2.00, 8), 3: (0.50, 9, 1.34, 6), 4: (0.60, 9, 1.14, 4), 5: (0.76, 6, 1.06, 3),
    6: (0.85, 5, 1.03, 2), 7: (0.92, 4, 1.02, 2), 8: (0.96, 3, 1.01, 2),
}.items()}  # fmt: skip
_FORM = "sint{2-8}:{g<n>|row}[:bf16][:a8|:a8s]"
_TOP = 127
"""Greatest code of an input of 8 bits."""


@dataclass(frozen=True)
class SignedInteger(GroupedScalar):
    """``bits`` per weight (2–8): value = (code − 2^(bits−1)) · scale, scale of either sign.

    ``activations``: 8 where engines are to multiply by inputs rounded to 8 bits, token by token, as they run; the
    weights are the same. Only for 8 bits and a scale a row. ``static``: with one scale for all inputs of the layer,
    stored beside the weights, by which nothing that calibration saw is clipped; layers that read the same input get the
    same. ``reach``: the greatest magnitude that calibration saw, which :meth:`learn` finds out; 0 where not known.
    """

    activations: int = 16
    static: bool = False
    reach: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        if not 2 <= self.bits_per_code <= 8:
            raise BadInput(f"Codec sint{self.bits_per_code} does not exist: signed integers have 2 to 8 bits.")
        if self.scales == "s8":
            raise BadInput(f"Codec {self} does not exist: its scales have signs, and s8 has none; write {_FORM}.")
        if self.activations not in (8, 16):
            raise BadInput(f"Codec {self} does not exist: activations have 8 or 16 bits, not {self.activations}.")
        if self.static and self.activations != 8:
            raise BadInput(f"Codec {self} does not exist: only inputs of 8 bits have a scale.")
        if self.activations == 8 and (self.bits_per_code, self.group) != (8, None):
            raise BadInput(f"Codec {self} does not exist: activations of 8 bits go with sint8:row alone.")

    def __str__(self) -> str:
        inputs = "" if self.activations == 16 else ":a8s" if self.static else ":a8"
        return f"sint{self.bits_per_code}:{self.suffix()}{inputs}"

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        inputs = (Part("input_scale", torch.bfloat16, (1,), shared=True),) if self.static else ()
        return (*super().parts(shape), *inputs)

    def learn(self, weight: Tensor, gram: Gram | None) -> SignedInteger:
        reach = None if gram is None else gram.reach
        return replace(self, reach=reach) if self.static and reach is not None else self

    def pack(self, encoded: Encoded, shape: Shape) -> dict[str, Tensor]:
        """Codes and scales; ``input_scale`` is 0, which no engine may be given, where the reach is not known."""
        if not self.static:
            return super().pack(encoded, shape)
        known = encoded.side.get("input_scale")
        inputs = input_scale(self.reach) if known is None or not len(known) else known[0].to(torch.bfloat16)
        return {**super().pack(encoded, shape), "input_scale": inputs}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Encoded:
        found = super().unpack(tensors, shape)
        if not self.static:
            return found
        # One for each row, as all side information is, so that what packs these codes again has it.
        return Encoded(found.codes, {**found.side, "input_scale": tensors["input_scale"].float().expand(shape[0], 1)})

    def fit(self, weight: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """The best least-squares scale of the codes that a search over reaches and both signs gives."""
        reaches = torch.tensor(_REACHES[self.bits_per_code])
        return {"scale": kernels.fit_signed(weight, importance, bits=self.bits_per_code, reaches=reaches)}

    def refit_by(self, product: Tensor, encoded: Encoded, gram: Tensor) -> Side:
        """:meth:`refit` where ``product (rows, in)``, that of weight and Gram matrix, is known already."""
        return self.rescaled(product, encoded, gram)

    def storable(self, scale: Tensor, top: Tensor | None = None) -> dict[str, Tensor]:
        sign = torch.where(scale < 0, -1.0, 1.0)
        return {"scale": sign * storable(scale.abs(), self.scales)["scale"]}

    def usable(self, scale: Tensor) -> Tensor:
        return torch.isfinite(scale) & (scale != 0)

    def grid(self, side: Side, in_features: int) -> ScalarGrid:
        scale = side["scale"]
        levels = 2**self.bits_per_code
        return ScalarGrid(scale, torch.full_like(scale, levels // 2), None, levels, self.group or in_features)


def input_scale(reach: float) -> Tensor:
    """The least bfloat16 scale ``(1,)`` by which inputs up to ``reach`` are not clipped to 8 bits; 0 for 0.

    >>> input_scale(127.0 * 1.001).item()            # a step of bfloat16 above 1
    1.0078125
    """
    wanted = torch.tensor([reach / _TOP])
    scale = wanted.to(torch.bfloat16)
    low = scale.float() < wanted
    return torch.where(low, (scale.view(torch.int16) + 1).view(torch.bfloat16), scale)


@reads(r"sint(\d{1,2})", form=_FORM, heads=tuple(f"sint{bits}" for bits in range(2, 9)))
def _read(words: Words) -> SignedInteger:
    group, scales, rest = grouping(words, _FORM)
    if words.arguments or rest not in ([], ["a8"], ["a8s"]):
        raise words.refuse(f"unknown option {(rest or ['()'])[0]!r}; write {_FORM}.")
    return SignedInteger(int(words.head[1]), group, scales, 8 if rest else 16, rest == ["a8s"])

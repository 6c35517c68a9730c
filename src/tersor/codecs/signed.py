"""Two's-complement integers with a zero among them: symmetric integers as compressed-tensors, GPTQ and ONNX store them.

A scale may be negative. The grid reaches one step further below zero than above, so the sign decides which tail of a
group is clipped less; engines multiply by the scale, whatever its sign.

>>> str(SignedInteger(4, 128, "bf16"))
'sint4:g128:bf16'
>>> SignedInteger(4, 128, "bf16").bits((64, 256)) // 8      # 64 * 128 bytes of codes + 64 * 2 scales of 2 bytes
8448
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor import kernels
from tersor.codecs.grouped import GroupedScalar
from tersor.codecs.scales import storable
from tersor.codecs.text import Words, grouping, reads
from tersor.contracts import ScalarGrid, Side
from tersor.errors import BadInput

# Reach of the grid, as shares of the greatest magnitude, tried for every group; above 1 where the far side is short.
_SHRINKS = {bits: torch.cat([torch.linspace(low, 1.0, below), torch.linspace(1.0, high, above)[1:]])
            for bits, (low, below, high, above) in {
    2: (0.40, 16, 2.00, 17), 3: (0.50, 19, 1.34, 11), 4: (0.60, 17, 1.14, 7), 5: (0.76, 11, 1.06, 4),
    6: (0.85, 8, 1.03, 3), 7: (0.92, 5, 1.02, 2), 8: (0.96, 4, 1.01, 2),
}.items()}  # fmt: skip
_FORM = "sint{2-8}:{g<n>|row}[:bf16][:a8]"


@dataclass(frozen=True)
class SignedInteger(GroupedScalar):
    """``bits`` per weight (2–8): value = (code − 2^(bits−1)) · scale, scale of either sign.

    ``activations``: 8 where engines are to multiply by inputs rounded to 8 bits, token by token, as they run; the
    weights are the same. Only for 8 bits and a scale a row.
    """

    activations: int = 16

    def __post_init__(self) -> None:
        if not 2 <= self.bits_per_code <= 8:
            raise BadInput(f"Codec sint{self.bits_per_code} does not exist: signed integers have 2 to 8 bits.")
        if self.scales == "s8":
            raise BadInput(f"Codec {self} does not exist: its scales have signs, and s8 has none; write {_FORM}.")
        if self.activations not in (8, 16):
            raise BadInput(f"Codec {self} does not exist: activations have 8 or 16 bits, not {self.activations}.")
        if self.activations == 8 and (self.bits_per_code, self.group) != (8, None):
            raise BadInput(f"Codec {self} does not exist: activations of 8 bits go with sint8:row alone.")

    def __str__(self) -> str:
        return f"sint{self.bits_per_code}:{self.suffix()}" + (":a8" if self.activations == 8 else "")

    def fit(self, weight: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """The best of a search over reaches and both signs."""
        half = 2 ** (self.bits_per_code - 1)
        table = torch.arange(-half, half, dtype=torch.float32)
        best, chosen = None, torch.empty(0)
        for sign in (1.0, -1.0):
            scale = sign * kernels.fit_table(
                sign * weight, importance, table=table, shrinks=_SHRINKS[self.bits_per_code]
            )
            codes = torch.round(weight / scale[:, None]).clamp_(-half, half - 1)
            loss = (importance * (weight - codes * scale[:, None]).square()).sum(1)
            chosen = scale if best is None else torch.where(loss < best, scale, chosen)
            best = loss if best is None else torch.minimum(loss, best)
        return {"scale": chosen}

    def storable(self, scale: Tensor, top: Tensor | None = None) -> dict[str, Tensor]:
        sign = torch.where(scale < 0, -1.0, 1.0)
        return {"scale": sign * storable(scale.abs(), self.scales)["scale"]}

    def usable(self, scale: Tensor) -> Tensor:
        return torch.isfinite(scale) & (scale != 0)

    def grid(self, side: Side, in_features: int) -> ScalarGrid:
        scale = side["scale"]
        levels = 2**self.bits_per_code
        return ScalarGrid(scale, torch.full_like(scale, levels // 2), None, levels, self.group or in_features)


@reads(r"sint(\d{1,2})", form=_FORM, heads=tuple(f"sint{bits}" for bits in range(2, 9)))
def _read(words: Words) -> SignedInteger:
    group, scales, rest = grouping(words, _FORM)
    if words.arguments or rest not in ([], ["a8"]):
        raise words.refuse(f"unknown option {(rest or ['()'])[0]!r}; write {_FORM}.")
    return SignedInteger(int(words.head[1]), group, scales, 8 if rest else 16)

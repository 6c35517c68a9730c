"""Ternary weights ``{−1, 0, 1} · scale``, five to a byte (arXiv:1605.04711; 1.6 bits as in arXiv:2402.17764).

>>> Ternary(group=64).bits((64, 128)) // 8        # 64 * 26 bytes of codes + 64 * 2 scales of 2 bytes
1920
>>> str(Ternary(group=None, scales="bf16"))
'ternary:row:bf16'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.codecs.grouped import GroupedScalar
from tersor.codecs.scales import pack_scales, scale_parts, unpack_scales
from tersor.codecs.text import Words, grouping, reads
from tersor.contracts import Encoded, Part, ScalarGrid, Shape, Side

_TABLE = torch.tensor([[-1.0, 0.0, 1.0]])
_POWERS = (1, 3, 9, 27, 81)


@dataclass(frozen=True)
class Ternary(GroupedScalar):
    """``{−1, 0, 1}`` times a scale for every ``group`` columns of a row (None: the whole row).

    Byte ``i`` of a row holds columns ``5i .. 5i + 4`` as the digits of a number to the base 3, the first one least.
    """

    bits_per_code: int = 2

    def __str__(self) -> str:
        return f"ternary:{self.suffix()}"

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        groups = self.groups(columns)
        return (Part("codes", torch.uint8, (rows, -(-columns // 5))), *scale_parts(rows, groups, self.scales))

    def fit(self, weight: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """The scale of the best threshold, found exactly.

        With the ``k`` largest magnitudes kept, the best scale is their mean and the loss falls by ``(Σ h |w|)² / Σ h``;
        all ``k`` are tried.
        """
        magnitude, order = weight.abs().sort(dim=1, descending=True, stable=True)
        mass = torch.gather(importance.expand(weight.shape), 1, order) + 1e-12 * importance.mean() + 1e-30
        moment = (mass * magnitude).double().cumsum(1)
        total = mass.double().cumsum(1)
        best = (moment * moment / total).argmax(1, keepdim=True)
        return {"scale": torch.gather(moment / total, 1, best)[:, 0].float()}

    def grid(self, side: Side, in_features: int) -> ScalarGrid:
        return ScalarGrid(side["scale"], None, _TABLE.to(side["scale"].device), 3, self.group or in_features)

    def pack(self, encoded: Encoded, shape: Shape) -> dict[str, Tensor]:
        self.parts(shape)
        # Columns beyond the last are digits 0, so that equal weights give equal bytes.
        padded = torch.nn.functional.pad(encoded.codes, (0, -shape[1] % 5))
        digits = padded.reshape(shape[0], padded.shape[1] // 5, 5)
        stream = sum(digits[:, :, i] * power for i, power in enumerate(_POWERS))
        assert isinstance(stream, Tensor)
        return {"codes": stream.to(torch.uint8), **pack_scales(encoded.side, self.scales)}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Encoded:
        stream = tensors["codes"].to(torch.int32)
        digits = torch.stack([torch.div(stream, power, rounding_mode="floor") % 3 for power in _POWERS], 2)
        return Encoded(digits.flatten(1)[:, : shape[1]].contiguous(), unpack_scales(tensors, self.scales))


_FORM = "ternary:{g<n>|row}[:bf16|:s8]"


@reads("ternary", form=_FORM, heads=("ternary",))
def _read(words: Words) -> Ternary:
    group, scales, rest = grouping(words, _FORM)
    if rest or words.arguments:
        raise words.refuse(f"unknown option {(rest or words.arguments)[0]!r}; write {_FORM}.")
    return Ternary(group=group, scales=scales)

"""llama.cpp's tensor types with a code for each weight, as codecs: what is stored are the bytes of a GGUF tensor.

The format is theirs, bit for bit; codes and scales are chosen by this package's solvers. A weight may be a multiple of
the scale of its group of 16 or 32, which itself is a small integer times one float16 for 256 weights.

>>> GgufScalar("q4_k").bits((64, 512)) // 8      # 64 * 2 blocks of 144 bytes
18432
>>> str(GgufScalar("iq4_xs"))
'iq4_xs'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tersor import kernels
from tersor.codecs.gguf_blocks import GgufBlocks
from tersor.codecs.gguf_layout import KINDS, Kind, read, write
from tersor.codecs.text import Words, reads
from tersor.contracts import ScalarGrid, Side
from tersor.errors import BadInput

_TINY = 2.0**-120


@dataclass(frozen=True)
class GgufScalar(GgufBlocks):
    """The GGUF tensor type ``name``: ``q4_0``, ``q6_k``, ``iq4_xs``, …"""

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise BadInput(f"Codec {self.name!r:.80} does not exist: GGUF types are {', '.join(KINDS)}.")

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    def grid(self, side: Side, in_features: int) -> ScalarGrid:
        kind = self.kind
        scale, offset = self.scales(side)
        # Others' blocks may have scales of 0, which no rounding can divide by.
        scale = torch.where(scale == 0, _TINY, scale)
        if kind.table is not None:
            return ScalarGrid(scale, None, torch.tensor([kind.table], dtype=torch.float32), kind.levels, kind.group)
        return ScalarGrid(scale, torch.full_like(scale, kind.zero), None, kind.levels, kind.group, offset)

    def round(self, target: Tensor, side: Side, columns: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.nearest(target, self.grid(side, side["d"].shape[1] * self.kind.block), columns)

    def unit(self, codes: Tensor) -> Tensor:
        if self.kind.table is not None:
            return torch.tensor(self.kind.table, dtype=torch.float32, device=codes.device)[codes.long()]
        return codes.to(torch.float32) - self.kind.zero

    def nearest(self, ratio: Tensor, importance: Tensor) -> Tensor:
        kind = self.kind
        if kind.table is not None:
            return _halves(kind.table)[ratio.mul_(2).floor_().clamp_(-256, 255).to(torch.int64).add_(256)]
        return ratio.round_().clamp_(-kind.zero, kind.levels - 1 - kind.zero)

    def read(self, blocks: Tensor) -> dict[str, Tensor]:
        return read(self.kind, blocks)

    def write(self, numbers: Mapping[str, Tensor]) -> Tensor:
        return write(self.kind, numbers)


@lru_cache(maxsize=1)
def _halves(table: tuple[int, ...]) -> Tensor:
    """The entry of a table nearest to numbers from ``k / 2`` to ``(k + 1) / 2``, for ``k`` from -256 to 255.

    No middle between two entries lies inside such a stretch, so that this is a search by indexing.
    """
    middles = torch.arange(-256, 256) / 2 + 0.25
    entries = torch.tensor(table, dtype=torch.float32)
    return entries[(middles[:, None] - entries).abs().argmin(1)]


@reads("|".join(KINDS), form="a GGUF type such as q4_k, q6_k, iq4_xs", heads=tuple(KINDS))
def _read(words: Words) -> GgufScalar:
    if words.options or words.arguments:
        raise words.refuse(f"GGUF types have no options; write {words.head[0]}.")
    return GgufScalar(words.head[0])

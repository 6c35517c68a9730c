"""llama.cpp's tensor types with a code for 4 or 8 weights, as codecs: a point of a fixed grid, and signs.

>>> GgufVector("iq3_s").bits((64, 512)) // 8      # 64 * 2 blocks of 110 bytes
14080
>>> GgufVector("iq2_xxs").span
8
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tersor.codecs.gguf_blocks import GgufBlocks
from tersor.codecs.gguf_grids import GRIDS, GridKind, parity, read, write
from tersor.codecs.text import Words, reads
from tersor.contracts import Gram, Side
from tersor.errors import BadInput

_ENTRIES = 1 << 18
"""Distances between vectors and grid points that are there at one time."""
_TINY = 2.0**-120
_RATIOS = {
    name: tuple(1 / root for root in roots)
    for name, roots in {
        "iq2_xxs": (18.0, 22.0, 26.0),
        "iq2_xs": (18.5, 21.5, 26.0, 31.0),
        "iq2_s": (18.0, 21.5, 25.0, 30.0),
        "iq3_xxs": (19.0, 24.0, 29.0, 34.0),
        "iq3_s": (5.0, 6.0, 7.0, 8.0),
    }.items()
}
"""Scales that are tried for a group, relative to its root mean square: about those that are best for Gaussian ones."""


@dataclass(frozen=True)
class GgufVector(GgufBlocks):
    """The GGUF tensor type ``name``: ``iq2_xxs``, ``iq2_xs``, ``iq2_s``, ``iq3_xxs`` or ``iq3_s``.

    A code is the numbers of one or two points, and above them a bit for each negative weight. ``worth (in,)``: learned
    of a layer.
    """

    worth: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.name not in GRIDS:
            raise BadInput(f"Codec {self.name!r:.80} does not exist: GGUF types with grids are {', '.join(GRIDS)}.")

    @property
    def span(self) -> int:  # type: ignore[override]
        return self.kind.span

    @property
    def kind(self) -> GridKind:
        return GRIDS[self.name]

    @property
    def ratios(self) -> Sequence[float]:
        return _RATIOS[self.name]

    def learn(self, weight: Tensor, gram: Gram | None) -> GgufVector:
        """This codec with the worth of each column: a vector is nearest where columns that matter more are."""
        if gram is None:
            return self
        diagonal = gram.matrix.diagonal()
        return replace(self, worth=diagonal / diagonal.mean().clamp(min=1e-30) + 1e-6)

    def round(self, target: Tensor, side: Side, columns: Tensor) -> tuple[Tensor, Tensor]:
        groups = columns[:: self.span] // self.kind.group
        scale, _ = self.scales(side)
        scale = torch.where(scale == 0, _TINY, scale)[:, groups]
        vectors = target.reshape(*scale.shape, self.span) / scale[:, :, None]
        worth = None
        if self.worth is not None:
            worth = self.worth[columns].reshape(1, -1, self.span).expand_as(vectors).reshape(-1, self.span)
        codes = self.closest(vectors.reshape(-1, self.span), worth).reshape(scale.shape)
        return codes, (self._vectors(codes) * scale[:, :, None]).reshape(target.shape)

    def unit(self, codes: Tensor) -> Tensor:
        return self._vectors(codes).flatten(1)

    def _vectors(self, codes: Tensor) -> Tensor:
        """Grid points with their signs, ``(…, span)`` float32."""
        kind = self.kind
        below = kind.bits * kind.points
        each = codes[..., None] >> torch.arange(0, below, kind.bits, device=codes.device) & kind.levels - 1
        signs = codes[..., None] >> torch.arange(below, below + kind.span, device=codes.device) & 1
        points = kind.grid.to(codes.device)[each.long()].flatten(-2)
        return torch.where(signs == 1, -points, points)

    def nearest(self, ratio: Tensor, importance: Tensor) -> Tensor:
        # As it will be rounded: by importance only where columns have a worth.
        plain = self.worth is None or importance.numel() == 1
        worth = None if plain else importance.expand_as(ratio).reshape(-1, self.span)
        return self._vectors(self.closest(ratio.reshape(-1, self.span), worth, exact=False)).reshape(ratio.shape)

    def closest(self, target: Tensor, worth: Tensor | None = None, *, exact: bool = True) -> Tensor:
        """Codes ``(n,)`` int32 of the nearest vectors there are to ``target (n, span)``, in units of the scale.

        ``worth``: like ``target``, the cost of an error in each coordinate. Unless ``exact``, the one sign that may
        have to be wrong is that of the smallest number, whatever the point.
        """
        step = max(_ENTRIES // self.kind.levels // self.kind.points, 1)
        pieces = [
            self._closest(target[start : start + step], None if worth is None else worth[start : start + step], exact)
            for start in range(0, max(len(target), 1), step)
        ]
        return torch.cat(pieces)

    def _closest(self, target: Tensor, worth: Tensor | None, exact: bool) -> Tensor:
        kind, grid = self.kind, self.kind.grid
        size = target.abs()
        signs = ((target < 0).to(torch.int32) << torch.arange(kind.span, dtype=torch.int32)).sum(1).to(torch.int32)
        odd = parity(signs).bool() if kind.even else torch.zeros_like(signs, dtype=torch.bool)
        loaded = size if worth is None else size * worth
        if kind.even and not exact:
            at = loaded.argmin(1)
            signs ^= odd.to(torch.int32) << at.to(torch.int32)
            turn = 1.0 - 2.0 * odd.to(torch.float32)
            loaded = loaded.scatter(1, at[:, None], loaded.gather(1, at[:, None]) * turn[:, None])
        # Weighted squared distances, less the target's own square.
        parts = loaded.reshape(-1, kind.dims)
        if worth is None:
            distance = torch.addmm(grid.square().sum(1)[None, :], parts, grid.T, alpha=-2.0)
        else:
            both = torch.cat([worth.reshape(-1, kind.dims), parts], 1)
            distance = both @ torch.cat([grid.square(), grid * -2.0], 1).T
        cost, point = distance.min(1)
        cost, point = cost.reshape(-1, kind.points), point.reshape(-1, kind.points)
        if kind.even and exact:
            some = odd.nonzero()[:, 0]
            wide = distance.reshape(-1, kind.points, kind.levels)[some].reshape(-1, kind.levels)
            turned, at, by = self._turned(loaded[some].reshape(-1, kind.dims), wide)
            # Of two points the one where a wrong sign costs less has it.
            which = (by.reshape(-1, kind.points) - cost[some]).argmin(1, keepdim=True)
            point[some] = point[some].scatter(1, which, turned.reshape(-1, kind.points).gather(1, which))
            bit = at.reshape(-1, kind.points).gather(1, which) + which * kind.dims
            signs[some] ^= (1 << bit[:, 0]).to(torch.int32)
        codes = (point << torch.arange(0, kind.bits * kind.points, kind.bits)).sum(1).to(torch.int32)
        return codes | signs << kind.bits * kind.points

    def _turned(self, loaded: Tensor, distance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best points with one sign wrong: their numbers, where, and what they cost, each ``(n,)``."""
        grid = self.kind.grid
        least = loaded[:, :1] * grid[:, 0]
        for dim in range(1, self.kind.dims):
            least = torch.minimum(least, loaded[:, dim : dim + 1] * grid[:, dim])
        cost, point = distance.add_(least, alpha=4.0).min(1)
        return point, (loaded * grid[point]).argmin(1), cost

    def read(self, blocks: Tensor) -> dict[str, Tensor]:
        return read(self.kind, blocks)

    def write(self, numbers: Mapping[str, Tensor]) -> Tensor:
        return write(self.kind, numbers)


@reads("|".join(GRIDS), form="a GGUF type with a grid such as iq3_s", heads=tuple(GRIDS))
def _read(words: Words) -> GgufVector:
    if words.options or words.arguments:
        raise words.refuse(f"GGUF types have no options; write {words.head[0]}.")
    return GgufVector(words.head[0])

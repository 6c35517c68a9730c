"""A lookup table per row: the non-uniform scalar codec of SqueezeLLM (arXiv:2306.07629, §4.1), without its sparse part.

With a group, each so many columns of a row have a table of their own.

>>> LookupTable(3).bits((64, 128)) // 8        # 64 * 48 bytes of codes + 64 * 8 entries of 2 bytes
4096
>>> LookupTable(3, 64).bits((64, 128)) // 8    # two tables a row
5120
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor import kernels
from tersor.codecs.grouped import groups_of
from tersor.codecs.packing import pack, packed_width, unpack
from tersor.codecs.refit import least_squares, quadratic
from tersor.codecs.text import Words, grouping, reads
from tersor.contracts import Encoded, LeafCodec, Part, ScalarGrid, Shape, Side
from tersor.errors import BadInput

_ITERATIONS = 25
_SWEEPS = 3
"""Over a row's groups when refitting. On correlated inputs a fourth lowers the error by at most a thousandth."""


@dataclass(frozen=True)
class LookupTable(LeafCodec):
    """``bits`` per weight (2–4) into ``2^bits`` float16 values, kept ascending, that each row has for itself.

    With ``group``, each so many columns of a row have them for themselves. A row's tables lie side by side:
    ``table (rows, groups · 2^bits)``.
    """

    bits_per_code: int
    group: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits_per_code <= 4:
            raise BadInput(f"Codec lut{self.bits_per_code} does not exist: lookup tables have 2 to 4 bits.")

    def __str__(self) -> str:
        return f"lut{self.bits_per_code}:" + ("row" if self.group is None else f"g{self.group}")

    @property
    def levels(self) -> int:
        return int(2**self.bits_per_code)

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        groups = groups_of(self, self.group, columns)
        codes = Part("codes", torch.uint8, (rows, packed_width(columns, self.bits_per_code)))
        return (codes, Part("table", torch.float16, (rows, groups * self.levels)))

    def segment(self, in_features: int) -> int:
        return self.group or in_features

    def prepare(self, weight: Tensor, importance: Tensor | None = None) -> Side:
        """``importance``: of columns, ``(in,)``, or of single weights, ``(rows, in)``."""
        rows, columns = weight.shape
        groups = groups_of(self, self.group, columns)
        if groups > 1:
            shape = (rows * groups, columns // groups)
            importance = None if importance is None else importance.expand(rows, columns).reshape(shape)
            weight = weight.reshape(shape)
        table = weighted_kmeans(weight, importance, self.levels)
        return {"table": _storable(table).reshape(rows, groups * self.levels)}

    def prepare_segment(self, side: Side, weight: Tensor, start: int, importance: Tensor | None = None) -> Side:
        first = start // weight.shape[1] * self.levels
        table = side["table"].clone()
        table[:, first : first + self.levels] = _storable(weighted_kmeans(weight, importance, self.levels))
        return {"table": table}

    def grid(self, side: Side, in_features: int) -> ScalarGrid:
        table = side["table"]
        ones = torch.ones(table.shape[0], table.shape[1] // self.levels)
        return ScalarGrid(ones, None, table, self.levels, self.group or in_features)

    def round(self, target: Tensor, side: Side, columns: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.nearest(target, self.grid(side, int(columns.max()) + 1), columns)

    def values(self, encoded: Encoded, in_features: int) -> Tensor:
        entries = encoded.codes.long()
        if self.group is not None:
            column = torch.arange(in_features, device=entries.device)
            entries = entries + column // self.group * self.levels
        return torch.gather(encoded.side["table"], 1, entries)

    def refit(self, weight: Tensor, encoded: Encoded, gram: Tensor) -> Side:
        """Least squares for the table entries of each row, under ``tr(E H Eᵀ)``, codes fixed.

        Exact for one table a row. Those of groups are fitted one after the other, the others as they stand, in a few
        sweeps: no step raises the error, and a row's entries may be too many to be solved for together. What a table
        loses to float16, those after it make good.
        """
        columns = weight.shape[1]
        width = self.group or columns
        codes, table = encoded.codes.long(), encoded.side["table"].clone()
        product = weight @ gram
        values = self.values(encoded, columns)
        stretches = [slice(start, start + width) for start in range(0, columns, width)]
        normals = [self._normal(codes[:, here], gram[here, here]) for here in stretches]
        for _ in range(_SWEEPS if len(stretches) > 1 else 1):
            for at, (here, normal) in enumerate(zip(stretches, normals, strict=True)):
                wanted = product[:, here]
                if len(stretches) > 1:
                    values[:, here] = 0.0
                    wanted = wanted - values @ gram[:, here]
                own = table[:, at * self.levels : (at + 1) * self.levels]
                own.copy_(self._fitted(codes[:, here], normal, wanted, own))
                values[:, here] = torch.gather(own, 1, codes[:, here])
        return {"table": table}

    def _normal(self, codes: Tensor, gram: Tensor) -> Tensor:
        """``A (rows, levels, levels)`` of one table: ``A_kl = u_kᵀ H u_l``, ``u_k`` the indicator of code ``k``.

        ``codes (rows, n)`` int64, ``gram (n, n)``.
        """
        rows = len(codes)
        normal = torch.empty(rows, self.levels, self.levels)
        for level in range(self.levels):
            spread = (codes == level).to(torch.float32) @ gram
            normal[:, level] = torch.zeros(rows, self.levels).scatter_add_(1, codes, spread)
        return normal

    def _fitted(self, codes: Tensor, normal: Tensor, wanted: Tensor, old: Tensor) -> Tensor:
        """Entries ``(rows, levels)`` that solve ``A t = b``, ``b_k = u_kᵀ wanted``; see :meth:`_normal`.

        ``wanted (rows, n)``: ``H w`` less what the weights of other tables take of it. A row keeps its ``old`` table
        where the stored new one is not better or not ascending.
        """
        right = torch.zeros(old.shape).scatter_add_(1, codes, wanted)
        solved = least_squares(normal, right)
        # Entries that no weight uses are not determined; they stay.
        used = torch.zeros(old.shape).scatter_(1, codes, 1.0) > 0
        stored = _storable(torch.where(used & torch.isfinite(solved), solved, old))
        better = quadratic(normal, right, stored) < quadratic(normal, right, old)
        better &= (stored.diff(dim=1) >= 0).all(1)
        return torch.where(better[:, None], stored, old)

    def pack(self, encoded: Encoded, shape: Shape) -> dict[str, Tensor]:
        codes = pack(encoded.codes, self.bits_per_code)
        return {"codes": codes, "table": encoded.side["table"].to(torch.float16)}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Encoded:
        codes = unpack(tensors["codes"], self.bits_per_code, shape[1])
        return Encoded(codes, {"table": tensors["table"].to(torch.float32)})


def _storable(table: Tensor) -> Tensor:
    return table.clamp(-65504.0, 65504.0).to(torch.float16).to(torch.float32)


def weighted_kmeans(weight: Tensor, importance: Tensor | None, levels: int) -> Tensor:
    """Ascending centroids ``(rows, levels)`` of each row of ``weight (rows, in)`` under ``Σ importance (w − ŵ)²``.

    ``importance``: ``(in,)`` or ``(rows, in)``. Lloyd's iteration on sorted rows, where a cluster is a stretch and its
    weighted mean a difference of prefix sums: an iteration costs ``levels`` binary searches a row instead of a pass
    over the weights. Starts from equal shares of ``importance^(1/3)``-weighted mass, the companding density that is
    optimal at high rate (Panter and Dite, 1951).
    """
    rows, columns = weight.shape
    # Dead columns (importance 0) must not make empty sums; they get a whisper of the mean.
    given = torch.ones(columns) if importance is None else importance
    mass = given / given.mean(-1, keepdim=True).clamp(min=1e-30) + 1e-6
    ordered, index = torch.sort(weight, dim=1)
    share = torch.gather(mass.expand(rows, columns), 1, index).double()
    zeros = torch.zeros(rows, 1, dtype=torch.float64)
    sums = torch.cat([zeros, torch.cumsum(share, 1)], 1)
    moments = torch.cat([zeros, torch.cumsum(share * ordered, 1)], 1)
    # High-rate point density goes with the cube root of the probability density: spread points by rank and range alike.
    quantiles = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    ranks = torch.searchsorted(sums, (quantiles[None, :] * sums[:, -1:]).contiguous()).clamp(1, columns) - 1
    by_rank = torch.gather(ordered, 1, ranks).double()
    low, high = ordered[:, :1].double(), ordered[:, -1:].double()
    centroids = 0.65 * by_rank + 0.35 * (low + (high - low) * quantiles[None, :])
    values = ordered.double()
    for _ in range(_ITERATIONS):
        middles = ((centroids[:, :-1] + centroids[:, 1:]) * 0.5).contiguous()
        cuts = torch.cat([zeros.long(), torch.searchsorted(values, middles), zeros.long() + columns], 1)
        amount = torch.gather(sums, 1, cuts).diff(dim=1)
        moment = torch.gather(moments, 1, cuts).diff(dim=1)
        centroids = torch.where(amount > 0, moment / amount.clamp(min=1e-300), centroids)
        centroids = centroids.sort(dim=1).values
    return centroids.to(torch.float32)


_FORM = "lut{2-4}:{g<n>|row}"


@reads(r"lut(\d{1,2})", form=_FORM, heads=("lut2", "lut3", "lut4"))
def _read(words: Words) -> LookupTable:
    group, scales, rest = grouping(words, _FORM)
    if rest or scales != "fp16":
        raise words.refuse(f"entries of tables are float16, and there are no other options; write {_FORM}.")
    return LookupTable(int(words.head[1]), group)

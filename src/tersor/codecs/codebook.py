"""Vector codebooks, one set per layer: VPTQ (arXiv:2409.17066), with residual stages as in AQLM (arXiv:2401.06118).

>>> Codebook(8, 4).bits((64, 128)) // 8           # 64 * 32 bytes of codes, 64 scales, 256 * 4 entries of 2 bytes
4224
>>> str(Codebook(8, 4, stages=2))
'vq8x4:r2'
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tersor.codecs.text import Words, reads
from tersor.codecs.vector import RowScaled
from tersor.contracts import Encoded, Gram, LeafCodec, Part, Shape
from tersor.errors import BadInput
from tersor.kernels.codebook import nearest_sums

_SAMPLES = 1 << 16
"""Vectors of a layer that a codebook is learned from."""
_ROWS = 512
"""Rows whose vectors are weighed at one time."""
_STEPS, _COARSE, _FEWER = 12, 8, 4
"""Of k-means; the first ones see one vector in four."""
_BEAM = 8
"""First-stage vectors that a residual code is sought from."""


@dataclass(frozen=True)
class Codebook(RowScaled):
    """``index_bits`` for ``dim`` columns from a float16 codebook, the sum of ``stages`` such vectors; a scale per row.

    ``book (stages, 2^index_bits, dim)``: what :meth:`learn` found, or None. It is not part of the codec's identity.
    """

    index_bits: int
    dim: int
    stages: int = 1
    book: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not (1 <= self.index_bits <= 14 and 2 <= self.dim <= 16 and 1 <= self.stages <= 4):
            raise BadInput(
                f"Codec {self} does not exist: codebooks have 1 to 14 bits an index, vectors of 2 to 16 columns and 1 "
                f"to 4 stages."
            )
        if self.code_bits > 30:
            raise BadInput(
                f"Codec {self} does not exist: its {self.stages} stages of {self.index_bits} bits make "
                f"{self.code_bits} bits a vector, and at most 30 are possible."
            )

    def __str__(self) -> str:
        return f"vq{self.index_bits}x{self.dim}" + (f":r{self.stages}" if self.stages > 1 else "")

    @property
    def span(self) -> int:  # type: ignore[override]
        return self.dim

    @property
    def code_bits(self) -> int:
        return self.index_bits * self.stages

    @property
    def sampled(self) -> bool:
        return False

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        book = Part("codebook", torch.float16, (self.stages, 2**self.index_bits, self.dim), shared=True)
        return (*super().parts(shape), book)

    def learn(self, weight: Tensor, gram: Gram | None) -> LeafCodec:
        """Stage by stage, k-means of what the stages before have left; rows are scaled to root mean square 1.

        Vectors go to the nearest entry, as they will when codes are chosen; an entry is the mean of its vectors
        weighted with ``H_jj`` of their columns and the square of their row's scale.
        """
        columns = weight.shape[1]
        per_row = self.spans(columns)
        generator = torch.Generator().manual_seed(0)
        importance = torch.ones(columns)
        if gram is not None:
            diagonal = gram.matrix.diagonal().float()
            importance = diagonal / diagonal.mean().clamp(min=1e-30) + 1e-4
        scale = self.prepare(weight.float())["scale"]
        picks, worth = drawn(weight, importance, self.dim, generator)
        rows, at = picks // per_row, picks % per_row
        vectors = weight.reshape(-1, self.dim)[picks].float() / scale[rows]
        # A row of zeros has nothing to say; other rows count as their errors will.
        share = (scale.square() / scale.square().mean().clamp(min=1e-30))[rows]
        mass = (importance.reshape(per_row, self.dim)[at] * share + 1e-12) * worth[:, None]
        books = []
        for _ in range(self.stages):
            entries = kmeans(vectors, mass, 2**self.index_bits, generator).to(torch.float16).float()
            books.append(entries)
            if len(vectors):
                vectors = vectors - entries[nearest_sums(vectors, entries[None], 1).long()]
        return replace(self, book=torch.stack(books))

    def unit(self, codes: Tensor) -> Tensor:
        book = self._learned().to(codes.device)
        values = book[0][(codes & (2**self.index_bits - 1)).long()]
        for stage in range(1, self.stages):
            index = (codes >> (stage * self.index_bits)) & (2**self.index_bits - 1)
            values = values + book[stage][index.long()]
        return values

    def closest(self, target: Tensor) -> Tensor:
        """The nearest entry; with stages, the best of a beam that keeps the ``8`` best sums after each."""
        return nearest_sums(target, self._learned(), _BEAM)

    def closest_under(self, target: Tensor, root: Tensor) -> Tensor:
        """The same among entries that are multiplied by ``root``, as the target is: exact for one stage.

        With stages, what :meth:`closest` finds where that is better, so that what can be represented stays.
        """
        found = nearest_sums(target @ root, self._learned() @ root, _BEAM)
        if self.stages == 1:
            return found
        plain = self.closest(target)
        lost = [((target - self.unit(codes)) @ root).square().sum(1) for codes in (found, plain)]
        return torch.where(lost[0] < lost[1], found, plain)

    def pack(self, encoded: Encoded, shape: Shape) -> dict[str, Tensor]:
        return {**super().pack(encoded, shape), "codebook": self._learned().to(torch.float16)}

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        learned = replace(self, book=tensors["codebook"].to(torch.float32))
        return learned.values(self.unpack(tensors, shape), shape[1])

    def _learned(self) -> Tensor:
        if self.book is None:
            raise ValueError(f"codec {self} has no codebook yet: call learn(weight, gram) first")
        return self.book


def drawn(weight: Tensor, importance: Tensor, dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """At most 65,536 of the vectors of ``weight (rows, in)``: the dearest, and some of the others.

    One weight of twenty times its row's spread, at an input of a hundred times the mean energy, can be the whole error
    of a layer when no entry is near it. Returns numbers ``(n,)`` int64 and how many vectors each stands for, ``(n,)``.
    """
    total = weight.numel() // dim
    if total <= _SAMPLES:
        return torch.arange(total), torch.ones(total)
    cost = torch.cat(
        [(piece.float().square() * importance).reshape(-1, dim).sum(1) for piece in weight.split(_ROWS)]  # type: ignore[no-untyped-call]
    )
    dear = torch.zeros(total, dtype=torch.bool)
    dear[cost.topk(_SAMPLES // 4).indices] = True
    rest = (~dear).nonzero()[:, 0]
    some = rest[torch.randperm(len(rest), generator=generator)[: _SAMPLES - _SAMPLES // 4]]
    worth = torch.ones(total)
    worth[some] = len(rest) / len(some)
    dear[some] = True
    picks = dear.nonzero()[:, 0]
    return picks, worth[picks]


def kmeans(vectors: Tensor, mass: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` entries ``(count, dim)``: Lloyd's iteration from vectors drawn, with ``mass (n, dim)`` in the means.

    An entry that nothing is nearest to starts anew beside the one that costs most. Where there are fewer vectors than
    entries, the rest are zeros.
    """
    n, dim = vectors.shape
    entries = torch.zeros(count, dim)
    if n <= count:
        entries[:n] = vectors
        return entries
    # Where a vector's error would count, entries begin denser.
    length = (mass * vectors.square()).sum(1).sqrt().clamp(min=1e-30)
    entries = vectors[torch.multinomial(length, count, generator=generator)].clone()
    few = torch.randperm(n, generator=generator)[: n // _FEWER]
    for step in range(_STEPS):
        if step < _COARSE and len(few) >= _FEWER * count:
            points, weights = vectors[few], mass[few]
        else:
            points, weights = vectors, mass
        index = nearest_sums(points, entries[None], 1).long()
        total = torch.zeros(count, dim, dtype=torch.float64).index_add_(0, index, weights.double())
        moment = torch.zeros(count, dim, dtype=torch.float64).index_add_(0, index, (weights * points).double())
        entries = torch.where(total > 0, moment / total.clamp(min=1e-300), entries.double()).float()
        used = torch.bincount(index, minlength=count)
        empty = (used == 0).nonzero()[:, 0]
        if len(empty) and step < _STEPS - 3:
            # Split the dearest: its farthest direction is found by the next steps from two starts a whisper apart.
            cost = (weights * (points - entries[index]).square()).sum(1).double()
            dearest = torch.zeros(count, dtype=torch.float64).index_add_(0, index, cost)
            twins = dearest.sort(descending=True, stable=True).indices[: len(empty)]
            spread = 0.05 * torch.randn(len(twins), dim, generator=generator)
            entries[empty[: len(twins)]] = entries[twins] + spread * points.std()
    return entries


_FORM = "vq<bits>x<columns>[:r<stages>]"


@reads(r"vq(\d{1,2})x(\d{1,2})", form=_FORM, heads=("vq8x4", "vq8x8", "vq12x6"))
def _read(words: Words) -> Codebook:
    stages = [found[1] for option in words.options if (found := re.fullmatch(r"r([2-9])", option))]
    if len(stages) != len(words.options) or len(stages) > 1 or words.arguments:
        raise words.refuse(f"write {_FORM}, with 2 to 4 stages if any.")
    return Codebook(int(words.head[1]), int(words.head[2]), int(stages[0]) if stages else 1)

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

_SAMPLES = 1 << 16
"""Vectors of a layer that a codebook is learned from."""
_STEPS = 14
_TREE_DIM, _TREE_LEAST = 4, 256
"""Up to how many dimensions, and from how many entries, the nearest one is found by a tree."""
_BEAM = 8
"""First-stage vectors that a residual code is sought from."""
_PRODUCTS = 1 << 22
"""Distances held at one time."""


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
        total = weight.shape[0] * per_row
        generator = torch.Generator().manual_seed(0)
        picks = torch.arange(total)
        if total > _SAMPLES:
            picks = torch.randperm(total, generator=generator)[:_SAMPLES].sort().values
        rows, at = picks // per_row, picks % per_row
        importance = torch.ones(columns)
        if gram is not None:
            diagonal = gram.matrix.diagonal().float()
            importance = diagonal / diagonal.mean().clamp(min=1e-30) + 1e-4
        scale = self.prepare(weight.float())["scale"][rows]
        vectors = weight.reshape(-1, self.dim)[picks].float() / scale
        # A row of zeros has nothing to say; other rows count as their errors will.
        share = scale.square() / scale.square().mean().clamp(min=1e-30)
        mass = importance.reshape(per_row, self.dim)[at] * share + 1e-12
        books = []
        for _ in range(self.stages):
            entries = kmeans(vectors, mass, 2**self.index_bits, generator).to(torch.float16).float()
            books.append(entries)
            if len(vectors):
                vectors = vectors - entries[nearest(vectors, entries, 1)[:, 0]]
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
        book = self._learned()
        width = min(_BEAM, 2**self.index_bits) if self.stages > 1 else 1
        index = nearest(target, book[0], width)
        if self.stages == 1:
            return index[:, 0].to(torch.int32)
        codes, sums = index, book[0][index]
        for stage in range(1, self.stages):
            left = (target[:, None] - sums).reshape(-1, self.dim)
            found = nearest(left, book[stage], width).reshape(len(target), -1)
            parents = torch.arange(codes.shape[1]).repeat_interleave(width)
            codes = codes[:, parents] + (found << (stage * self.index_bits))
            sums = sums[:, parents] + book[stage][found]
            loss = (target[:, None] - sums).square().sum(2)
            keep = loss.sort(dim=1, stable=True).indices[:, :width]
            codes = torch.gather(codes, 1, keep)
            sums = torch.gather(sums, 1, keep[:, :, None].expand(-1, -1, self.dim))
        return codes[:, 0].to(torch.int32)

    def pack(self, encoded: Encoded, shape: Shape) -> dict[str, Tensor]:
        return {**super().pack(encoded, shape), "codebook": self._learned().to(torch.float16)}

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        learned = replace(self, book=tensors["codebook"].to(torch.float32))
        return learned.values(self.unpack(tensors, shape), shape[1])

    def _learned(self) -> Tensor:
        if self.book is None:
            raise ValueError(f"codec {self} has no codebook yet: call learn(weight, gram) first")
        return self.book


def nearest(vectors: Tensor, entries: Tensor, count: int) -> Tensor:
    """Numbers ``(n, count)`` int64 of the ``entries (k, dim)`` nearest to each of ``vectors (n, dim)``, best first."""
    if count == 1 and entries.shape[1] <= _TREE_DIM and len(entries) >= _TREE_LEAST:
        # In few dimensions a tree looks at a handful of entries instead of all.
        from scipy.spatial import cKDTree  # here, as running a model needs no trees, and 30 MB less

        tree = cKDTree(entries.double().numpy())
        return torch.from_numpy(tree.query(vectors.double().numpy())[1]).reshape(-1, 1)
    half = entries.square().sum(1) * 0.5
    step = max(_PRODUCTS // len(entries), 1)
    found = []
    for piece in vectors.split(step):  # type: ignore[no-untyped-call]
        score = torch.addmm(half, piece, entries.T, alpha=-1.0)
        if count == 1:
            found.append(score.argmin(1, keepdim=True))
        else:
            found.append(score.topk(count, dim=1, largest=False, sorted=True).indices)
    return torch.cat(found) if found else torch.empty(0, count, dtype=torch.int64)


def kmeans(vectors: Tensor, mass: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` entries ``(count, dim)``: Lloyd's iteration from random vectors, with ``mass (n, dim)`` in the means.

    An entry that nothing is nearest to starts anew beside the one that costs most. Where there are fewer vectors than
    entries, the rest are zeros.
    """
    n, dim = vectors.shape
    entries = torch.zeros(count, dim)
    if n <= count:
        entries[:n] = vectors
        return entries
    entries = vectors[torch.randperm(n, generator=generator)[:count]].clone()
    for step in range(_STEPS):
        index = nearest(vectors, entries, 1)[:, 0]
        total = torch.zeros(count, dim, dtype=torch.float64).index_add_(0, index, mass.double())
        moment = torch.zeros(count, dim, dtype=torch.float64).index_add_(0, index, (mass * vectors).double())
        entries = torch.where(total > 0, moment / total.clamp(min=1e-300), entries.double()).float()
        used = torch.bincount(index, minlength=count)
        empty = (used == 0).nonzero()[:, 0]
        if len(empty) and step < _STEPS - 3:
            # Split the dearest: its farthest direction is found by the next steps from two starts a whisper apart.
            cost = (mass * (vectors - entries[index]).square()).sum(1).double()
            dearest = torch.zeros(count, dtype=torch.float64).index_add_(0, index, cost)
            twins = dearest.sort(descending=True, stable=True).indices[: len(empty)]
            spread = 0.05 * torch.randn(len(twins), dim, generator=generator)
            entries[empty[: len(twins)]] = entries[twins] + spread * vectors.std()
    return entries


_FORM = "vq<bits>x<columns>[:r<stages>]"


@reads(r"vq(\d{1,2})x(\d{1,2})", form=_FORM, heads=("vq8x4", "vq8x8", "vq12x6"))
def _read(words: Words) -> Codebook:
    stages = [found[1] for option in words.options if (found := re.fullmatch(r"r([2-9])", option))]
    if len(stages) != len(words.options) or len(stages) > 1 or words.arguments:
        raise words.refuse(f"write {_FORM}, with 2 to 4 stages if any.")
    return Codebook(int(words.head[1]), int(words.head[2]), int(stages[0]) if stages else 1)

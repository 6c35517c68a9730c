"""Of every ``m`` neighbouring columns ``n`` weights are kept, the rest zero: n:m sparsity, 2:4 for one.

One weight of every group goes at a time, the one whose absence costs least by itself, ``|w| √H_jj`` (Wanda,
arXiv:2306.11695, §3), and what is left of the row becomes least squares under the whole Gram matrix before the next
goes; SparseGPT (arXiv:2301.00774) chooses and corrects a block of columns after the other. A group's choice is stored
as its number among the subsets, in ``⌈log2 C(m, n)⌉`` bits: 3 for 2:4, where two positions would take 4.

Kept weights are float16, or go side by side, ``(out, in · n / m)``, into another codec. Where that one rounds single
columns (integers, small floats, tables), the solver works on the whole row with the support held fixed
(:mod:`tersor.codecs.supported`); the least-squares weights are the target, because errors of weights on the support
count the same from there as from the original ones. Any other codec encodes the compact rows by themselves, with the
mean importance of each group: which inputs a kept weight belongs to differs from row to row, so they have no Gram
matrix in common.

>>> from tersor.codecs import parse
>>> parse("sparse2of4").bits((64, 96)) / (64 * 96), parse("sparse2of4(int4:row)").bits((64, 96)) / (64 * 96) - 16 / 96
(8.75, 2.75)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import comb

import torch
from torch import Tensor

from tersor.codecs.dense import Dense
from tersor.codecs.inner import under
from tersor.codecs.packing import packed_width
from tersor.codecs.rows import RowStretches
from tersor.codecs.supported import Supported
from tersor.codecs.text import Words, parse, reads
from tersor.codecs.wide import pack_wide, unpack_wide
from tersor.contracts import Codec, CompositeCodec, Encode, Gram, LeafCodec, Part, Shape
from tersor.errors import BadInput, ShapeMismatch

_PREFIX = "v_"
_STEPS, _FEW_STEPS = 16, 8
"""Of conjugate gradients for the kept weights, and before the last of them went; 32 would lower the loss by 0.1 %."""
_DAMPING = 0.01
_HALF = Dense("fp16")


@dataclass(frozen=True)
class SemiStructured(CompositeCodec):
    """``kept`` of every ``group`` columns, in ``inner``. Parts: ``patterns``, and ``v_<part>`` of the inner codec."""

    kept: int
    group: int
    inner: Codec = _HALF

    def __post_init__(self) -> None:
        if not 1 <= self.kept < self.group <= 16:
            raise BadInput(
                f"Codec sparse{self.kept}of{self.group} does not exist: it keeps at least 1 and fewer than all of at "
                f"most 16 columns."
            )
        if isinstance(self.inner, RowStretches):
            raise BadInput(f"{self} has rows(...) inside; write rows(...) around it.")

    def __str__(self) -> str:
        return f"sparse{self.kept}of{self.group}" + ("" if self.inner == _HALF else f"({self.inner})")

    @property
    def pattern_bits(self) -> int:
        """Bits of a group's choice: ``⌈log2 C(m, n)⌉``."""
        return (comb(self.group, self.kept) - 1).bit_length()

    def width(self, in_features: int) -> int:
        """Kept weights of a row. Raises ShapeMismatch when groups do not fill it."""
        if in_features % self.group:
            raise ShapeMismatch(
                f"Codec {self} cannot take a layer of {in_features} inputs: its group of {self.group} does not divide "
                f"{in_features}."
            )
        return in_features // self.group * self.kept

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        width = self.width(columns)
        patterns = Part("patterns", torch.uint8, (rows, packed_width(columns // self.group, self.pattern_bits)))
        return (patterns, *(replace(part, name=_PREFIX + part.name) for part in self.inner.parts((rows, width))))

    def tile(self, rows: int) -> int:
        return self.inner.tile(rows)

    @property
    def sampled(self) -> bool:
        return self.inner.sampled

    @property
    def by_rows(self) -> bool:
        return isinstance(self.inner, Dense) or (isinstance(self.inner, LeafCodec) and self.inner.sampled)

    def learn(self, weight: Tensor, gram: Gram | None) -> SemiStructured:
        # An inner codec that goes by rows learns from a layer's shape alone.
        if not isinstance(self.inner, LeafCodec):
            return self
        return replace(self, inner=self.inner.learn(weight[:, : self.width(weight.shape[1])], None))

    def choose(self, weight: Tensor, gram: Gram | None) -> tuple[Tensor, Tensor]:
        """Numbers of the kept subsets ``(out, in / m)`` int64, and ``(out, in)`` what their weights are to be.

        Of equally important weights the first are kept.
        """
        if gram is None:
            return _numbers(self.kept, self.group)[(1 << self._best(weight.abs(), self.kept)).sum(2)], weight
        size = gram.matrix.diagonal().clamp(min=0).sqrt()
        values, support = weight, torch.ones_like(weight)
        for kept in range(self.group - 1, self.kept - 1, -1):
            best = self._best(torch.where(support > 0, values.abs() * size, -1), kept)
            support = torch.zeros_like(weight).reshape(len(weight), -1, self.group).scatter_(2, best, 1.0).flatten(1)
            values = refit(weight, support, gram.matrix, values, _FEW_STEPS if kept > self.kept else _STEPS)
        return _numbers(self.kept, self.group)[(1 << best).sum(2)], values

    def _best(self, score: Tensor, kept: int) -> Tensor:
        """Places within each group of its ``kept`` highest scores, ``(out, in / m, kept)`` int64."""
        grouped = score.reshape(len(score), -1, self.group)
        return torch.argsort(grouped, dim=2, descending=True, stable=True)[:, :, :kept]

    def columns(self, numbers: Tensor) -> Tensor:
        """Column numbers ``(rows, in · n / m)`` int64 of the kept weights, ascending."""
        table = subsets(self.kept, self.group).to(numbers.device)
        inside = table[numbers.clamp(max=len(table) - 1)]
        first = torch.arange(numbers.shape[1], device=numbers.device) * self.group
        return (inside + first[:, None]).flatten(1)

    def encode(self, weight: Tensor, gram: Gram | None, encode: Encode) -> tuple[dict[str, Tensor], Tensor]:
        self.width(weight.shape[1])
        numbers, wanted = self.choose(weight, gram)
        at = self.columns(numbers)
        width = at.shape[1]
        if gram is not None and isinstance(self.inner, LeafCodec) and Supported.fits(self.inner, self.kept, width):
            tensors, result = encode(wanted, Supported(self.inner, self.kept, self.group, at), gram)
        else:
            importance = None
            if gram is not None:
                key = f"sparse{self.kept}of{self.group}"
                importance = encode.transformed(gram, key, lambda: self._importance(gram))
            tensors, values = encode(torch.gather(wanted, 1, at), self.inner, importance)
            result = torch.zeros_like(weight).scatter_(1, at, values)
        patterns = pack_wide(numbers, self.pattern_bits)
        return {"patterns": patterns, **{_PREFIX + name: tensor for name, tensor in tensors.items()}}, result

    def _importance(self, gram: Gram) -> Gram:
        """A diagonal Gram matrix of the kept weights side by side: of each group the mean of its inputs."""
        mean = gram.matrix.diagonal().reshape(-1, self.group).mean(1)
        return Gram(torch.diag(mean.repeat_interleave(self.kept)), gram.tokens)

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return self.decode_rows(tensors, shape, slice(None))

    def decode_rows(self, tensors: Mapping[str, Tensor], shape: Shape, rows: slice | Tensor) -> Tensor:
        inner = (shape[0], self.width(shape[1]))
        values = self.inner.decode_rows(under(tensors, _PREFIX), inner, rows)
        numbers = unpack_wide(tensors["patterns"][rows], self.pattern_bits, shape[1] // self.group)
        result = torch.zeros(len(values), shape[1], dtype=torch.float32, device=values.device)
        return result.scatter_(1, self.columns(numbers), values)


@cache
def subsets(kept: int, group: int) -> Tensor:
    """All subsets of ``0 … group − 1`` of ``kept`` members, ``(C(m, n), n)`` int64, in lexicographic order."""
    return torch.tensor(list(itertools.combinations(range(group), kept)))


@cache
def _numbers(kept: int, group: int) -> Tensor:
    """The number of a subset by its members as bits, ``(2^group,)`` int64."""
    table = torch.zeros(1 << group, dtype=torch.int64)
    known = subsets(kept, group)
    table[(1 << known).sum(1)] = torch.arange(len(known))
    return table


def refit(weight: Tensor, support: Tensor, matrix: Tensor, begin: Tensor, steps: int) -> Tensor:
    """Weights on ``support (out, in)``, ones and zeros, that lower ``tr(E H Eᵀ)``; zero elsewhere.

    ``steps`` of conjugate gradients from ``begin (out, in)`` for all rows at once, each with its own support,
    preconditioned by the diagonal. A little is added to the diagonal, which draws the kept weights to what they were.
    Rows that do not get better than those of ``weight`` on the support become these.
    """
    plain = weight * support
    damping = _DAMPING * matrix.diagonal().mean() + 1e-30
    inverse = support / (matrix.diagonal() + damping)

    def product(rows: Tensor) -> Tensor:
        return (rows @ matrix + damping * rows) * support

    values = begin * support
    left = product(weight - values)
    preconditioned = inverse * left
    direction = preconditioned.clone()
    size = (left * preconditioned).sum(1, keepdim=True)
    for _ in range(steps):
        spread = product(direction)
        step = size / (direction * spread).sum(1, keepdim=True).clamp(min=1e-30)
        values = values + step * direction
        left = left - step * spread
        preconditioned = inverse * left
        now = (left * preconditioned).sum(1, keepdim=True)
        direction = preconditioned + now / size.clamp(min=1e-30) * direction
        size = now
    losses = [(((weight - v) @ matrix) * (weight - v)).sum(1) for v in (plain, values)]
    better = (losses[1] < losses[0])[:, None] & torch.isfinite(values).all(1, keepdim=True)
    return torch.where(better, values, plain)


@reads(r"sparse(\d{1,2})of(\d{1,2})", form="sparse<n>of<m>[(<codec>)]", heads=("sparse2of4",))
def _read(words: Words) -> SemiStructured:
    if words.options or len(words.arguments) > 1:
        raise words.refuse("write sparse<n>of<m>, such as sparse2of4, or sparse<n>of<m>(<codec>).")
    sizes = int(words.head[1]), int(words.head[2])
    return SemiStructured(*sizes, parse(words.arguments[0])) if words.arguments else SemiStructured(*sizes)

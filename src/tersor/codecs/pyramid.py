"""Pyramid vector quantization (Fischer, 1986): a shape with K unit pulses on N columns, and a gain (arXiv:2410.16926).

Nothing is stored but numbers: a shape is an integer vector whose magnitudes sum to K, and all of them are counted, so
its number takes exactly ``⌈log2 N(N, K)⌉`` bits and no codebook.

>>> Pyramid(2, 16).pulses, Pyramid(2, 16).code_bits       # 23 bits of index and 8 of gain for 16 columns
(7, 31)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from tersor.codecs.scales import storable
from tersor.codecs.text import Words, reads
from tersor.codecs.vector import RowScaled
from tersor.contracts import Side
from tersor.errors import BadInput

_GAIN_BITS = 8
_HEADROOM = 1.2
"""Error feedback makes some vectors longer than the longest of the row; gains reach this much further."""
_SWAPS = 3
_DECODED = 1 << 18
"""Vectors decoded at one time."""


def count(dimensions: int, pulses: int) -> int:
    """Integer vectors of ``dimensions`` whose magnitudes sum to ``pulses``.

    >>> count(2, 3), count(16, 6)
    (12, 1549824)
    """
    return _counts(dimensions, pulses)[dimensions][pulses]


@lru_cache(maxsize=64)
def _counts(dimensions: int, pulses: int) -> tuple[tuple[int, ...], ...]:
    rows = [(1,) + (0,) * pulses]
    for _ in range(dimensions):
        row = [1]
        for k in range(1, pulses + 1):
            row.append(rows[-1][k] + rows[-1][k - 1] + row[k - 1])
        rows.append(tuple(row))
    return tuple(rows)


@lru_cache(maxsize=64)
def _tables(dimensions: int, pulses: int) -> tuple[Tensor, Tensor]:
    """``ways (l, k)``: vectors of ``l`` columns and ``k`` pulses; ``first (l, k, m)``: those before magnitude ``m``.

    Of ``l`` columns with ``k`` pulses, vectors are numbered by the magnitude of the first column, positive before
    negative, then by the rest. Magnitudes above ``k`` get a number that is never reached.
    """
    ways = _counts(dimensions, pulses)
    first = torch.full((dimensions + 1, pulses + 1, pulses + 1), torch.iinfo(torch.int64).max)
    for columns in range(1, dimensions + 1):
        for k in range(pulses + 1):
            before = 0
            for m in range(k + 1):
                first[columns, k, m] = before
                before += ways[columns - 1][k - m] * (1 if m == 0 else 2)
    return torch.tensor(ways), first


@dataclass(frozen=True)
class Pyramid(RowScaled):
    """At most ``rate`` bits a weight: vectors of ``dim`` columns as a shape and a gain of 8 bits; a float16 scale a
    row.

    The pulses are as many as the rate allows. ``value = y · (gain / |y|) · scale``.
    """

    rate: int
    dim: int
    code_dtype: ClassVar[torch.dtype] = torch.int64

    def __post_init__(self) -> None:
        if not (1 <= self.rate <= 6 and 2 <= self.dim <= 48):
            raise BadInput(f"Codec {self} does not exist: pyramids have 1 to 6 bits a weight and 2 to 48 columns.")
        room = self.rate * self.dim - _GAIN_BITS
        if 2 * self.dim > 2 ** max(room, 0) or self.rate * self.dim > 56:
            raise BadInput(
                f"Codec {self} does not exist: a vector has {self.rate * self.dim} bits, of which {_GAIN_BITS} are its "
                f"gain; it needs room for one pulse, and 56 bits are the most."
            )

    def __str__(self) -> str:
        return f"pvq{self.rate}:n{self.dim}"

    @property
    def span(self) -> int:  # type: ignore[override]
        return self.dim

    @property
    def pulses(self) -> int:
        """K: as many as an index of ``rate · dim − 8`` bits can count."""
        return _pulses(self.dim, self.rate * self.dim - _GAIN_BITS)

    @property
    def code_bits(self) -> int:
        return _GAIN_BITS + (count(self.dim, self.pulses) - 1).bit_length()

    def prepare(self, weight: Tensor, importance: Tensor | None = None) -> Side:
        rows, columns = weight.shape
        lengths = weight.reshape(rows, self.spans(columns), self.dim).square().sum(2).sqrt()
        return storable(lengths.amax(1, keepdim=True) * (_HEADROOM / 255), "fp16")

    def unit(self, codes: Tensor) -> Tensor:
        pieces = [self._decoded(piece) for piece in codes.reshape(-1).split(_DECODED)]  # type: ignore[no-untyped-call]
        return torch.cat(pieces).reshape(*codes.shape, self.dim)

    def _decoded(self, codes: Tensor) -> Tensor:
        shape = shapes(codes >> _GAIN_BITS, self.dim, self.pulses).to(torch.float32)
        gain = (codes & 255).to(torch.float32)
        return shape * (gain / shape.square().sum(1).sqrt())[:, None]

    def closest(self, target: Tensor) -> Tensor:
        shape = search(target, self.pulses)
        length = shape.square().sum(1).sqrt()
        gain = torch.round((target * shape).sum(1) / length).clamp_(0, 255).to(torch.int64)
        return (numbers(shape.to(torch.int64), self.pulses) << _GAIN_BITS) + gain


@lru_cache(maxsize=64)
def _pulses(dimensions: int, bits: int) -> int:
    pulses = 1
    while count(dimensions, pulses + 1) <= 1 << bits:
        pulses += 1
    return pulses


def search(target: Tensor, pulses: int) -> Tensor:
    """Shapes ``(n, dim)`` float32, signs those of ``target (n, dim)``, with nearly the best cosine to it.

    The projection onto the pyramid rounded down, pulses added one at a time where they raise the cosine most, then
    single pulses moved while that raises it.
    """
    size = target.abs()
    total = size.sum(1, keepdim=True)
    shape = torch.floor(size * (pulses / total.clamp(min=1e-30)))
    # Rounding may have put a pulse too many; then begin a little lower.
    shape = torch.where(shape.sum(1, keepdim=True) > pulses, torch.floor(shape * (1 - 1e-6)), shape)
    inner, energy = (size * shape).sum(1, keepdim=True), shape.square().sum(1, keepdim=True)
    for _ in range(int((pulses - shape.sum(1)).max()) if len(shape) else 0):
        missing = shape.sum(1) < pulses
        gain = (inner + size).square() / (energy + 2 * shape + 1)
        add = torch.nn.functional.one_hot(gain.argmax(1), shape.shape[1]) * missing[:, None]
        inner = inner + (size * add).sum(1, keepdim=True)
        energy = energy + ((2 * shape + 1) * add).sum(1, keepdim=True)
        shape = shape + add
    for _ in range(_SWAPS):
        shape, improved = _swap(size, shape)
        if not improved:
            break
    return torch.where(target < 0, -shape, shape)


def _swap(size: Tensor, shape: Tensor) -> tuple[Tensor, bool]:
    """Move the one pulse of each shape whose move raises the cosine most, if any does."""
    dim = shape.shape[1]
    inner, energy = (size * shape).sum(1), shape.square().sum(1)
    off = torch.where(shape > 0, 1 - 2 * shape, torch.inf)
    # From column i (second axis) to column j (third axis); staying put is no move.
    length = energy[:, None, None] + off[:, :, None] + (2 * shape + 1)[:, None, :]
    product = inner[:, None, None] - size[:, :, None] + size[:, None, :]
    score = product.square() / length
    score.diagonal(dim1=1, dim2=2).zero_()
    best, move = score.flatten(1).max(1)
    better = best > inner.square() / energy * (1 + 1e-6)
    change = torch.nn.functional.one_hot(move % dim, dim) - torch.nn.functional.one_hot(move // dim, dim)
    return shape + change * better[:, None], bool(better.any())


def numbers(shape: Tensor, pulses: int) -> Tensor:
    """Which of all shapes these ``(n, dim)`` int64 are, ``(n,)`` int64 from 0 to ``count(dim, pulses) − 1``."""
    dim = shape.shape[1]
    ways, first = _tables(dim, pulses)
    left = torch.full((len(shape),), pulses, dtype=torch.int64)
    result = torch.zeros(len(shape), dtype=torch.int64)
    for column in range(dim):
        size = shape[:, column].abs()
        result += first[dim - column][left, size]
        left = left - size
        result += torch.where(shape[:, column] < 0, ways[dim - column - 1][left], 0)
    return result


def shapes(number: Tensor, dimensions: int, pulses: int) -> Tensor:
    """The inverse of :func:`numbers`: ``(n,)`` int64 to ``(n, dimensions)`` int64."""
    ways, first = (table.to(number.device) for table in _tables(dimensions, pulses))
    left = torch.full_like(number, pulses)
    result = []
    for columns in range(dimensions, 0, -1):
        starts = first[columns][left]
        size = (starts <= number[:, None]).sum(1) - 1
        number = number - torch.gather(starts, 1, size[:, None])[:, 0]
        left = left - size
        half = ways[columns - 1][left]
        negative = (size > 0) & (number >= half)
        number = torch.where(negative, number - half, number)
        result.append(torch.where(negative, -size, size))
    return torch.stack(result, 1)


_FORM = "pvq{1-6}:n<columns>"


@reads(r"pvq(\d)", form=_FORM, heads=("pvq1", "pvq2", "pvq3"))
def _read(words: Words) -> Pyramid:
    match = re.fullmatch(r"n(\d{1,6})", words.options[0]) if len(words.options) == 1 else None
    if match is None or words.arguments:
        raise words.refuse(f"write {_FORM}, such as pvq2:n16.")
    return Pyramid(int(words.head[1]), int(match[1]))

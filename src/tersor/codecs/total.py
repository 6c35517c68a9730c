"""A sum of codecs: each encodes what those before it have left over.

``sum(int3:g64,lowrank8)`` is a quantized weight with a low-rank correction of its error, ``sum(sparse0.5,int3:g64)``
outliers kept apart and the rest quantized.

>>> from tersor.codecs import parse
>>> str(parse("sum(sparse1,int3:row)"))
'sum(sparse1,int3:row)'
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersor.codecs.inner import under
from tersor.codecs.rows import RowStretches
from tersor.codecs.text import Words, parse, reads
from tersor.contracts import Codec, CompositeCodec, Encode, Gram, Part, Shape
from tersor.errors import BadInput


@dataclass(frozen=True)
class Total(CompositeCodec):
    """``terms`` in the order in which they are encoded; parts of term ``i`` are called ``t<i>_<part>``.

    ``rounds``: after the first pass, each term is encoded again that many times against what all others leave (as
    LQ-LoRA does, arXiv:2311.12023, Algorithm 1); the best pass under the Gram matrix is kept.
    """

    terms: tuple[Codec, ...]
    rounds: int = 0

    def __post_init__(self) -> None:
        if len(self.terms) < 2:
            raise BadInput(f"{self} has fewer than two terms; write sum(<codec>,<codec>,…).")
        if any(isinstance(term, RowStretches) for term in self.terms):
            raise BadInput(f"{self} has rows(...) as a term; write rows(...) around it.")

    def __str__(self) -> str:
        return f"sum({','.join(map(str, self.terms))})" + (f":again{self.rounds}" if self.rounds else "")

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        return tuple(
            replace(part, name=f"t{index}_{part.name}")
            for index, term in enumerate(self.terms)
            for part in term.parts(shape)
        )

    def tile(self, rows: int) -> int:
        return max(term.tile(rows) for term in self.terms)

    @property
    def sampled(self) -> bool:
        return all(term.sampled for term in self.terms)

    def encode(self, weight: Tensor, gram: Gram | None, encode: Encode) -> tuple[dict[str, Tensor], Tensor]:
        tensors: list[dict[str, Tensor]] = []
        values: list[Tensor] = []
        for term in self.terms:
            found, value = encode(weight - _sum(values, weight), term, gram)
            tensors.append(found)
            values.append(value)
        best, loss = (list(tensors), list(values)), _loss(weight - _sum(values, weight), gram)
        for _ in range(self.rounds):
            for index, term in enumerate(self.terms):
                others = [value for other, value in enumerate(values) if other != index]
                tensors[index], values[index] = encode(weight - _sum(others, weight), term, gram)
            now = _loss(weight - _sum(values, weight), gram)
            if now < loss:
                best, loss = (list(tensors), list(values)), now
        named = {f"t{index}_{name}": t for index, found in enumerate(best[0]) for name, t in found.items()}
        return named, _sum(best[1], weight)

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return _sum([term.decode(under(tensors, f"t{index}_"), shape) for index, term in enumerate(self.terms)], None)

    def decode_rows(self, tensors: Mapping[str, Tensor], shape: Shape, rows: slice | Tensor) -> Tensor:
        pieces = [term.decode_rows(under(tensors, f"t{index}_"), shape, rows) for index, term in enumerate(self.terms)]
        return _sum(pieces, None)


def _sum(values: list[Tensor], like: Tensor | None) -> Tensor:
    """Values added up in order; zeros like ``like`` when there are none."""
    if not values:
        assert like is not None
        return torch.zeros_like(like)
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _loss(error: Tensor, gram: Gram | None) -> float:
    product = error if gram is None else error @ gram.matrix
    return float((product * error).double().sum())


@reads("sum", form="sum(<codec>,<codec>,…)[:again<n>]", heads=("sum",))
def _read(words: Words) -> Total:
    rounds = [re.fullmatch(r"again(\d{1,2})", option) for option in words.options]
    if len(rounds) > 1 or not all(rounds):
        raise words.refuse("write sum(<codec>,<codec>,…), such as sum(int3:g64,lowrank8), perhaps with :again2.")
    terms = tuple(parse(argument) for argument in words.arguments)
    return Total(terms, int(rounds[0][1]) if rounds and rounds[0] else 0)

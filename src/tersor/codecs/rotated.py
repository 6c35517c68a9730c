"""Weights in a rotated basis: each row multiplied by a randomised Hadamard matrix before it is encoded.

Rotation makes weights nearly Gaussian and columns alike, which is what trellises and lattices are made for (QuIP,
arXiv:2307.13304; QuIP#, arXiv:2402.04396). The matrix is a function of the number of columns and the seed: nothing is
stored for it.

>>> from tersor.codecs import parse
>>> str(parse("rot(int4:row)")), parse("rot(int4:row)").bits((64, 96)) == parse("int4:row").bits((64, 96))
('rot(int4:row)', True)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from tersor.codecs.inner import under
from tersor.codecs.text import Words, parse, reads
from tersor.contracts import Codec, CompositeCodec, Encode, Gram, LeafCodec, Part, Shape
from tersor.kernels.hadamard import rotate, unrotate

_PREFIX = "r_"


@dataclass(frozen=True)
class Rotated(CompositeCodec):
    """``inner`` encodes ``W Q``, with the Gram matrix ``Qᵀ H Q``."""

    inner: Codec
    seed: int = 0

    def __str__(self) -> str:
        return f"rot({self.inner})" + (f":seed{self.seed}" if self.seed else "")

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        return tuple(replace(part, name=_PREFIX + part.name) for part in self.inner.parts(shape))

    def tile(self, rows: int) -> int:
        return self.inner.tile(rows)

    @property
    def sampled(self) -> bool:
        return self.inner.sampled

    @property
    def by_rows(self) -> bool:
        return isinstance(self.inner, LeafCodec) and self.inner.sampled

    def learn(self, weight: Tensor, gram: Gram | None) -> Rotated:
        # An inner codec that goes by rows learns from a layer's shape alone, which rotation leaves as it is.
        return replace(self, inner=self.inner.learn(weight, gram)) if isinstance(self.inner, LeafCodec) else self

    def encode(self, weight: Tensor, gram: Gram | None, encode: Encode) -> tuple[dict[str, Tensor], Tensor]:
        def turned() -> Gram:
            assert gram is not None
            return Gram(rotate(rotate(gram.matrix, self.seed).T.contiguous(), self.seed), gram.tokens)

        basis = None if gram is None else encode.transformed(gram, f"rot:{self.seed}", turned)
        tensors, values = encode(rotate(weight, self.seed), self.inner, basis)
        return {_PREFIX + name: tensor for name, tensor in tensors.items()}, unrotate(values, self.seed)

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return unrotate(self.inner.decode(under(tensors, _PREFIX), shape), self.seed)

    def decode_rows(self, tensors: Mapping[str, Tensor], shape: Shape, rows: slice | Tensor) -> Tensor:
        return unrotate(self.inner.decode_rows(under(tensors, _PREFIX), shape, rows), self.seed)


@reads("rot", form="rot(<codec>)[:seed<n>]", heads=("rot",))
def _read(words: Words) -> Rotated:
    seeds = [re.fullmatch(r"seed(\d{1,9})", option) for option in words.options]
    if len(words.arguments) != 1 or len(seeds) > 1 or not all(seeds):
        raise words.refuse("write rot(<codec>), such as rot(int3:g64), or rot(<codec>):seed1.")
    return Rotated(parse(words.arguments[0]), int(seeds[0][1]) if seeds and seeds[0] else 0)

"""Columns multiplied by factors of their own: ``ŵ_rj = c_j · v_rj``, where ``v`` is another codec's value.

Around a codec with a scale for each row this makes a row factor and a column factor, ``± r_i c_j`` for ``bin:row``: the
binarization of PTQ1.61 (arXiv:2502.13179, §3.3). Around any other it is the column scale of SmoothQuant and AWQ, stored
with the layer.

``c`` begins as the column part of the best ``r_i c_j`` for ``|w_ij|``, by alternating least squares with the Gram
matrix's diagonal. The inner codec then encodes ``w / c`` with the Gram matrix ``diag(c) H diag(c)``, which is the same
objective. With its values ``V`` fixed the best ``c`` is exact least squares: ``(H ∘ VᵀV) c = diag(Vᵀ W H)``, a positive
semidefinite system because both factors are.

>>> from tersor.codecs import parse
>>> parse("colscale(bin:row)").bits((64, 96)) - parse("bin:row").bits((64, 96))      # a float16 a column
1536
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

_PREFIX = "c_"
_STEPS = 8
_LEAST, _MOST = 2.0**-10, 2.0**10
_DAMPING = 1e-6


@dataclass(frozen=True)
class ColumnScaled(CompositeCodec):
    """``inner`` encodes ``w / c``; part ``column`` holds ``c`` as float16.

    ``rounds``: after the first pass, ``inner`` encodes again that many times for the factors found by least squares,
    and those are found anew; the best pass under the Gram matrix is kept.
    """

    inner: Codec
    rounds: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rounds <= 99:
            raise BadInput(f"A colscale(...) codec cannot be encoded again {self.rounds} times; give 0 to 99.")
        if isinstance(self.inner, RowStretches):
            raise BadInput(f"{self} has rows(...) inside; write rows(...) around it.")

    def __str__(self) -> str:
        return f"colscale({self.inner})" + (f":again{self.rounds}" if self.rounds else "")

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        column = Part("column", torch.float16, (shape[1],), shared=True)
        return (column, *(replace(part, name=_PREFIX + part.name) for part in self.inner.parts(shape)))

    def tile(self, rows: int) -> int:
        return self.inner.tile(rows)

    @property
    def sampled(self) -> bool:
        return self.inner.sampled

    def encode(self, weight: Tensor, gram: Gram | None, encode: Encode) -> tuple[dict[str, Tensor], Tensor]:
        factor = start(weight, gram)
        best: dict[str, Tensor] = {}
        result, loss = weight, float("inf")
        for _ in range(self.rounds + 1):
            turned = None if gram is None else Gram(gram.matrix * factor[:, None] * factor, gram.tokens)
            tensors, values = encode(weight / factor, self.inner, turned)
            wanted = _least_squares(weight, values, gram, factor)
            for column in (factor, wanted):
                now = _loss(weight - values * column, gram)
                if now < loss or not best:
                    best, result, loss = {"column": column, **_named(tensors)}, values * column, now
            # Dividing by next to nothing, or turning signs, would help no codec.
            factor = torch.where(wanted > _LEAST * wanted.abs().mean(), wanted, factor)
        return {**best, "column": best["column"].to(torch.float16)}, result

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return self.inner.decode(under(tensors, _PREFIX), shape) * tensors["column"].to(torch.float32)

    def decode_rows(self, tensors: Mapping[str, Tensor], shape: Shape, rows: slice | Tensor) -> Tensor:
        inner = self.inner.decode_rows(under(tensors, _PREFIX), shape, rows)
        return inner * tensors["column"].to(torch.float32)


def start(weight: Tensor, gram: Gram | None) -> Tensor:
    """Column factors ``(in,)`` float32, of mean about 1 and exact in float16, that go with ``weight (out, in)``."""
    size = weight.abs()
    mass = torch.ones(weight.shape[1]) if gram is None else gram.matrix.diagonal().clamp(min=0)
    mass = mass / mass.mean().clamp(min=1e-30) + 1e-4
    column = torch.ones(weight.shape[1])
    for _ in range(_STEPS):
        row = size @ (mass * column) / (mass * column.square()).sum().clamp(min=1e-30)
        column = row @ size / row.square().sum().clamp(min=1e-30)
        column = column / column.mean().clamp(min=1e-30)
    return torch.where(column > 0, column, 1.0).clamp(_LEAST, _MOST).to(torch.float16).float()


def _least_squares(weight: Tensor, values: Tensor, gram: Gram | None, factor: Tensor) -> Tensor:
    """The best factors ``(in,)`` for these inner ``values``, rounded to float16; ``factor`` where there are none."""
    exact = values.double()
    if gram is None:
        wanted = (exact * weight).sum(0) / exact.square().sum(0)
    else:
        normal = gram.matrix.double() * (exact.T @ exact)
        right = ((weight @ gram.matrix).double() * exact).sum(0)
        ridge = _DAMPING * normal.diagonal().mean() + 1e-30
        normal.diagonal().add_(ridge)
        lower, failed = torch.linalg.cholesky_ex(normal)
        if int(failed):
            return factor
        # The ridge draws towards the old factors, not to zero: a dead input keeps its own.
        wanted = torch.cholesky_solve((right + ridge * factor.double())[:, None], lower)[:, 0]
    stored = wanted.clamp(-65504.0, 65504.0).to(torch.float16).float()
    return torch.where(torch.isfinite(stored), stored, factor)


def _loss(error: Tensor, gram: Gram | None) -> float:
    product = error if gram is None else error @ gram.matrix
    return float((product * error).double().sum())


def _named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_PREFIX + name: tensor for name, tensor in tensors.items()}


@reads("colscale", form="colscale(<codec>)[:again<n>]", heads=("colscale",))
def _read(words: Words) -> ColumnScaled:
    rounds = [re.fullmatch(r"again([1-9]\d?)", option) for option in words.options]
    if len(words.arguments) != 1 or len(rounds) > 1 or not all(rounds):
        raise words.refuse("write colscale(<codec>), such as colscale(bin:row), or colscale(<codec>):again2.")
    return ColumnScaled(parse(words.arguments[0]), int(rounds[0][1]) if rounds and rounds[0] else 0)

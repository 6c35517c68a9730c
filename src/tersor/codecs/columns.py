"""Input columns split in two sets, each in a codec of its own: salient channels finer than the rest (PTQ1.61,
arXiv:2502.13179, §3.2).

Which column is in which set is one bit a column. Errors are fed back over both sets: let the set that is encoded first
be ``1``, the other ``2``, and ``E = W − Ŵ``. With ``T = W_2 + E_1 H_12 H_22⁻¹`` the distortion is exactly

    tr(E H Eᵀ) = tr(E_1 S E_1ᵀ) + tr((T − Ŵ_2) H_22 (T − Ŵ_2)ᵀ),    S = H_11 − H_12 H_22⁻¹ H_21.

So the first set is encoded with the Schur complement ``S`` for its Gram matrix, then the second one towards ``T`` with
``H_22``: what error feedback does column by column, here for two blocks, and no solver needs to know. The set with
fewer bits a weight goes first: its large errors then count with the smaller of the two matrices, and the finer codec
takes them up.

>>> from tersor.codecs import parse
>>> codec = parse("cols(int4:row,bin:row):0.25")
>>> codec.bits((64, 96)) == parse("int4:row").bits((64, 24)) + parse("bin:row").bits((64, 72)) + 96
True
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersor.codecs.inner import under
from tersor.codecs.packing import pack, packed_width, unpack
from tersor.codecs.rows import RowStretches
from tersor.codecs.text import Words, parse, reads
from tersor.contracts import Codec, CompositeCodec, Encode, Gram, Part, Shape
from tersor.errors import BadInput, ShapeMismatch

_DAMPINGS = (0.01, 0.1, 1.0)
"""Fractions of the mean diagonal, added to it before a block of the Gram matrix is inverted; the first that works."""


@dataclass(frozen=True)
class ColumnSplit(CompositeCodec):
    """``salient`` encodes the most important columns, ``rest`` all others; parts ``a_<part>``, ``b_<part>``, ``mask``.

    ``amount``: how many columns are salient, a whole number; below 1, their share. Importance is ``H_jj Σ_r w_rj²``,
    what leaving the column out would cost; with ``inputs``, ``H_jj`` alone. Without a Gram matrix ``Σ_r w_rj²``.
    ``rounds``: after the first pass, each set is encoded again that many times, given the other's errors; the best pass
    is kept.
    """

    salient: Codec
    rest: Codec
    amount: float
    inputs: bool = False
    rounds: int = 0

    def __post_init__(self) -> None:
        whole = float(self.amount).is_integer() and self.amount >= 1
        if not whole and (not 0 < self.amount < 1 or round(self.amount, 6) != self.amount):
            raise BadInput(
                f"A cols(...) codec cannot choose {self.amount} columns: give a whole number from 1, or a share "
                f"between 0 and 1 of at most 6 decimals."
            )
        if not 0 <= self.rounds <= 99:
            raise BadInput(f"A cols(...) codec cannot be encoded again {self.rounds} times; give 0 to 99.")
        if any(isinstance(codec, RowStretches) for codec in (self.salient, self.rest)):
            raise BadInput(f"{self} has rows(...) inside; write rows(...) around it.")

    def __str__(self) -> str:
        amount = f"{self.amount:.6f}".rstrip("0") if self.amount < 1 else f"{self.amount:.0f}"
        again = f":again{self.rounds}" if self.rounds else ""
        return f"cols({self.salient},{self.rest}):{amount}" + (":inputs" if self.inputs else "") + again

    def count(self, in_features: int) -> int:
        """How many of the columns are salient. Raises ShapeMismatch where one set would be empty."""
        wanted = max(round(in_features * self.amount), 1) if self.amount < 1 else int(self.amount)
        if wanted >= in_features:
            raise ShapeMismatch(
                f"Codec {self} cannot take a layer of {in_features} inputs: it sets {wanted} of them apart, and at "
                f"least one must be left."
            )
        return wanted

    def inner(self, shape: Shape) -> tuple[tuple[str, Codec, Shape], ...]:
        """Prefix, codec and shape of the two sets."""
        count = self.count(shape[1])
        return ("a_", self.salient, (shape[0], count)), ("b_", self.rest, (shape[0], shape[1] - count))

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        mask = Part("mask", torch.uint8, (1, packed_width(shape[1], 1)), shared=True)
        named = (
            replace(part, name=prefix + part.name)
            for prefix, codec, own in self.inner(shape)
            for part in codec.parts(own)
        )
        return (mask, *named)

    def tile(self, rows: int) -> int:
        return max(self.salient.tile(rows), self.rest.tile(rows))

    @property
    def sampled(self) -> bool:
        return self.salient.sampled and self.rest.sampled

    def mask(self, weight: Tensor, gram: Gram | None) -> Tensor:
        """Which columns of ``weight (out, in)`` are salient, ``(in,)`` bool; of equally important ones the first."""
        energy = weight.double().square().sum(0)
        if gram is not None:
            diagonal = gram.matrix.diagonal().double()
            energy = diagonal if self.inputs else diagonal * energy
        kept = torch.argsort(energy, descending=True, stable=True)[: self.count(len(energy))]
        return torch.zeros(len(energy), dtype=torch.bool).index_fill_(0, kept, True)

    def encode(self, weight: Tensor, gram: Gram | None, encode: Encode) -> tuple[dict[str, Tensor], Tensor]:
        mask = self.mask(weight, gram)
        columns = (mask.nonzero()[:, 0], (~mask).nonzero()[:, 0])
        if gram is None:
            found = [
                encode(weight[:, own].contiguous(), codec, None)
                for own, codec in zip(columns, (self.salient, self.rest), strict=True)
            ]
        else:
            found = self._together(weight, gram, columns, encode)
        tensors = {"mask": pack(mask[None].to(torch.int32), 1)}
        for prefix, (inner, _) in zip(("a_", "b_"), found, strict=True):
            tensors.update({prefix + name: tensor for name, tensor in inner.items()})
        values = torch.empty_like(weight)
        for own, (_, value) in zip(columns, found, strict=True):
            values[:, own] = value
        return tensors, values

    def _together(
        self, weight: Tensor, gram: Gram, columns: tuple[Tensor, Tensor], encode: Encode
    ) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Both sets encoded, tensors and values of each, with each other's errors fed back."""
        codecs = (self.salient, self.rest)
        matrix = gram.matrix
        sets = [weight[:, own].contiguous() for own in columns]
        key = f"cols:{hashlib.sha256(columns[0].numpy().tobytes()).hexdigest()}"

        def block(index: int) -> Gram:
            own = columns[index]
            return encode.transformed(gram, f"{key}:{index}", lambda: Gram(matrix[own][:, own], gram.tokens))

        first, second = _order(codecs, weight.shape[0], columns)
        moves = {second: _moving(matrix, columns[second], columns[first])}

        def schur() -> Gram:
            own, other = columns[first], columns[second]
            given = matrix[own][:, own].double() - matrix[own][:, other].double() @ moves[second]
            return Gram(((given + given.T) / 2).float(), gram.tokens)

        found: list[tuple[dict[str, Tensor], Tensor]] = [({}, sets[0]), ({}, sets[1])]
        conditional = encode.transformed(gram, f"{key}:{first}|{second}", schur)
        found[first] = encode(sets[first], codecs[first], conditional)

        def again(index: int) -> None:
            error = (sets[1 - index] - found[1 - index][1]) @ moves[index].T.float()
            found[index] = encode(sets[index] + error, codecs[index], block(index))

        again(second)
        best, loss = list(found), _loss(sets, found, matrix, columns)
        if self.rounds:
            moves[first] = _moving(matrix, columns[first], columns[second])
        for _ in range(self.rounds):
            again(first)
            again(second)
            now = _loss(sets, found, matrix, columns)
            if now < loss:
                best, loss = list(found), now
        return best

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return self.decode_rows(tensors, shape, slice(None))

    def decode_rows(self, tensors: Mapping[str, Tensor], shape: Shape, rows: slice | Tensor) -> Tensor:
        values = [codec.decode_rows(under(tensors, p), own, rows) for p, codec, own in self.inner(shape)]
        # Where each column's values lie in the two sets side by side: a permutation, however many bits are set.
        mask = unpack(tensors["mask"], 1, shape[1])[0]
        place = torch.argsort(torch.argsort(1 - mask, stable=True))
        return torch.cat(values, 1)[:, place]


def _order(codecs: tuple[Codec, Codec], rows: int, columns: tuple[Tensor, Tensor]) -> tuple[int, int]:
    """Numbers of the set that is encoded first, the one with fewer bits a weight, and of the other."""
    rates = [codec.bits((rows, len(own))) / max(len(own), 1) for codec, own in zip(codecs, columns, strict=True)]
    return (1, 0) if rates[1] < rates[0] else (0, 1)


def _moving(matrix: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """``H_ss⁻¹ H_so (own, other)`` float64: times the errors of the set ``other``, it is what the set ``own`` takes up.

    Zero when the damped block cannot be factored; each set is then encoded by itself.
    """
    block = matrix[own][:, own].double()
    mean = float(block.diagonal().mean())
    for damping in _DAMPINGS if mean > 0 else ():
        damped = block.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            return torch.cholesky_solve(matrix[own][:, other].double(), lower)
    return torch.zeros(len(own), len(other), dtype=torch.float64)


def _loss(
    sets: list[Tensor], found: list[tuple[dict[str, Tensor], Tensor]], matrix: Tensor, columns: tuple[Tensor, Tensor]
) -> float:
    error = torch.empty(len(sets[0]), len(matrix))
    for own, weight, (_, values) in zip(columns, sets, found, strict=True):
        error[:, own] = weight - values
    return float(((error @ matrix) * error).double().sum())


_FORM = "cols(<codec>,<codec>):{<count>|0.<share>}[:inputs][:again<n>]"


@reads("cols", form=_FORM, heads=("cols",))
def _read(words: Words) -> ColumnSplit:
    amounts = [o for o in words.options if re.fullmatch(r"[1-9]\d{0,6}|0\.\d{1,6}", o)]
    rounds = [found for o in words.options if (found := re.fullmatch(r"again([1-9]\d?)", o))]
    inputs = words.options.count("inputs")
    known = len(amounts) + len(rounds) + inputs
    if len(words.arguments) != 2 or len(amounts) != 1 or len(rounds) > 1 or inputs > 1 or known != len(words.options):
        raise words.refuse(f"write {_FORM}, such as cols(int4:row,bin:row):0.2.")
    salient, rest = (parse(argument) for argument in words.arguments)
    return ColumnSplit(salient, rest, float(amounts[0]), bool(inputs), int(rounds[0][1]) if rounds else 0)

"""Weights split in two sets, each in a codec of its own: the few salient ones of every row finer than the rest.

PB-LLM (arXiv:2310.00034) keeps the salient weights in 8 bits and binarizes the others with a scale a row.

Which weight is in which set is one bit a weight. Both sets of a row lie side by side, in compact matrices: ``(out, k)``
and ``(out, in − k)``. Where both codecs round single weights with one scale or table a row, the solver works on whole
rows with the mask held fixed (:mod:`tersor.codecs.interleaved`), so that errors of either set are fed back to both. Any
other codec encodes its compact rows by themselves, all its weights alike: which inputs they belong to differs from row
to row, so they have no Gram matrix in common.

>>> from tersor.codecs import parse
>>> codec = parse("weights(int8:row,bin:row):0.25")
>>> codec.bits((64, 96)) == parse("int8:row").bits((64, 24)) + parse("bin:row").bits((64, 72)) + 64 * 96
True
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tersor.codecs.dense import Dense
from tersor.codecs.inner import under
from tersor.codecs.interleaved import PREFIXES, Interleaved
from tersor.codecs.packing import pack, packed_width, unpack
from tersor.codecs.rows import RowStretches
from tersor.codecs.text import Words, parse, reads
from tersor.contracts import Codec, CompositeCodec, Encode, Gram, LeafCodec, Part, Shape
from tersor.errors import BadInput, ShapeMismatch


@dataclass(frozen=True)
class WeightSplit(CompositeCodec):
    """``salient`` encodes ``share`` of the weights of every row, ``rest`` all others.

    Parts: ``mask``, and ``a_<part>``, ``b_<part>`` of the codecs inside. Salient are those whose absence costs most,
    ``H_jj w²``; with ``by`` magnitude, or without a Gram matrix, the largest.
    """

    salient: Codec
    rest: Codec
    share: float
    by: Literal["cost", "magnitude"] = "cost"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or round(self.share, 6) != self.share:
            raise BadInput(
                f"A weights(...) codec cannot choose {self.share} of the weights: give a share between 0 and 1 of at "
                f"most 6 decimals."
            )
        if any(isinstance(codec, RowStretches) for codec in (self.salient, self.rest)):
            raise BadInput(f"{self} has rows(...) inside; write rows(...) around it.")

    def __str__(self) -> str:
        share = f"{self.share:.6f}".rstrip("0")
        return f"weights({self.salient},{self.rest}):{share}" + ("" if self.by == "cost" else f":{self.by}")

    def count(self, in_features: int) -> int:
        """How many weights of a row are salient. Raises ShapeMismatch where one set would be empty."""
        wanted = max(round(in_features * self.share), 1)
        if wanted >= in_features:
            raise ShapeMismatch(
                f"Codec {self} cannot take a layer of {in_features} inputs: it sets {wanted} weights of every row "
                f"apart, and at least one must be left."
            )
        return wanted

    def inner(self, shape: Shape) -> tuple[tuple[str, Codec, Shape], ...]:
        """Prefix, codec and shape of the two compact matrices."""
        count = self.count(shape[1])
        widths = (count, shape[1] - count)
        return tuple(
            (prefix, codec, (shape[0], width))
            for prefix, codec, width in zip(PREFIXES, (self.salient, self.rest), widths, strict=True)
        )

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        named = (
            replace(part, name=prefix + part.name)
            for prefix, codec, own in self.inner(shape)
            for part in codec.parts(own)
        )
        return (Part("mask", torch.uint8, (shape[0], packed_width(shape[1], 1))), *named)

    def tile(self, rows: int) -> int:
        return max(self.salient.tile(rows), self.rest.tile(rows))

    @property
    def sampled(self) -> bool:
        return self.salient.sampled and self.rest.sampled

    @property
    def by_rows(self) -> bool:
        return all(
            isinstance(codec, Dense) or (isinstance(codec, LeafCodec) and codec.sampled and codec.tile(1 << 20) == 1)
            for codec in (self.salient, self.rest)
        )

    def mask(self, weight: Tensor, gram: Gram | None) -> Tensor:
        """Which weights of ``weight (out, in)`` are salient, ``(out, in)`` bool; of equally costly ones the first."""
        cost = weight.square()
        if gram is not None and self.by == "cost":
            cost = cost * gram.matrix.diagonal()
        order = torch.argsort(cost, dim=1, descending=True, stable=True)[:, : self.count(weight.shape[1])]
        return torch.zeros(weight.shape, dtype=torch.bool).scatter_(1, order, True)

    def encode(self, weight: Tensor, gram: Gram | None, encode: Encode) -> tuple[dict[str, Tensor], Tensor]:
        sets = self.inner((weight.shape[0], weight.shape[1]))
        mask = self.mask(weight, gram)
        tensors = {"mask": pack(mask.to(torch.int32), 1)}
        whole = self._whole(mask)
        if gram is not None and whole is not None:
            found, values = encode(weight, whole, gram)
            return {**tensors, **found}, values
        values = torch.empty_like(weight)
        for own, (prefix, codec, shape) in zip((mask, ~mask), sets, strict=True):
            found, compact = encode(weight[own].reshape(shape), codec, None)
            tensors.update({prefix + name: tensor for name, tensor in found.items()})
            values[own] = compact.flatten()
        return tensors, values

    def _whole(self, mask: Tensor) -> Interleaved | None:
        """What solvers drive on whole rows; None where the codecs inside are not such."""
        (_, salient, (_, count)), (_, rest, (_, left)) = self.inner((mask.shape[0], mask.shape[1]))
        if not (Interleaved.fits(salient, count) and Interleaved.fits(rest, left)):
            return None
        assert isinstance(salient, LeafCodec)
        assert isinstance(rest, LeafCodec)
        return Interleaved(salient, rest, count, mask)

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return self.decode_rows(tensors, shape, slice(None))

    def decode_rows(self, tensors: Mapping[str, Tensor], shape: Shape, rows: slice | Tensor) -> Tensor:
        sets = self.inner(shape)
        values = torch.cat([codec.decode_rows(under(tensors, p), own, rows) for p, codec, own in sets], 1)
        mask = unpack(tensors["mask"][rows], 1, shape[1])
        # Where each weight lies in the two sets side by side; inside the row, however many bits are set.
        place = torch.where(mask > 0, mask.cumsum(1) - 1, self.count(shape[1]) - 1 + (1 - mask).cumsum(1))
        return torch.gather(values, 1, place.clamp_(max=shape[1] - 1))


_FORM = "weights(<codec>,<codec>):0.<share>[:magnitude]"


@reads("weights", form=_FORM, heads=("weights",))
def _read(words: Words) -> WeightSplit:
    shares = [option for option in words.options if re.fullmatch(r"0\.\d{1,6}", option)]
    largest = words.options.count("magnitude")
    if len(words.arguments) != 2 or len(shares) != 1 or largest > 1 or largest + 1 != len(words.options):
        raise words.refuse(f"write {_FORM}, such as weights(int8:row,bin:row):0.05.")
    salient, rest = (parse(argument) for argument in words.arguments)
    return WeightSplit(salient, rest, float(shares[0]), "magnitude" if largest else "cost")

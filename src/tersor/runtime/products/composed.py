"""Products of codecs that are made of others, and of streams, which are read once and kept in another form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tersor.codecs import (
    Coded,
    CodedLowRank,
    ColumnScaled,
    ColumnSplit,
    EntropyCodedTrellis,
    LowRank,
    PrincipalBasis,
    Rotated,
    RowStretches,
    Total,
)
from tersor.codecs import ectcq_layout as layout
from tersor.codecs.ectcq_leaf import COLUMN_ZERO, Steps
from tersor.codecs.inner import under
from tersor.codecs.packing import unpack
from tersor.contracts import Codec, Shape
from tersor.kernels import coded, products, products_composed
from tersor.kernels.products import Product
from tersor.runtime.products.table import Parts, makes, product_of

_PIECE = 1 << 22
_COARSEST = 0.125
"""The largest step of 8 bits, in steps of a trellis, that numbers of a stream are kept with. Its square over 12 is half
a percent of the squared error that the trellis itself makes, about a quarter of a squared step."""


@makes(Rotated)
def _rotated(codec: Rotated, parts: Parts, shape: Shape) -> Product | None:
    inner = product_of(codec.inner, under(parts, "r_"), shape)
    return None if inner is None else products_composed.rotated(inner, codec.seed)


@makes(PrincipalBasis)
def _turned(codec: PrincipalBasis, parts: Parts, shape: Shape) -> Product | None:
    inner = product_of(codec.inner, under(parts, "k_"), shape)
    return None if inner is None else products_composed.turned(inner, parts["angles"])


@makes(ColumnScaled)
def _scaled(codec: ColumnScaled, parts: Parts, shape: Shape) -> Product | None:
    inner = product_of(codec.inner, under(parts, "c_"), shape)
    return None if inner is None else products_composed.scaled(inner, parts["column"])


@makes(RowStretches)
def _stacked(codec: RowStretches, parts: Parts, shape: Shape) -> Product | None:
    found = []
    for stretch in codec.stretches(shape[0]):
        inner = product_of(stretch.codec, under(parts, stretch.prefix), (stretch.stop - stretch.start, shape[1]))
        if inner is None:
            return None
        found.append(inner)
    return products_composed.stacked(found)


@makes(Total)
def _total(codec: Total, parts: Parts, shape: Shape) -> Product | None:
    found = []
    for index, term in enumerate(codec.terms):
        inner = product_of(term, under(parts, f"t{index}_"), shape)
        if inner is None:
            return None
        found.append(inner)
    return products_composed.total(found)


@makes(ColumnSplit)
def _columns(codec: ColumnSplit, parts: Parts, shape: Shape) -> Product | None:
    found = []
    for prefix, inner, own in codec.inner(shape):
        product = product_of(inner, under(parts, prefix), own)
        if product is None:
            return None
        found.append(product)
    mask = unpack(parts["mask"], 1, shape[1])[0]
    # The order in which decoding puts the two sets side by side: a permutation, however many bits are set.
    order = torch.argsort(1 - mask, stable=True)
    return products_composed.side_by_side(found, order.split([product.columns for product in found]))  # type: ignore[no-untyped-call]


@makes(LowRank)
def _low_rank(_codec: LowRank, parts: Parts, _shape: Shape) -> Product:
    return products_composed.chain(products_composed.dense(parts["right"]), products_composed.dense(parts["left"]))


@makes(CodedLowRank)
def _coded_low_rank(codec: CodedLowRank, parts: Parts, shape: Shape) -> Product | None:
    """The left factor has its columns encoded and is kept in float32: it is small."""
    right = product_of(codec.inner, under(parts, "right_"), (codec.rank, shape[1]))
    if right is None:
        return None
    left = codec.inner.decode(under(parts, "left_"), (codec.rank, shape[0]))
    return products_composed.chain(right, products_composed.dense(left.T.contiguous()))


@makes(Coded)
def _coded(codec: Coded, parts: Parts, shape: Shape) -> Product | None:
    """The codes of the inner codec, at its own width."""
    inner: Codec = codec.inner
    return product_of(inner, codec.inner_parts(parts, shape), shape)


@makes(EntropyCodedTrellis)
def _stream(codec: EntropyCodedTrellis, parts: Parts, shape: Shape) -> Product | None:
    """Numbers become codes of 8 bits where that loses little beside the trellis itself, else bfloat16 values.

    Values are ``step[c] · v[r, c]``, and ``v`` a grid number that is drawn towards zero by as much as its context says.
    A row of ``v`` is rounded to ``max |v| / 127``: an error of at most half of that, times the column's step.
    """
    data = parts["stream"]
    found, at = layout.read(data, shape)
    steps = found.steps
    codes = coded.decode_in(data[at:], shape, found.contexts(), codec.states)
    most = torch.cat([v.abs().amax(1, keepdim=True) for _, v in _values(codes, _unscaled(steps))])
    # Rounded up, so that no value lies beyond 127; subnormal scales would be coarse.
    scale = (most / 127 * (1 + 2.0**-10)).clamp(2.0**-14, 65504.0).to(torch.float16)
    if float(scale.float().square().mean()) > _COARSEST**2:
        weight = torch.empty(shape, dtype=torch.bfloat16)
        for here, values in _values(codes, steps):
            weight[here] = values
        return products_composed.dense(weight)
    stored = torch.empty(shape, dtype=torch.uint8)
    for here, v in _values(codes, _unscaled(steps)):
        stored[here] = (torch.round(v / scale[here].float()).clamp(-127, 127) + 128).to(torch.uint8)
    inner = products.row_codes(stored, bits=8, columns=shape[1], group=None, scale=scale, middle=128.0)
    return products_composed.scaled(inner, steps.step())


def _unscaled(steps: Steps) -> Steps:
    """The same numbers with steps of 1."""
    column = torch.full_like(steps.column, COLUMN_ZERO)
    return replace(steps, column=column, scale=torch.ones_like(steps.scale))


def _values(codes: Tensor, steps: Steps) -> Iterator[tuple[slice, Tensor]]:
    """Values of stretches of rows."""
    count = max(_PIECE // codes.shape[1], 1)
    for start in range(0, len(codes), count):
        here = slice(start, start + count)
        yield here, replace(steps, row=steps.row[here]).values(codes[here])

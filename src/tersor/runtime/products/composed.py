"""Products of codecs that are made of others, and of streams, which are read once and kept in another form."""

from __future__ import annotations

import torch

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
from tersor.codecs.inner import under
from tersor.codecs.packing import unpack
from tersor.codecs.run_time_codes import ectcq_run_time
from tersor.contracts import Codec, Shape
from tersor.kernels import products, products_composed
from tersor.kernels.products import Product
from tersor.runtime.products.table import Parts, makes, product_of


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
def _stream(codec: EntropyCodedTrellis, parts: Parts, shape: Shape) -> Product:
    """A table of values and a list of the few that it does not have, or bfloat16 values where that would be no less."""
    found = ectcq_run_time(codec, parts, shape)
    if found is None:
        return products_composed.dense(codec.decode(parts, shape).to(torch.bfloat16))
    product = products.row_codes(
        found.codes, bits=found.bits, columns=shape[1], group=None, scale=None, table=found.table[None]
    )
    if len(found.value):
        rest = products_composed.sparse(found.value, found.column, found.start, shape[1])
        product = products_composed.total([product, rest])
    return products_composed.scaled(product, found.step)

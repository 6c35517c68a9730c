"""Products of weights kept as floats, and products made of others; see :mod:`tersor.kernels.products`.

Each comes with its specification in plain torch, :mod:`tersor.kernels.reference_composed`. Tensors are used where they
lie; only numbers of one a column (signs, factors, lists of columns) are copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tersor.kernels.givens import count
from tersor.kernels.hadamard import cosines, factors, signs
from tersor.kernels.products import Product, compiled, raw

_KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def dense(weight: Tensor) -> Product:
    """A weight ``(rows, columns)`` of bfloat16, float16 or float32. Inputs are not rounded; sums are in float32."""
    return compiled().dense(raw(weight), _KINDS[weight.dtype])  # type: ignore[no-any-return]


def sparse(values: Tensor, places: Tensor, starts: Tensor, columns: int) -> Product:
    """A weight of zeros but for ``values (n,)`` float16 in columns ``places (n,)`` uint16.

    Those of row ``r`` lie from ``starts[r]`` to ``starts[r + 1]``; ``starts (rows + 1,)`` int32. Inputs are not
    rounded. Raises ValueError where starts or places lie outside.
    """
    return compiled().sparse(raw(values), raw(places), raw(starts), columns)  # type: ignore[no-any-return]


def rotated(inner: Product, seed: int = 0) -> Product:
    """The weight ``W`` by a product of ``W Q``: ``inner`` of the inputs as :func:`tersor.kernels.hadamard.rotate` has
    them, to the bit.
    """
    size = inner.columns
    odd, _ = factors(size)
    table = np.array(cosines(odd), dtype=np.float64).astype(np.float32)
    return compiled().rotated(inner, np.array(signs(size, seed), dtype=np.float32), table)  # type: ignore[no-any-return]


def turned(inner: Product, angles: Tensor) -> Product:
    """The weight ``W`` by a product of ``W Q``, with ``Q`` as :func:`tersor.kernels.givens.turn` makes it of
    ``angles (blocks, count)`` int8; inputs are the same bits. Raises ValueError where blocks do not divide the columns.
    """
    blocks = len(angles)
    if blocks == 0 or inner.columns % blocks or angles.shape[1] != count(inner.columns // blocks):
        raise ValueError(f"angles {tuple(angles.shape)} do not go with {inner.columns} inputs")
    return compiled().turned(inner, raw(angles))  # type: ignore[no-any-return]


def scaled(inner: Product, factor: Tensor) -> Product:
    """The weight of ``inner`` with its columns multiplied by ``factor (columns,)``: inputs are."""
    return compiled().scaled(inner, raw(factor.to(torch.float32)))  # type: ignore[no-any-return]


def stacked(products: Sequence[Product]) -> Product:
    """Weights that lie one below the other, of the same inputs. Raises ValueError for other numbers of columns."""
    return compiled().stacked(list(products))  # type: ignore[no-any-return]


def total(products: Sequence[Product]) -> Product:
    """A sum of weights. Raises ValueError for weights of other sizes."""
    return compiled().total(list(products))  # type: ignore[no-any-return]


def side_by_side(products: Sequence[Product], inputs: Sequence[Tensor]) -> Product:
    """Weights of some of the inputs each. ``inputs``: for each product the numbers of its own, ``(its columns,)``.

    There are as many inputs as numbers in all lists together. Raises ValueError for a number beyond them.
    """
    lists = [raw(numbers.to(torch.int32)) for numbers in inputs]
    return compiled().columns(list(products), lists, sum(map(len, lists)))  # type: ignore[no-any-return]


def chain(first: Product, second: Product) -> Product:
    """The weight ``second first``: the product of a product. Raises ValueError where sizes do not go together."""
    return compiled().chain(first, second)  # type: ignore[no-any-return]


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16, which torch then uses."""
    return bool(compiled().multiplies_bfloat16())

"""Products of weights whose rows become floats a stretch at a time: codes that integers are not multiplied with.

Stored bytes are used where they lie, and each weight is, to the bit, the one that its codec decodes to. Inputs are not
rounded; sums are in float32, each in one order, whatever tokens and threads there are. Each kind comes with its
specification in plain torch, :mod:`tersor.kernels.reference_floats`, or names that of the format.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.kernels.products import Product, compiled, raw


def codebook(codes: Tensor, scale: Tensor, book: Tensor, columns: int) -> Product:
    """Vectors of a codebook: ``W[r, d·j : d·j + d] = scale[r] · Σ_s book[s, index of stage s]``.

    ``codes``: ``(rows, ceil(columns / d · bits / 8))`` uint8, little-endian codes of ``bits = stages · log2(entries)``
    bits (at most 30), the index of the first stage lowest. ``scale (rows, 1)`` float16. ``book (stages, entries, d)``
    of up to 16,384 entries, a power of two, of 1 to 16 columns; kept as float32. Raises ValueError for what does not
    fit together.
    """
    return compiled().codebook(raw(codes), raw(scale.flatten()), raw(book.float()), columns)  # type: ignore[no-any-return]


def e8p(codes: Tensor, scale: Tensor, patterns: Tensor, columns: int) -> Product:
    """Words of the E8 lattice (:mod:`tersor.codecs.lattice`), two bytes for eight columns.

    A word is, from its lowest bit on, the number of one of ``patterns (256, 8)`` (0, 1, 2 for magnitudes ½, 3/2, 5/2;
    8 bits), signs of the first seven columns, and whether all are moved by −¼ instead of ¼. ``codes (rows,
    columns / 4)`` uint8, ``scale (rows, 1)`` float16. Raises ValueError for what does not fit together.
    """
    return compiled().e8p(raw(codes), raw(scale.flatten()), raw(patterns.to(torch.uint8)), columns)  # type: ignore[no-any-return]


def gguf(blocks: Tensor, name: str, columns: int, points: Tensor | None = None) -> Product:
    """A tensor of llama.cpp's type ``name``, in lower case, as a GGUF has it: ``blocks (rows, bytes)`` uint8.

    Types with a grid need its ``points (n, 4 or 8)`` float32. Specification: what :mod:`tersor.codecs.gguf_layout` and
    :mod:`tersor.codecs.gguf_grids` read of the bytes. Raises ValueError for an unknown type and sizes that it has not.
    """
    if points is None:
        return compiled().gguf(raw(blocks), name, columns)  # type: ignore[no-any-return]
    return compiled().gguf_grid(raw(blocks), name, raw(points), columns)  # type: ignore[no-any-return]


def grid(codes: Tensor, scale: Tensor, zero: Tensor, *, bits: int, columns: int, tile: int = 1) -> Product:
    """Codes row by row on grids of blocks: ``W[r, c] = (u − zero[r // tile, g]) · scale[r // tile, g]``.

    ``codes``: ``(rows, ceil(columns · bits / 8))`` uint8, little-endian codes ``u`` of ``bits`` bits (1–8). ``scale``,
    ``zero``: ``(ceil(rows / tile), groups)`` float32, groups of the same number of columns. Raises ValueError for what
    does not fit together.
    """
    width = columns // max(scale.shape[1], 1)
    return compiled().grid(raw(codes), bits, columns, tile, width, raw(scale.float()), raw(zero.float()))  # type: ignore[no-any-return]


def kept(weight: Tensor) -> Product:
    """A weight of bfloat16 or float16, for :func:`spread`: by itself, :func:`tersor.kernels.products_composed.dense` is
    faster.
    """
    return compiled().kept(raw(weight), weight.dtype == torch.float16)  # type: ignore[no-any-return]


def spread(patterns: Tensor, subsets: Tensor, group: int, inner: Product) -> Product:
    """Of every ``group`` columns (up to 16) some weights of ``inner``, which is a product of this module; zeros else.

    ``patterns``: ``(rows, ceil(groups · bits / 8))`` uint8, little-endian numbers of ``bits`` bits of rows of
    ``subsets (2^bits, kept)``: the columns of a group that are kept, ascending. Raises ValueError for what does not fit
    together.
    """
    return compiled().spread(raw(patterns), raw(subsets.to(torch.uint8)), group, inner)  # type: ignore[no-any-return]


def magnitudes(signs: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor]) -> Product:
    """A sum of ``±|left right|``, terms of a product added in order: BitStack (:mod:`tersor.codecs.sign_magnitude`).

    Of each stage ``signs``: ``(rows, ceil(columns / 8))`` uint8, 1 for plus; ``left (rows, rank)``, ``right (rank,
    columns)``, kept as float32. Raises ValueError for what does not fit together.
    """
    factors = ([raw(factor.float()) for factor in each] for each in (left, right))
    return compiled().magnitudes([raw(each) for each in signs], *factors)  # type: ignore[no-any-return]


def pyramid(codes: Tensor, gains: Tensor, scale: Tensor, *, bits: int, dim: int, middle: int) -> Product:
    """Vectors of ``dim`` integers that a gain makes as long as it says: ``y · (gain / |y|) · scale[r]``.

    ``codes``: ``(rows, ceil(columns · bits / 8))`` uint8, little-endian codes ``y + middle`` of ``bits`` bits (1–8).
    ``gains (rows, vectors)`` uint8. ``scale (rows, 1)`` float16. A vector of zeros is none. Raises ValueError for what
    does not fit together.
    """
    return compiled().pyramid(raw(codes), bits, raw(gains), raw(scale.flatten()), dim, float(middle))  # type: ignore[no-any-return]

"""Products of weights whose rows become floats a stretch at a time: codes that integers are not multiplied with.

Stored bytes are used where they lie, and each weight is, to the bit, the one that its codec decodes to. Inputs are not
rounded; sums are in float32, each in one order, whatever tokens and threads there are. Each kind comes with its
specification in plain torch, :mod:`tersor.kernels.reference_floats`, or names that of the format.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor.kernels.products import Product

try:
    from tersor.kernels import _products  # type: ignore[attr-defined]
except ImportError:
    _products = None


def codebook(codes: Tensor, scale: Tensor, book: Tensor, columns: int) -> Product:
    """Vectors of a codebook: ``W[r, d·j : d·j + d] = scale[r] · Σ_s book[s, index of stage s]``.

    ``codes``: ``(rows, ceil(columns / d · bits / 8))`` uint8, little-endian codes of ``bits = stages · log2(entries)``
    bits (at most 30), the index of the first stage lowest. ``scale (rows, 1)`` float16. ``book (stages, entries, d)``
    of up to 16,384 entries, a power of two, of 1 to 16 columns; kept as float32. Raises ValueError for what does not
    fit together.
    """
    return _made().codebook(_raw(codes), _raw(scale.flatten()), _raw(book.float()), columns)  # type: ignore[no-any-return]


def e8p(codes: Tensor, scale: Tensor, patterns: Tensor, columns: int) -> Product:
    """Words of the E8 lattice (:mod:`tersor.codecs.lattice`), two bytes for eight columns.

    A word is, from its lowest bit on, the number of one of ``patterns (256, 8)`` (0, 1, 2 for magnitudes ½, 3/2, 5/2;
    8 bits), signs of the first seven columns, and whether all are moved by −¼ instead of ¼. ``codes (rows,
    columns / 4)`` uint8, ``scale (rows, 1)`` float16. Raises ValueError for what does not fit together.
    """
    return _made().e8p(_raw(codes), _raw(scale.flatten()), _raw(patterns.to(torch.uint8)), columns)  # type: ignore[no-any-return]


def gguf(blocks: Tensor, name: str, columns: int, points: Tensor | None = None) -> Product:
    """A tensor of llama.cpp's type ``name``, in lower case, as a GGUF has it: ``blocks (rows, bytes)`` uint8.

    Types with a grid need its ``points (n, 4 or 8)`` float32. Specification: what :mod:`tersor.codecs.gguf_layout` and
    :mod:`tersor.codecs.gguf_grids` read of the bytes. Raises ValueError for an unknown type and sizes that it has not.
    """
    if points is None:
        return _made().gguf(_raw(blocks), name, columns)  # type: ignore[no-any-return]
    return _made().gguf_grid(_raw(blocks), name, _raw(points), columns)  # type: ignore[no-any-return]


def _made() -> Any:
    if _products is None:
        raise RuntimeError("products were not compiled when this package was installed")
    return _products


def _raw(tensor: Tensor) -> Any:
    """A tensor as NumPy has it; 16-bit floats as their bits."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()

"""Products ``x Wᵀ`` with a packed ``W``: compiled, on the stored tensors themselves, without ever decoding all of it.

A :class:`Product` is made once for a weight and is a tree: codes row by row (:func:`row_codes`) and others are its
leaves. Stored tensors are used where they lie and kept alive. ``available`` says whether anything was compiled; there
is no slow version here, as a caller without products decodes tile by tile (:mod:`tersor.runtime.packed`).

Inputs are rounded to 16 bits, token by token, unless 8 are asked for: see :mod:`tersor.kernels.reference_products`,
the specification of all of this.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

try:
    from tersor.kernels import _products  # type: ignore[attr-defined]
except ImportError:
    _products = None

available: bool = _products is not None

ScaleKind = Literal["fp16", "bf16", "s8"]


class Product(Protocol):
    """A packed weight that multiplies."""

    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...


def multiply(product: Product, x: Tensor, *, bits: int = 16) -> Tensor:
    """``x (tokens, in)`` float32 on the CPU times the weight: ``(tokens, out)`` float32, on torch's number of threads.

    ``bits``: what inputs are rounded to, 8 or 16. The result is the same bits for any number of threads. Raises
    ValueError when ``x`` does not fit.
    """
    y = torch.empty(len(x), product.rows)
    product.apply(x.detach().contiguous().numpy(), y.numpy(), torch.get_num_threads(), bits == 8)  # type: ignore[attr-defined]
    return y


def read_rows(product: Product, rows: Tensor) -> Tensor | None:
    """Rows ``rows (n,)`` int64 of the weight, ``(n, in)`` float32; None where the product has no short way to them.

    Raises ValueError for a row that there is not.
    """
    found = torch.empty(len(rows), product.columns)
    read: bool = product.read_rows(rows.contiguous().numpy(), found.numpy())  # type: ignore[attr-defined]
    return found if read else None


def row_codes(
    codes: Tensor,
    *,
    bits: int,
    columns: int,
    group: int | None,
    scale: Tensor | None,
    super_scale: Tensor | None = None,
    zero: Tensor | None = None,
    middle: float = 0.0,
    table: Tensor | None = None,
) -> Product:
    """A weight of codes row by row: ``W[r, c] = scale[r, c // group] · (u − zero[r, c // group])``.

    ``codes``: ``(rows, ceil(columns · bits / 8))`` uint8, little-endian codes of ``bits`` bits (1–8). ``group``:
    columns that share a scale, a multiple of 4 that divides ``columns``, or None for all. ``scale``:
    ``(rows, groups)`` float16 or bfloat16, or uint8 with ``super_scale (rows, 1)`` float16; None for ones. ``u`` is the
    code, or with ``table`` (``(1 or rows, 2^bits)`` float32) the entry that it names. ``zero``: codes of ``bits`` bits
    for each group, packed like ``codes``; without it, ``middle`` for all. Entries of a table that do not lie on a grid
    of 256 steps are rounded to one of 65,536 from the least to the greatest of them. Raises ValueError for what does
    not fit together.
    """
    kind: ScaleKind = "fp16"
    if super_scale is not None:
        kind = "s8"
    elif scale is not None and scale.dtype == torch.bfloat16:
        kind = "bf16"
    return _products.row_codes(  # type: ignore[no-any-return, union-attr]
        raw(codes),
        bits,
        columns,
        group or 0,
        None if scale is None else raw(scale),
        kind,
        None if super_scale is None else raw(super_scale),
        None if zero is None else raw(zero),
        middle,
        None if table is None else table.float().contiguous().numpy(),
    )


def instructions() -> str:
    """The best that loops may use here: ``avx512``, ``avx2`` or ``portable``."""
    return str(_products.isa())  # type: ignore[union-attr]


def read(buffer: object, threads: int) -> int:
    """The sum of a NumPy array ``buffer`` of uint64: what a product takes at least that only fetches its weight."""
    return int(_products.read_all(buffer, threads))  # type: ignore[union-attr]


def raw(tensor: Tensor) -> Any:
    """A stored tensor as NumPy has it; 16-bit floats as their bits."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()


def compiled() -> Any:
    """The compiled module. Raises RuntimeError where there is none."""
    if _products is None:
        raise RuntimeError("products were not compiled when this package was installed")
    return _products

"""Products with trellis codes (:mod:`tersor.codecs.trellis`), compiled, and their plain torch specification.

A column's stream is never decoded window by window: see ``products/trellis_product.h``. Sums of integers are exact, so
that :func:`product` says every bit of what comes out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tersor.kernels.products import Product, compiled, raw
from tersor.kernels.reference_products import STEPS
from tersor.kernels.reference_trellis import columns_apart, states, window_map


@dataclass(frozen=True)
class TrellisCode:
    """What a stream stands for: the value of a state is ``unit · integers[M s]``.

    ``bits`` new bits a row (1–4) make, with those before them, a state of ``window`` bits (8–16). ``masks``: the rows
    of ``M``, highest bit of the index first. ``integers``: ``2^len(masks)`` of −128…127; at most 64 with 1 and 2 bits,
    128 with 3, 256 with 4.
    """

    bits: int
    window: int
    masks: tuple[int, ...]
    integers: tuple[int, ...]
    unit: float


def trellis(codes: Tensor, scale: Tensor, code: TrellisCode, *, tile: int, columns: int) -> Product:
    """The weight ``(rows, columns)`` that :func:`weight` decodes, as a product.

    ``codes``: ``(ceil(rows / tile), ceil(columns / 4), width, 4)`` uint8, as
    :func:`tersor.kernels.reference_trellis.interleave` has them: the streams of tiles of ``tile`` rows (at most 256).
    ``scale``: ``(rows, 1)`` float16. Codes are used where they lie, and kept alive. Raises ValueError for what does not
    fit together.
    """
    return compiled().trellis(  # type: ignore[no-any-return]
        raw(codes),
        raw(scale.float().flatten()),
        tile,
        columns,
        code.bits,
        code.window,
        np.array(code.masks, np.int32),
        np.array(code.integers, np.int8),
        code.unit,
    )


def integers(codes: Tensor, code: TrellisCode, *, tile: int, rows: int, columns: int) -> Tensor:
    """The integers ``(rows, columns)`` int64 of a weight, before unit and scale."""
    shifts = torch.arange(8)
    apart = columns_apart(codes, code.bits, columns, codes.shape[2])
    streams = (apart[..., None].long() >> shifts & 1).flatten(2)[..., : tile * code.bits]
    number = (streams.reshape(*apart.shape[:2], tile, code.bits) << torch.arange(code.bits)).sum(3)
    number = number.transpose(1, 2).reshape(-1, columns)[:rows]
    state = states(number.to(torch.int32), code.bits, code.window, tile).long()
    return torch.tensor(code.integers)[window_map(code.masks, code.window)][state]


def weight(codes: Tensor, scale: Tensor, code: TrellisCode, *, tile: int, columns: int) -> Tensor:
    """The weight ``(rows, columns)`` float32."""
    return integers(codes, code, tile=tile, rows=len(scale), columns=columns).float() * code.unit * scale.float()


def product(codes: Tensor, scale: Tensor, code: TrellisCode, x: Tensor, *, tile: int, bits: int = 16) -> Tensor:
    """``x (tokens, columns)`` float32, rounded to ``bits`` bits, times the weight: ``(tokens, rows)``, to the bit."""
    most = x.abs().amax(1, keepdim=True)
    # Divided, not multiplied by a reciprocal as `number / tensor` would be.
    inverse = torch.where(most > 0, torch.full_like(most, STEPS[bits]) / most, torch.zeros_like(most))
    number = integers(codes, code, tile=tile, rows=len(scale), columns=x.shape[1])
    total = torch.round(x * inverse).double() @ number.double().T
    return (total * ((most / STEPS[bits]).double() * code.unit * scale.double().T)).float()

"""Plain torch version of the products with packed weights: their specification.

A product takes float32 inputs ``x (tokens, in)``, rounds each token to integers under one scale (:func:`rounded`), and
multiplies those by the weight. Sums of integers are exact; what is left is the rounding of float32 sums over groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = {8: 127.0, 16: 32384.0}
"""The greatest integer that stands for an input, by bits. 16 bits are two planes of 8, both within −128…127."""


def rounded(x: Tensor, bits: int = 16) -> tuple[Tensor, Tensor]:
    """Integers ``(tokens, in)`` int32, and the scale ``(tokens, 1)`` float32 that each token's are to be multiplied by.

    The error of an input is at most half the scale: ``max |x| / (2 · STEPS[bits])``.
    """
    most = x.abs().amax(1, keepdim=True)
    scale = most / STEPS[bits]
    inverse = torch.where(scale > 0, STEPS[bits] / most, torch.zeros_like(most))
    return torch.round(x * inverse).to(torch.int32), scale


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
) -> Tensor:
    """The weight ``(rows, columns)`` float32 that :func:`tersor.kernels.products.row_codes` multiplies by."""
    rows = len(codes)
    number = _unpack(codes, bits, columns)
    values = number.float() if table is None else torch.gather(table.expand(rows, -1), 1, number)
    width = group or columns
    groups = columns // width
    scales = torch.ones(rows, groups) if scale is None else scale.float()
    if super_scale is not None:
        scales = scales * super_scale.float()
    middles = torch.full((rows, groups), middle) if zero is None else _unpack(zero, bits, groups).float()
    if table is not None:
        middles = torch.zeros(rows, groups)
    spread = values.reshape(rows, groups, width) - middles[:, :, None]
    return (spread * scales[:, :, None]).reshape(rows, columns)


def _unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """Little-endian codes of ``bits`` bits from bytes ``(rows, n)``: ``(rows, count)`` int64."""
    shifts = torch.arange(8, device=stream.device)
    plane = (stream[:, :, None].long() >> shifts & 1).flatten(1)[:, : count * bits]
    return (plane.reshape(len(stream), count, bits) << torch.arange(bits)).sum(2)


def product(weight: Tensor, x: Tensor, bits: int = 16) -> Tensor:
    """``(tokens, out)``: the rounded inputs times ``weight (out, in)``, summed in float64."""
    codes, scale = rounded(x, bits)
    return (codes.double() @ weight.double().T * scale.double()).float()

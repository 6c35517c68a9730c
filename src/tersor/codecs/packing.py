"""Codes at their true width: a little-endian bit stream per row, padded to whole bytes per row.

>>> import torch
>>> pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]]), 3).tolist()     # 8 codes of 3 bits: 3 bytes
[[209, 88, 31]]
>>> unpack(torch.tensor([[209, 88, 31]], dtype=torch.uint8), 3, 8).tolist()
[[1, 2, 3, 4, 5, 6, 7, 0]]
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_width(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes ``(rows, n)`` in ``[0, 2^bits)`` to bytes ``(rows, ceil(n·bits/8))`` uint8; bits from 1 to 8."""
    rows, count = codes.shape
    if bits == 8:
        return codes.to(torch.uint8)
    whole = 8 // bits
    if 8 % bits == 0 and count % whole == 0:
        small = codes.to(torch.uint8)
        stream = small[:, ::whole].contiguous()
        for place in range(1, whole):
            stream |= small[:, place::whole] << place * bits
        return stream
    # Eight codes make exactly `bits` bytes, and fit one 64-bit word.
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, -count % 8)).reshape(rows, -1, 8)
    words = (padded << torch.arange(0, 8 * bits, bits)).sum(2)
    spread = (words[:, :, None] >> torch.arange(0, 8 * bits, 8)) & 0xFF
    return spread.to(torch.uint8).reshape(rows, -1)[:, : packed_width(count, bits)].contiguous()


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack`: bytes ``(rows, ceil(count·bits/8))`` to codes ``(rows, count)`` int32."""
    device = stream.device
    if bits == 8:
        return stream.to(torch.int32)
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
        codes: Tensor = (stream[:, :, None] >> shifts) & (2**bits - 1)
    else:
        padded = torch.nn.functional.pad(stream, (0, -stream.shape[1] % bits))
        padded = padded.view(len(stream), padded.shape[1] // bits, bits)
        words = (padded.to(torch.int64) << torch.arange(0, 8 * bits, 8, device=device)).sum(2)
        codes = (words[:, :, None] >> torch.arange(0, 8 * bits, bits, device=device)) & (2**bits - 1)
    return codes.flatten(1)[:, :count].to(torch.int32)

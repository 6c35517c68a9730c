"""Codes of up to 56 bits: the same little-endian bit stream per row as :mod:`tersor.codecs.packing`.

>>> import torch
>>> stream = pack_wide(torch.tensor([[0x123, 0xABC]]), 12)
>>> [hex(byte) for byte in stream[0].tolist()]
['0x23', '0xc1', '0xab']
>>> [hex(code) for code in unpack_wide(stream, 12, 2)[0].tolist()]
['0x123', '0xabc']
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.codecs.packing import packed_width


def pack_wide(codes: Tensor, bits: int) -> Tensor:
    """Codes ``(rows, n)`` in ``[0, 2^bits)`` to bytes ``(rows, ceil(n·bits/8))`` uint8; bits from 1 to 56."""
    rows, count = codes.shape
    shifts = torch.arange(bits, device=codes.device)
    spread = ((codes.to(torch.int64)[:, :, None] >> shifts) & 1).to(torch.uint8)
    padded = torch.nn.functional.pad(spread.reshape(rows, count * bits), (0, -(count * bits) % 8))
    octets = padded.reshape(rows, packed_width(count, bits), 8)
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=codes.device)
    return (octets * places).sum(2, dtype=torch.uint8)


def unpack_wide(stream: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_wide`: bytes to codes ``(rows, count)`` int64."""
    return codes_at(stream, bits, torch.arange(count, device=stream.device))


def codes_at(stream: Tensor, bits: int, places: Tensor) -> Tensor:
    """Of every row's codes those at ``places (n,)``: ``(rows, n)`` int64."""
    first = places * bits
    # A code of b bits touches at most (b + 14) // 8 bytes; the padding keeps the last code's reads inside.
    touched = (bits + 14) // 8
    padded = torch.nn.functional.pad(stream, (0, touched))
    word = torch.zeros(len(stream), len(places), dtype=torch.int64, device=stream.device)
    for byte in range(touched):
        word |= padded[:, first // 8 + byte].to(torch.int64) << (8 * byte)
    return (word >> (first % 8)) & ((1 << bits) - 1)

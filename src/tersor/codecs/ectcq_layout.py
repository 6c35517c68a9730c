"""The bytes of an entropy-coded trellis: a head, levels of rows, steps and levels of columns, tables, the stream."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.codecs import ectcq_contexts as tables
from tersor.codecs.ectcq_leaf import LEVELS, STEPS, Steps
from tersor.codecs.packing import pack, packed_width, unpack
from tersor.contracts import Shape
from tersor.kernels import coded
from tersor.kernels.reference_rans import LANES

_HEAD = struct.Struct("<fBBBBBBh")
_TABLE = struct.Struct("<hhhBBBBB")
HEAD_BYTES, TABLE_BYTES = _HEAD.size, _TABLE.size
_FALL = LEVELS // STEPS
"""How many levels a column falls for each size that its step grows."""


def lanes(shape: Shape) -> int:
    """How many streams are interleaved: each costs about two bytes, so small layers have few."""
    return min(max(1 << max(shape[0] * shape[1] >> 14, 1).bit_length() - 1, 1), LANES)


def least(shape: Shape) -> int:
    """Bytes that a layer takes in which all weights are 0."""
    return HEAD_BYTES + TABLE_BYTES + 4 * lanes(shape)


def usual(shape: Shape) -> int:
    """Bytes of side information that are usual for layers of 1024 rows and so many columns; never less than theirs."""
    return 780 + shape[1] + TABLE_BYTES * max(min(shape[1] >> 4, 12), 1)


@dataclass(frozen=True, eq=False)
class Sides:
    """All but the numbers: steps, and the tables of each context."""

    steps: Steps
    tables: tables.Tables
    costs: Tensor
    """Bits that the numbers of each context take; nothing where they were not counted."""

    def contexts(self) -> coded.Contexts:
        steps = self.steps
        frequency = self.tables.frequencies()
        own = lanes((len(steps.row), len(steps.level)))
        return coded.Contexts(steps.level, frequency, self.tables.low, steps.row[:, 0], int(steps.shift), own)


def sides(tensors: Mapping[str, Tensor]) -> Sides:
    """The steps of a packed grid, and the tables that suit its numbers best; contexts that none has are left out."""
    steps = Steps(*(tensors[name] for name in ("row", "column", "level", "shift", "scale", "shrink", "low")))
    kinds = steps.contexts()
    kept = int(kinds.max()) + 1 if kinds.numel() else 1
    low = steps.low[:kept]
    counts = tables.count(tensors["codes"], kinds, low)
    fitted = tables.fit(counts, low)
    row, column, level, shift, scale, shrink, _ = vars(steps).values()
    return Sides(Steps(row, column, level, shift, scale, shrink[:kept], low), fitted, fitted.costs(counts))


def write(found: Sides) -> bytes:
    """All that comes before the stream."""
    steps = found.steps
    row, first, step = steps.row[:, 0], _least(steps.column), steps.column.long()
    beyond = steps.level.long() + _FALL * step
    base = _least(beyond)
    fields = [row.long(), step - first, beyond - base]
    widths = [int(field.max()).bit_length() if len(field) else 0 for field in fields]
    head = _HEAD.pack(
        float(steps.scale), len(steps.low), int(steps.shift), widths[0], first, widths[1], widths[2], base
    )
    packed = [pack(f[None], w).numpy().tobytes() for f, w in zip(fields, widths, strict=True) if w]
    shrink = torch.round(steps.shrink[:, 1:] * 256).long()
    mixed = found.tables.low + (found.tables.escape << 4)
    rows = torch.cat([found.tables.bits, mixed[:, None], shrink], 1).tolist()
    return head + b"".join(packed) + b"".join(_TABLE.pack(*row) for row in rows)


def read(data: Tensor, shape: Shape) -> tuple[Sides, int]:
    """What :func:`write` wrote, from the beginning of uint8 ``data``; and how many bytes that was.

    Raises ValueError when the bytes end early.
    """
    rows, columns = shape
    whole = data.cpu().contiguous()
    if len(whole) < HEAD_BYTES:
        raise ValueError("the stream ends before its head does")
    scale, count, shift, *narrow, base = _HEAD.unpack(whole[:HEAD_BYTES].numpy().tobytes())
    row_width, first, step_width, level_width = narrow
    at = HEAD_BYTES
    fields = []
    for amount, width in ((rows, row_width), (columns, step_width), (columns, level_width)):
        size = packed_width(amount, width)
        if width > 8 or len(whole) < at + size:
            raise ValueError("the stream ends before its levels do")
        fields.append(unpack(whole[None, at : at + size], width, amount)[0] if width else torch.zeros(amount))
        at += size
    if len(whole) < at + count * TABLE_BYTES or not count or shift > 15:
        raise ValueError("the stream ends before its tables do")
    records = torch.tensor(list(_TABLE.iter_unpack(whole[at : at + count * TABLE_BYTES].numpy().tobytes())))
    column = fields[1].long() + first
    low = records[:, 3] & 15
    shrink = torch.nn.functional.pad(records[:, 4:].to(torch.float32) / 256, (1, 0))
    steps = Steps(
        fields[0].to(torch.uint8)[:, None],
        column.to(torch.uint8),
        (fields[2].long() + base - _FALL * column).to(torch.int32),
        torch.tensor([shift]),
        torch.tensor([scale]),
        shrink,
        low,
    )
    found = Sides(steps, tables.Tables(records[:, :3], low, records[:, 3] >> 4), torch.zeros(0))
    return found, at + count * TABLE_BYTES


def _least(values: Tensor) -> int:
    return int(values.min()) if len(values) else 0

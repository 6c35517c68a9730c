"""Scales of llama.cpp's blocks for codes that stay: exact steps under ``tr(E H Eᵀ)`` that never raise it.

The decoded weight is linear in each group's scale and minimum, and in a block's ``d`` and ``dmin``. One pair after
another is solved for and put on the nearest number that can be stored, which for one number is the best one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.codecs.gguf_layout import Kind
from tersor.codecs.gguf_scales import to_half, to_scale

_WIDTH = 256
"""Columns whose changes are gathered before they are told to all others by one matrix product."""


@dataclass
class Refit:
    """``unit (rows, in)``: grid points before scaling. ``side``: see the codec; a copy, which is changed."""

    kind: Kind
    unit: Tensor
    gram: Tensor
    side: dict[str, Tensor]

    def sweep(self, pull: Tensor) -> None:
        """Once over all blocks; ``pull = (W − Ŵ) H``, ``(rows, in)``, is changed in place."""
        columns = self.unit.shape[1]
        width = max(_WIDTH // self.kind.block, 1) * self.kind.block
        for start in range(0, columns, width):
            here = slice(start, min(start + width, columns))
            change = torch.zeros_like(pull[:, here])
            near, gram = pull[:, here].clone(), self.gram[here, here]
            for first in range(0, here.stop - start, self.kind.block):
                block = (start + first) // self.kind.block
                if self.kind.steps is not None:
                    for group in range(self.kind.groups):
                        self._group(block, group, first, near, change, gram)
                self._block(block, first, near, change, gram)
            pull -= change @ self.gram[here]

    def _group(self, block: int, group: int, first: int, near: Tensor, change: Tensor, gram: Tensor) -> None:
        """The step, and the low, of one group."""
        kind, side = self.kind, self.side
        low = first + group * kind.group
        here = slice(low, low + kind.group)
        at = block * kind.groups + group
        columns = slice(block * kind.block + group * kind.group, block * kind.block + (group + 1) * kind.group)
        unit = self.unit[:, columns]
        d, old = side["d"][:, block], side["step"][:, at]
        dmin, lower = (side["dmin"][:, block], side["low"][:, at]) if kind.lows else (None, None)
        pair = _Pair(unit, None if dmin is None else torch.ones_like(unit), near, gram, here)
        step = kind.nearest_step((d * old + pair.first()) / d)
        step = torch.where((step * old > 0) & torch.isfinite(step), step, old)
        moved = d * step - d * old
        down = torch.zeros_like(moved)
        new = lower
        if dmin is not None and lower is not None and kind.lows:
            shift = pair.second(moved)
            new = torch.where(dmin == 0, lower, ((dmin * lower + shift) / dmin).round().clamp(*kind.lows))
            down = dmin * new - dmin * lower
        keep = pair.gain(moved, down) < 0
        side["step"][:, at] = torch.where(keep, step, old)
        if new is not None and lower is not None:
            side["low"][:, at] = torch.where(keep, new, lower)
        pair.apply(torch.where(keep, moved, 0.0), torch.where(keep, down, 0.0), near, change)

    def _block(self, block: int, first: int, near: Tensor, change: Tensor, gram: Tensor) -> None:
        """``d``, and ``dmin``, of one block."""
        kind, side = self.kind, self.side
        here = slice(first, first + kind.block)
        unit = self.unit[:, block * kind.block : (block + 1) * kind.block]
        groups = slice(block * kind.groups, (block + 1) * kind.groups)
        ones = None
        if kind.steps is not None:
            unit = unit * side["step"][:, groups].repeat_interleave(kind.group, 1)
        if kind.offset:
            ones = torch.ones_like(unit)
            ones = ones * side["low"][:, groups].repeat_interleave(kind.group, 1) if kind.lows else ones
        pair = _Pair(unit, ones, near, gram, here)
        d = side["d"][:, block]
        by = pair.first()
        new = to_scale(d + by)
        new = torch.where((new * d > 0) & torch.isfinite(by), new, d)
        moved, down = new - d, torch.zeros_like(d)
        if kind.offset:
            dmin = side["dmin"][:, block]
            other = to_half(dmin + pair.second(moved))
            other = torch.where(torch.isfinite(other) & ((other >= 0) | (kind.lows is None)), other, dmin)
            down = other - dmin
        keep = pair.gain(moved, down) < 0
        side["d"][:, block] = torch.where(keep, new, d)
        if kind.offset:
            side["dmin"][:, block] = torch.where(keep, other, dmin)
        pair.apply(torch.where(keep, moved, 0.0), torch.where(keep, down, 0.0), near, change)


class _Pair:
    """Two directions of some columns of each row: along ``unit`` and, where there is one, against ``ones``.

    ``near (rows, n)``: the pull on a stretch of columns, of which ``here`` are meant; ``gram (n, n)``: theirs.
    """

    def __init__(self, unit: Tensor, ones: Tensor | None, near: Tensor, gram: Tensor, here: slice) -> None:
        self.unit, self.ones, self.here = unit, ones, here
        self.spread = unit @ gram[here]
        self.force = (near[:, here] * unit).sum(1)
        self.bend = (self.spread[:, here] * unit).sum(1)
        self.over = torch.zeros_like(self.spread) if ones is None else ones @ gram[here]
        zero = torch.zeros_like(self.force)
        self.back = zero if ones is None else (near[:, here] * ones).sum(1)
        self.cross = zero if ones is None else (self.spread[:, here] * ones).sum(1)
        self.flat = zero if ones is None else (self.over[:, here] * ones).sum(1)

    def first(self) -> Tensor:
        """How far along ``unit`` the error is least, if the other direction may follow."""
        alone = self.force / self.bend.clamp(min=1e-38)
        flat = self.flat.clamp(min=1e-38)
        inner = self.bend - self.cross.square() / flat
        both = (self.force - self.cross * self.back / flat) / inner.clamp(min=1e-38)
        return torch.where((inner > 1e-5 * self.bend) & (self.flat > 0), both, alone)

    def second(self, by: Tensor) -> Tensor:
        """The best move against ``ones`` once ``unit`` has moved ``by``."""
        return torch.where(self.flat > 0, (by * self.cross - self.back) / self.flat.clamp(min=1e-38), 0.0)

    def gain(self, by: Tensor, down: Tensor) -> Tensor:
        """By how much ``e H eᵀ`` changes; below 0 is better."""
        along = by * (by * self.bend - 2 * self.force)
        return along + down * (2 * self.back + down * self.flat) - 2 * by * down * self.cross

    def apply(self, by: Tensor, down: Tensor, near: Tensor, change: Tensor) -> None:
        """Change the columns' values, and the pull on all columns of ``near``."""
        near -= by[:, None] * self.spread
        change[:, self.here] += by[:, None] * self.unit
        if self.ones is not None:
            near += down[:, None] * self.over
            change[:, self.here] -= down[:, None] * self.ones

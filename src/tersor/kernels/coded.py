"""Entropy coding and trellis search: compiled where a compiler was there at installation, plain NumPy otherwise.

Tensors in and out, one thread; see :mod:`tersor.kernels.reference_rans` and :mod:`tersor.kernels.reference_ectcq`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.kernels import reference_ectcq, reference_rans

try:
    from tersor.kernels import _coded  # type: ignore[attr-defined]
except ImportError:
    _coded = None

compiled: bool = _coded is not None
TRELLISES = reference_ectcq.CODES
FINE_CONTEXTS = 64
"""The most contexts with which compiled loops make more than numbers."""
_MOST_NAMES, _FARTHEST_NAME = 65535, 4096 * 256


@dataclass(frozen=True)
class Contexts:
    """What each number of a layer is coded with; see :mod:`tersor.kernels.reference_rans`.

    ``level (columns,)`` int, and ``row (rows,)`` int or None for zeros: their sum, shifted by ``shift``, is the
    context. ``frequency (n, 2, 32)``, ``low (n,)`` int, of each context. ``lanes``: None for as many as there can be.
    """

    level: Tensor
    frequency: Tensor
    low: Tensor
    row: Tensor | None = None
    shift: int = 0
    lanes: int | None = None

    def used_lanes(self) -> int:
        """Streams that are interleaved."""
        return min(len(self.level), reference_rans.LANES) if self.lanes is None else self.lanes

    def plain(self, rows: int) -> reference_rans.Contexts:
        """The same in NumPy."""
        row = torch.zeros(rows) if self.row is None else self.row
        plain = (t.long().numpy() for t in (row, self.level, self.frequency, self.low))
        row_level, level, frequency, low = plain
        return reference_rans.Contexts(row_level, level, self.shift, frequency, low)

    def compiled(self, rows: int) -> tuple[Tensor, Tensor, int, Tensor, Tensor, int]:
        """The same as the compiled loops take it."""
        row = torch.zeros(rows) if self.row is None else self.row
        return _int(row), _int(self.level), self.shift, _int(self.frequency), _int(self.low), self.used_lanes()


def path(
    target: Tensor,
    price_of_row: Tensor,
    price_of_column: Tensor,
    classes: Tensor,
    price: Tensor,
    shrink: Tensor,
    low: Tensor,
    states: int,
    row: Tensor | None = None,
    shift: int = 0,
) -> Tensor:
    """See :func:`tersor.kernels.reference_ectcq.path`: ``target (columns, rows)`` to grid numbers int32.

    ``classes (columns,)``: levels of columns. Without levels of rows, ``row (rows,)``, they are contexts.
    """
    trellis = TRELLISES[states]
    prices = _float(price_of_row), _float(price_of_column)
    target, price, shrink = map(_float, (target, price, shrink))
    row = torch.zeros(target.shape[1]) if row is None else row
    if _coded is None:
        rows, levels, raw = (t.long().numpy() for t in (row, classes, low))
        of_row, of_column, bits, inward = (t.numpy() for t in (*prices, price, shrink))
        found = reference_ectcq.path(target.numpy(), of_row, of_column, rows, levels, shift, bits, inward, raw, trellis)
        return torch.from_numpy(found)
    codes = torch.empty(target.shape, dtype=torch.int32)
    _coded.path(target, *prices, _int(row), _int(classes), shift, price, shrink, _int(low), *trellis, codes)
    return codes


def path_in_order(
    target: Tensor,
    reference: Tensor,
    mixing: Tensor,
    step: Tensor,
    most: float,
    price_of_column: Tensor,
    row: Tensor,
    level: Tensor,
    shift: int,
    price: Tensor,
    shrink: Tensor,
    low: Tensor,
    states: int,
) -> tuple[Tensor, Tensor] | None:
    """Grid numbers int32 and values, both ``(rows, n)``, of the columns of ``target`` searched one after the other.

    ``step (n,)``: of columns; targets go to ``most`` of them. After column ``j``, ``target_k += (value_j -
    reference_j) * mixing_jk`` for the columns ``k`` after it, as :func:`tersor.solvers.sequential.sequential_round`
    does, to the bit. None where it was not compiled. The rest is as in :func:`path`.
    """
    if _coded is None:
        return None
    moved = target.clone(memory_format=torch.contiguous_format).float()
    codes, decoded = torch.empty(target.shape, dtype=torch.int32), torch.empty(target.shape)
    given = map(_float, (reference, mixing, step))
    prices = torch.ones(len(target)), _float(price_of_column)
    tables = _float(price), _float(shrink), _int(low)
    _coded.path_in_order(
        moved, *given, most, *prices, _int(row), _int(level), shift, *tables, *TRELLISES[states], codes, decoded
    )
    return codes, decoded


def priced_in_order(
    target: Tensor,
    reference: Tensor,
    mixing: Tensor,
    group: Tensor,
    scale: Tensor,
    middle: Tensor,
    zero: Tensor,
    levels: int,
    price_row: Tensor,
    price_column: Tensor,
    kind: Tensor,
    symbol: Tensor,
    low: Tensor,
    prices: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """Codes int32 and values, both ``(rows, n)``, of the columns of ``target`` rounded one after the other, even grids.

    Which codes are cheapest is what :meth:`tersor.codecs.coded_leaf.PricedGrid.round` says; targets of later columns
    move as in :func:`path_in_order`, to the bit. ``group (n,)``: the group of each column; ``scale``, ``middle``,
    ``zero``, ``price_row (rows, groups)``; ``price_column (n,)``; ``kind (rows,)``; ``symbol (classes, 2, 32)``, ``low
    (classes,)``, ``prices (classes, 513)``. None where it was not compiled.
    """
    if _coded is None:
        return None
    moved = target.clone(memory_format=torch.contiguous_format).float()
    codes, decoded = torch.empty(target.shape, dtype=torch.int32), torch.empty(target.shape)
    grid = map(_float, (scale, zero - middle, middle, zero))
    given = _float(price_row), _float(price_column), _int(kind), _float(symbol), _int(low), _float(prices)
    steps = _float(reference), _float(mixing), _int(group)
    _coded.priced_in_order(moved, *steps, *grid, float(levels - 1), *given, codes, decoded)
    return codes, decoded


def encode(codes: Tensor, classes: Tensor, frequency: Tensor, low: Tensor, nbytes: int) -> tuple[Tensor, int]:
    """:func:`encode_in` where the class of a column, ``classes (columns,)``, is the context of all its numbers."""
    return encode_in(codes, Contexts(classes, frequency, low), nbytes)


def encode_in(codes: Tensor, contexts: Contexts, nbytes: int) -> tuple[Tensor, int]:
    """The stream of ``codes (rows, columns)`` in ``nbytes`` bytes uint8, and how many it takes.

    Where it takes more than ``nbytes``, the bytes are worthless. See :mod:`tersor.kernels.reference_rans`.
    """
    stream = torch.zeros(nbytes, dtype=torch.uint8)
    if _coded is not None:
        return stream, int(_coded.encode(_int(codes), *contexts.compiled(len(codes)), stream))
    plain = contexts.plain(len(codes))
    written = np.frombuffer(reference_rans.encode(codes.long().numpy(), plain, contexts.used_lanes()), np.uint8)
    if len(written) <= nbytes:
        stream[: len(written)] = torch.from_numpy(written.copy())
    return stream, len(written)


def decode(
    stream: Tensor, shape: tuple[int, int], classes: Tensor, frequency: Tensor, low: Tensor, states: int
) -> Tensor:
    """The inverse of :func:`encode`."""
    return decode_in(stream, shape, Contexts(classes, frequency, low), states)


def decode_in(stream: Tensor, shape: tuple[int, int], contexts: Contexts, states: int) -> Tensor:
    """Grid numbers int32 of ``shape``. Raises ValueError when the stream ends early or a table is not one."""
    if _coded is None:
        plain, lanes = contexts.plain(shape[0]), contexts.used_lanes()
        return torch.from_numpy(reference_rans.decode(stream.numpy(), shape, plain, lanes, TRELLISES[states]))
    codes = torch.empty(shape, dtype=torch.int32)
    _stream(stream, shape[0], contexts, states).decode(codes)
    return codes


def weights_in(
    stream: Tensor, shape: tuple[int, int], contexts: Contexts, states: int, shrink: Tensor, step: Tensor
) -> Tensor:
    """``step (columns,)`` times numbers moved towards zero, float32 of ``shape``: :func:`decode_in` and more at once.

    A number ``k`` moves by ``shrink[context, min(|k|, 4)]``, whole 256ths below 1; those for 0 are not used.
    Raises ValueError as :func:`decode_in` does.
    """
    if _coded is None or len(contexts.low) > FINE_CONTEXTS:
        codes = decode_in(stream, shape, contexts, states)
        return step * _inward(codes, shape, contexts, shrink) / 256
    weights = torch.empty(shape)
    _stream(stream, shape[0], contexts, states).values(_fine(shrink), _float(step), weights)
    return weights


def names_in(
    stream: Tensor, shape: tuple[int, int], contexts: Contexts, states: int, shrink: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What :func:`weights_in` multiplies steps with: the different numbers ``(n,)`` int64 in 256ths, how often each
    occurs, and of which each weight is, uint16 of ``shape``.

    None where a number is beyond 4096 steps, or where more than 65535 are different.
    """
    if _coded is None or len(contexts.low) > FINE_CONTEXTS:
        fine = _inward(decode_in(stream, shape, contexts, states), shape, contexts, shrink).long()
        found, place, counts = torch.unique(fine, return_inverse=True, return_counts=True)
        if len(found) > _MOST_NAMES or (len(found) and int(found.abs().max()) > _FARTHEST_NAME):
            return None
        return found, counts, place.to(torch.uint16)
    names = torch.empty(shape, dtype=torch.uint16)
    numbers, amounts = _stream(stream, shape[0], contexts, states).names(_fine(shrink), names)
    if not numbers and names.numel():
        return None
    return torch.tensor(numbers, dtype=torch.int64), torch.tensor(amounts, dtype=torch.int64), names


def pack_names(names: Tensor, code_of: Tensor, rare: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Names ``(rows, columns)`` uint16 as codes ``code_of (n,)`` of ``bits`` bits (1-8), packed row by row.

    Returns ``(rows, ceil(columns · bits / 8))`` uint8, and where in the flattened weight names are ``rare (n,)`` bool.
    """
    if _coded is None:
        place = names.long()
        return pack_rows(code_of.long()[place], bits), rare[place].flatten().nonzero()[:, 0]
    packed = torch.zeros(len(names), -(-names.shape[1] * bits // 8), dtype=torch.uint8)
    marked = (code_of.long() + 32768 * rare.long()).to(torch.uint16)
    return packed, torch.tensor(_coded.pack_names(names, marked, bits, packed), dtype=torch.int64)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes ``(rows, columns)`` of ``bits`` bits as rows of bytes, lowest bit first."""
    each = (codes.to(torch.uint8)[:, :, None] >> torch.arange(bits, dtype=torch.uint8)) & 1
    return torch.from_numpy(np.packbits(each.flatten(1).numpy(), 1, bitorder="little"))


def _stream(stream: Tensor, rows: int, contexts: Contexts, states: int) -> Any:
    row, level, shift, frequency, low, lanes = contexts.compiled(rows)
    given = stream.contiguous()
    return _coded.Stream(given, rows, row, level, shift, frequency, low, lanes, *TRELLISES[states])  # type: ignore[union-attr]


def _inward(codes: Tensor, shape: tuple[int, int], contexts: Contexts, shrink: Tensor) -> Tensor:
    """Numbers in 256ths, moved towards zero, float32."""
    row = torch.zeros(shape[0]) if contexts.row is None else contexts.row
    kind = (row.long()[:, None] + contexts.level.long() >> contexts.shift).clamp(0, len(contexts.low) - 1)
    by = torch.round(256 * shrink)[kind, codes.abs().clamp(max=4).long()]
    return codes.float() * 256 - codes.sign() * by


def _fine(shrink: Tensor) -> Tensor:
    """Shrinkages of sizes 1 to 4 as bytes."""
    return torch.round(shrink[:, 1:] * 256).to(torch.uint8).contiguous()


def _float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def _int(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int32).contiguous()

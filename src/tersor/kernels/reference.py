"""Plain torch versions of the compiled loops: their specification, and what runs where nothing was compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.contracts import ScalarGrid

_CHUNK = 1 << 16
"""Weights that are fitted at one time, so that what is read again stays near the processor."""
_LEAST = 2.0**-24
_STRIPS = 4
"""Into which a second moment is cut; more save little."""


def nearest(target: Tensor, grid: ScalarGrid, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest values of a scalar grid.

    ``target``: ``(rows, n)`` float32; ``columns``: ``(n,)`` int64 column numbers. Returns codes ``(rows, n)`` int32 and
    values float32. Ties go to the even code on uniform grids, to the lower code on tables. Tables of groups lie side by
    side, ``(rows or 1, groups · levels)``.
    """
    group = columns // grid.group
    scale = grid.scale[:, group]
    if grid.zero is not None:
        zero = grid.zero[:, group]
        offset = None if grid.offset is None else grid.offset[:, group]
        codes = torch.round((target if offset is None else target + offset) / scale + zero).clamp_(0, grid.levels - 1)
        values = (codes - zero) * scale
        return codes.to(torch.int32), values if offset is None else values - offset
    table = grid.table
    assert table is not None
    scaled = (target / scale).contiguous()
    if table.shape[1] > grid.levels:
        index = _among_groups(scaled, table, group, grid.levels)
        values = table.expand(len(target), -1).gather(1, group * grid.levels + index)
        return index.to(torch.int32), values * scale
    middles = (table[:, :-1] + table[:, 1:]) * 0.5
    if table.shape[0] == 1:
        index = torch.bucketize(scaled, middles[0].contiguous())
        values = table[0][index]
    else:
        index = torch.searchsorted(middles.contiguous(), scaled)
        values = torch.gather(table, 1, index)
    return index.to(torch.int32), values * scale


def _among_groups(scaled: Tensor, table: Tensor, group: Tensor, levels: int) -> Tensor:
    """Codes int64 of ``scaled (rows, n)`` in the tables of the columns' groups, ``group (n,)``; lower ones on ties."""
    tables = table.reshape(len(table), table.shape[1] // levels, levels)
    middles = (tables[:, :, :-1] + tables[:, :, 1:]) * 0.5
    index = torch.zeros(scaled.shape, dtype=torch.int64)
    for middle in middles.unbind(2):
        index += middle[:, group] < scaled
    return index


def sequential_round(
    target: Tensor, reference: Tensor, mixing: Tensor, grid: ScalarGrid, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Round columns left to right, letting each one's change move the targets of those to its right.

    After column ``j`` is rounded to ``v_j``, every later target becomes ``t_k += (v_j - reference_j) * mixing[j, k]``.

    ``target``, ``reference``: ``(rows, n)`` float32, left as they are; ``mixing``: ``(n, n)`` float32, only its strict
    upper triangle is read; ``columns``: ``(n,)`` int64. Returns codes int32, values, and the targets as they stood when
    each column was rounded, all ``(rows, n)``.
    """
    moved = target.clone()
    codes = torch.empty(target.shape, dtype=torch.int32)
    values = torch.empty_like(target)
    n = target.shape[1]
    for j in range(n):
        code, value = nearest(moved[:, j : j + 1], grid, columns[j : j + 1])
        codes[:, j], values[:, j] = code[:, 0], value[:, 0]
        change = value - reference[:, j : j + 1]
        moved[:, j + 1 :] += change * mixing[j, j + 1 :]
    return codes, values, moved


def fit_uniform(
    weight: Tensor, importance: Tensor, *, levels: int, asymmetric: bool, shrinks: Tensor
) -> tuple[Tensor, Tensor]:
    """Scale and zero of a uniform grid for each row of ``weight (n, group)``: the best of a clip search.

    Minimises ``Σ importance · (w − ŵ)²`` over the clip ratios ``shrinks (s,)``; symmetric grids are mid-rise (zero at
    ``(levels − 1) / 2``), asymmetric ones have an integer zero in ``[0, levels − 1]`` and always cover 0.
    ``importance``: ``(n, group)`` or ``(1, group)``. Returns ``scale (n,)`` > 0 and ``zero (n,)`` float32.
    """
    tiny = torch.tensor(2.0**-24)
    top = float(levels - 1)
    if asymmetric:
        low, high = weight.amin(1).clamp(max=0.0), weight.amax(1).clamp(min=0.0)
    else:
        high = weight.abs().amax(1)
        low = -high
    best_scale = torch.zeros_like(high)
    best_zero = torch.zeros_like(high)
    best = torch.full_like(high, torch.inf)
    for shrink in shrinks:
        scale = torch.maximum((high - low) * shrink / top, tiny)
        if asymmetric:
            zero = torch.round(-(low * shrink) / scale).clamp_(0, top)
        else:
            zero = torch.full_like(scale, top / 2)
        codes = torch.round(weight / scale[:, None] + zero[:, None]).clamp_(0, top)
        error = weight - (codes - zero[:, None]) * scale[:, None]
        loss = (importance * error * error).sum(1)
        better = loss < best
        best = torch.where(better, loss, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def fit_table(weight: Tensor, importance: Tensor, *, table: Tensor, shrinks: Tensor) -> Tensor:
    """Scale for each row of ``weight (n, group)`` on a shared ascending ``table (levels,)``: best of a clip search.

    Minimises ``Σ importance · (w − s · nearest(w / s))²``. Returns ``scale (n,)`` > 0.
    """
    tiny = torch.tensor(2.0**-24)
    reach = table.abs().max()
    high = weight.abs().amax(1)
    middles = (table[:-1] + table[1:]) * 0.5
    best_scale = torch.zeros_like(high)
    best = torch.full_like(high, torch.inf)
    for shrink in shrinks:
        scale = torch.maximum(high * shrink / reach, tiny)
        values = table[torch.bucketize(weight / scale[:, None], middles)] * scale[:, None]
        error = weight - values
        loss = (importance * error * error).sum(1)
        better = loss < best
        best = torch.where(better, loss, best)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def fit_signed(weight: Tensor, importance: Tensor, *, bits: int, reaches: Tensor) -> Tensor:
    """Scale, of either sign, of codes ``-2^(bits-1) … 2^(bits-1) - 1`` for each row of ``weight (n, group)``.

    The best least-squares scale, under ``Σ importance · (w − ŵ)²``, of the codes that each reach and sign gives.
    ``reaches (s,)``: shares of the greatest magnitude that the grid's far side has. ``importance``: ``(n, group)`` or
    ``(1, group)``. Returns ``(n,)`` float32, no magnitude below 2⁻²⁴.
    """
    count = max(1, _CHUNK // max(weight.shape[1], 1))
    spread = importance.expand_as(weight).split(count)  # type: ignore[no-untyped-call]
    pairs = zip(weight.split(count), spread, strict=True)  # type: ignore[no-untyped-call]
    return torch.cat([_fit_signed(here, counts, bits, reaches) for here, counts in pairs])


def _fit_signed(weight: Tensor, importance: Tensor, bits: int, reaches: Tensor) -> Tensor:
    half = 2.0 ** (bits - 1)
    step = (weight.abs().amax(1) / half).clamp(min=_LEAST)
    weighted = importance * weight
    best, scale = torch.full_like(step, -1.0), step
    for reach in reaches:
        number = (weight / (step * reach)[:, None]).round_()
        # With a negative scale the codes are those of the mirrored grid.
        for sign, low, high in ((1.0, -half, half - 1), (-1.0, 1 - half, half)):
            code = number.clamp(low, high)
            overlap = (weighted * code).sum(1)
            energy = (importance * code.square_()).sum(1).clamp(min=_LEAST)
            # What the least-squares scale for these codes takes away from the weights' energy.
            gain = overlap * overlap / energy
            scale = torch.where(gain > best, sign * (overlap / energy), scale)
            best = torch.maximum(gain, best)
    return torch.where(scale.abs() < _LEAST, _LEAST, scale)


def moment(inputs: Tensor) -> Tensor:
    """``Σ x xᵀ`` over the rows of ``inputs (tokens, n)``, ``(n, n)`` float32.

    Strips of columns are computed from the diagonal on and mirrored: the same bits as the plain product, for two thirds
    of its time.
    """
    x = inputs.to(torch.float32)
    width = x.shape[1]
    product = x.new_empty(width, width)
    for start in range(0, width, max(-(-width // _STRIPS), 1)):
        stop = min(start + -(-width // _STRIPS), width)
        product[start:stop, start:] = x[:, start:stop].T @ x[:, start:]
        product[stop:, start:stop] = product[start:stop, stop:].T
    return product

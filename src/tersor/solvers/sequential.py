"""The one inner loop: round columns in order, each one's change moving the targets of those after it.

Error feedback and coordinate descent are this loop with different mixing matrices (see their files).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor import kernels
from tersor.contracts import LeafCodec, Side


def sequential_round(
    codec: LeafCodec,
    side: Side,
    target: Tensor,
    *,
    reference: Tensor,
    mixing: Tensor,
    columns: Tensor,
    in_features: int,
    roots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes ``(rows, n / span)`` and values ``(rows, n)`` for a block of ``n`` columns.

    After each span ``J`` is rounded to ``v_J``, later targets become ``t_K += (v_J − reference_J) · mixing[J, K]``.
    ``target``, ``reference``: ``(rows, n)``; ``mixing``: ``(n, n)``; ``columns``: ``(n,)`` column numbers in the layer.
    ``roots (n / span, span, span)``: metrics of the spans (see :meth:`LeafCodec.round_span`); None for the codec's own.
    """
    grid = codec.grid(side, in_features)
    if grid is not None:
        codes, values, _ = kernels.sequential_round(target, reference, mixing, grid, columns)
        return codes, values
    at_once = codec.round_all(target, side, columns, reference, mixing)
    if at_once is not None:
        return at_once
    span = codec.span
    moved = target.clone()
    all_codes, all_values = [], []
    for start in range(0, target.shape[1], span):
        here = slice(start, start + span)
        if roots is None:
            codes, values = codec.round(moved[:, here], side, columns[here])
        else:
            codes, values = codec.round_span(moved[:, here], side, columns[here], roots[start // span])
        moved[:, start + span :] += (values - reference[:, here]) @ mixing[here, start + span :]
        all_codes.append(codes)
        all_values.append(values)
    return torch.cat(all_codes, 1), torch.cat(all_values, 1)

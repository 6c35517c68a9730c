"""The trellis search, compiled where it was; see :mod:`tersor.kernels.reference_trellis` for what it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.kernels import reference_trellis

try:
    from tersor.kernels import _trellis  # type: ignore[attr-defined]
except ImportError:
    _trellis = None

compiled: bool = _trellis is not None
"""Without it a search takes some hundred times as long."""


def trellis_search(
    target: Tensor, scale: Tensor, values: Tensor, *, bits: int, window: int, tile: int, context: int, turns: int = 1
) -> Tensor:
    """See :func:`tersor.kernels.reference_trellis.trellis_search`; one thread, the interpreter lock released."""
    if _trellis is None:
        return reference_trellis.trellis_search(
            target, scale, values, bits=bits, window=window, tile=tile, context=context, turns=turns
        )
    rows = target.shape[0]
    path = torch.empty(target.shape, dtype=torch.int32)
    # Tiles shorter than a window are a search of their own, and only the last tile can be one.
    short = rows % tile if tile * bits >= window else rows
    long = rows - (short if short * bits < window else 0)
    target, scale = target.contiguous(), scale.contiguous()
    if long:
        # NumPy views cross into C++ in a fraction of the time that tensors take, and this is called for every column.
        arrays = (target[:long].numpy(), scale[:long].numpy(), values.numpy())
        _trellis.trellis_search(*arrays, bits, window, tile, context, turns, path[:long].numpy())
    if long < rows:
        path[long:] = reference_trellis.trellis_search(
            target[long:], scale[long:], values, bits=bits, window=window, tile=tile, context=context, turns=turns
        )
    return path


def trellis_in_order(
    target: Tensor,
    reference: Tensor,
    mixing: Tensor,
    scale: Tensor,
    values: Tensor,
    *,
    bits: int,
    window: int,
    tile: int,
    context: int,
    turns: int = 1,
) -> tuple[Tensor, Tensor] | None:
    """States and values, both ``(rows, n)``, of the columns of ``target`` searched one after the other.

    After column ``j``, ``target_k += (value_j - reference_j) * mixing_jk`` for the columns ``k`` after it, as
    :func:`tersor.solvers.sequential.sequential_round` does, to the bit. None where it was not compiled, or where the
    last tile is shorter than a window.
    """
    rows = target.shape[0]
    if _trellis is None or rows == 0 or min(tile, rows % tile or tile) * bits < window:
        return None
    moved = target.clone(memory_format=torch.contiguous_format)
    path, decoded = torch.empty(target.shape, dtype=torch.int32), torch.empty(target.shape)
    given = [tensor.contiguous().numpy() for tensor in (reference, mixing, scale, values)]
    _trellis.trellis_in_order(moved.numpy(), *given, bits, window, tile, context, turns, path.numpy(), decoded.numpy())
    return path, decoded

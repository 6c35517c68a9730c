"""Entropy coding and trellis search: compiled where a compiler was there at installation, plain NumPy otherwise.

Tensors in and out, one thread; see :mod:`tersor.kernels.reference_rans` and :mod:`tersor.kernels.reference_ectcq`.
"""

from __future__ import annotations

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


def path(
    target: Tensor,
    price_of_row: Tensor,
    price_of_column: Tensor,
    classes: Tensor,
    price: Tensor,
    shrink: Tensor,
    low: Tensor,
    states: int,
) -> Tensor:
    """See :func:`tersor.kernels.reference_ectcq.path`: ``target (columns, rows)`` to grid numbers int32."""
    trellis = TRELLISES[states]
    target, price_of_row, price_of_column = _float(target), _float(price_of_row), _float(price_of_column)
    price, shrink = _float(price), _float(shrink)
    if _coded is None:
        found = reference_ectcq.path(
            target.numpy(),
            price_of_row.numpy(),
            price_of_column.numpy(),
            classes.long().numpy(),
            price.numpy(),
            shrink.numpy(),
            low.long().numpy(),
            trellis,
        )
        return torch.from_numpy(found)
    codes = torch.empty(target.shape, dtype=torch.int32)
    _coded.path(target, price_of_row, price_of_column, _int(classes), price, shrink, _int(low), *trellis, codes)
    return codes


def encode(codes: Tensor, classes: Tensor, frequency: Tensor, low: Tensor, nbytes: int) -> tuple[Tensor, int]:
    """The stream of ``codes (rows, columns)`` in ``nbytes`` bytes uint8, and how many it takes.

    Where it takes more than ``nbytes``, the bytes are worthless. See :mod:`tersor.kernels.reference_rans`.
    """
    stream = torch.zeros(nbytes, dtype=torch.uint8)
    if _coded is not None:
        return stream, int(_coded.encode(_int(codes), _int(classes), _int(frequency), _int(low), stream))
    arrays = [t.long().numpy() for t in (codes, classes, frequency, low)]
    written = np.frombuffer(reference_rans.encode(*arrays), np.uint8)
    if len(written) <= nbytes:
        stream[: len(written)] = torch.from_numpy(written.copy())
    return stream, len(written)


def decode(
    stream: Tensor, shape: tuple[int, int], classes: Tensor, frequency: Tensor, low: Tensor, states: int
) -> Tensor:
    """Grid numbers int32 of ``shape``. Raises ValueError when the stream ends early or a table is not one."""
    trellis = TRELLISES[states]
    if _coded is None:
        kind, tables, raw = classes.long().numpy(), frequency.long().numpy(), low.long().numpy()
        return torch.from_numpy(reference_rans.decode(stream.numpy(), shape, kind, tables, raw, trellis))
    codes = torch.empty(shape, dtype=torch.int32)
    _coded.decode(stream.contiguous(), _int(classes), _int(frequency), _int(low), *trellis, codes)
    return codes


def _float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def _int(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int32).contiguous()

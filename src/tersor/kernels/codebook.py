"""The search for the nearest sums of codebook vectors, compiled where it was; see :mod:`reference_codebook`."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.kernels import reference_codebook

try:
    from tersor.kernels import _cpu  # type: ignore[attr-defined]
except ImportError:
    _cpu = None

_search = getattr(_cpu, "nearest_sums", None)
compiled: bool = _search is not None
"""Without it a search takes about ten times as long."""
_WIDE = 64


def nearest_sums(vectors: Tensor, book: Tensor, width: int) -> Tensor:
    """See :func:`tersor.kernels.reference_codebook.nearest_sums`; one thread, the interpreter lock released."""
    stages, size, dim = book.shape
    if _search is None or not len(vectors):
        return reference_codebook.nearest_sums(vectors, book, width)
    count = -(-size // _WIDE) * _WIDE
    half = torch.full((stages, count), torch.inf)
    half[:, :size] = book.square().sum(2) * 0.5
    entries = torch.zeros(stages, dim, count)
    entries[:, :, :size] = book.transpose(1, 2)
    codes = torch.empty(len(vectors), dtype=torch.int32)
    # NumPy views cross into C++ in a fraction of the time that tensors take, and this is called for every few columns.
    given = (vectors.contiguous().numpy(), half.numpy(), entries.numpy())
    _search(*given, size.bit_length() - 1, min(width, size), codes.numpy())
    return codes

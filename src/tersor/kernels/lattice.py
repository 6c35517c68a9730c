"""Nearest words of E8P, compiled where it was; see :mod:`tersor.kernels.reference_lattice` for what it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.kernels import reference_lattice

try:
    from tersor.kernels import _cpu  # type: ignore[attr-defined]
except ImportError:
    _cpu = None

compiled: bool = _cpu is not None
"""Without it a search takes some hundred times as long."""


def nearest_words(target: Tensor) -> Tensor:
    """See :func:`tersor.kernels.reference_lattice.nearest_words`; one thread, the interpreter lock released."""
    if _cpu is None:
        return reference_lattice.nearest_words(target)
    words = torch.empty(len(target), dtype=torch.int32)
    # NumPy views cross into C++ in a fraction of the time that tensors take, and this is called for all eight columns.
    _cpu.nearest_words(target.detach().contiguous().numpy(), words.numpy())
    return words
